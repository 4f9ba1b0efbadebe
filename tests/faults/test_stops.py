"""A run that is stopped or killed at any moment ends, when it is resumed, in the bits of one that was not."""

import json
import signal

import pytest
import torch
from tasks import MOMENTS, expected_exit, run_with_fault, same_results

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
STEPS = {"classification": 12, "detection": 6, "segmentation": 6}
# How often a moment has passed when the signal comes: before the first checkpoint, or later.
COUNTS = {"step": (1, 2, 3, 4, 5), "save": (1, 2, 3, 4), "evaluation": (1,)}
ALL = [(moment, count) for moment in MOMENTS for count in COUNTS[moment]]
SHORT = {("step", 3), ("save", 2), ("evaluation", 1)}


def interrupted(processes, task, folder, number, moment, count, resume=False):
    """Runs a task into a signal in a process of its own; its exit code and what it printed."""
    log = folder.parent / f"{folder.name}.log"
    arguments = (task, folder, resume, number, moment, count, log)
    process = processes.Process(target=run_with_fault, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, log.read_text()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("moment", "count"), [pytest.param(*c, marks=() if c in SHORT else pytest.mark.faults) for c in ALL]
)
def test_resumed_after_a_signal_it_ends_in_the_same_bits(task, whole, processes, tmp_path, number, moment, count):
    folder = tmp_path / "run"
    code, log = interrupted(processes, task, folder, number, moment, count)
    assert code == expected_exit(number), log
    saved = folder / "checkpoint.pth"
    if number != signal.SIGKILL:
        assert "Continue with: python tool.py --resume settings" in log
        done = torch.load(saved, weights_only=True)["step" if task.name != "segmentation" else "meta"]
        done = done["iter"] if isinstance(done, dict) else done
        assert f"stopped after step {done}," in log
        if moment == "step":
            assert done == count  # the step that was under way is done and kept
    task.train(folder, resume=saved.is_file())
    same_results(folder, whole)
    assert not list(folder.glob(".*.part"))


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_resumed_after_one_signal_after_another_it_ends_in_the_same_bits(task, whole, processes, tmp_path, number):
    folder = tmp_path / "run"
    for moment in ("step", "save", "evaluation"):
        interrupted(processes, task, folder, number, moment, 2, resume=(folder / "checkpoint.pth").is_file())
    if not (folder / "model.safetensors").is_file():
        task.train(folder, resume=True)
    same_results(folder, whole)


def test_a_finished_run_says_what_it_did(task, whole):
    steps = STEPS[task.name]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "val" and r["name"] in ("top1", "box_ap", "miou")][-1] == steps
    names = {path.name for path in whole.iterdir()}
    assert {"model.safetensors", "best.safetensors", "checkpoint.pth", "metrics.json", "metrics.jsonl"} <= names
    assert {"run.json", "tensorboard"} <= names
