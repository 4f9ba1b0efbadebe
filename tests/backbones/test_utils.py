"""What the tasks share: how commands end, files written whole, logs across a resume, counters, measurements."""

import errno
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from backbones.training.log import MetricsLog, read_metrics
from backbones.training.measure import count_gflops, count_parameters, images_per_second
from backbones.training.rng import random_state, sample_seed, set_random_state
from backbones.training.skips import SkipCounter
from backbones.utils.documents import read_json
from backbones.utils.errors import UserError, describe, run_main, suggest
from backbones.utils.files import atomic_path, save_weights, write_json


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the grid is 3"), 2, "error: the grid is 3\n"),
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), 2, "no disk space left while writing big.bin"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "no permission for /root/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("oops"), 1, "a defect of this program; run again with --debug"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_commands_end_with_a_message_and_a_code(monkeypatch, capsys, error, code, message, debug):
    def main(argv):
        assert argv == ["x"]
        raise error

    monkeypatch.setattr(sys, "argv", ["tool", "x", *(["--debug"] if debug else [])])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    err = capsys.readouterr().err
    assert ended.value.code == code
    assert message in err
    assert ("Traceback" in err) == (debug and code != 130)


def test_nearest_name_is_suggested():
    assert suggest("karrat", ["vit", "karat"]) == " Did you mean 'karat'?"
    assert suggest("zzz", ["vit", "karat"]) == ""


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path, "results") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="a file is in the way"):
        write_json(path / "inner" / "x.json", 1)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results: .* is not valid JSON"):
        read_json(path, "results")


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_leaves_nothing(full_disk):
    big = {"w": torch.ones(100_000)}

    def training_state(path):
        with atomic_path(path) as temporary:
            torch.save(big, temporary)

    for write in (training_state, lambda path: save_weights(path, big), lambda path: write_json(path, "x" * 100_000)):
        with pytest.raises(OSError, match="No space left") as caught:
            write(full_disk / "file")
        assert describe(caught.value).startswith(f"no disk space left while writing {full_disk / 'file'}.")
        assert not list(full_disk.iterdir())


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, step / 2, "train", {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "ep')  # cut short by a crash
    log = MetricsLog(tmp_path, resume_step=2)
    log.write(3, 1.5, "train", {"loss": 0.25})
    log.close()
    assert [(row["step"], row["value"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 0.5),
        (3, 0.25),
    ]
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_skips_are_distinct_images_and_fail_past_one_percent(capsys):
    skips = SkipCounter(total=300)
    for index in (5, 5, 9, 11):
        skips.skip(index, f"{index}.jpg", OSError("truncated"))
    assert skips.count == 3
    assert capsys.readouterr().err.count("5.jpg") == 1
    with pytest.raises(ValueError, match=r"4 of 300 training images are unreadable, more than 1%.*13.jpg"):
        skips.skip(13, "13.jpg", OSError("truncated"))


def test_random_state_survives_a_file_of_tensors(tmp_path):
    torch.save(random_state(), tmp_path / "state.pt")
    expected = torch.rand(3)
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.rand(3), expected)


def test_a_samples_randomness_is_its_own_and_leaves_the_rest_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    set_random_state(state := random_state())
    expected = draw()
    set_random_state(state)
    with sample_seed(1, 2):
        first = draw()
    assert draw() == expected
    with sample_seed(1, 2):
        assert draw() == first
    with sample_seed(1, 3):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_measurements_of_a_known_layer():
    layer = nn.Linear(64, 32)
    x = torch.ones(10, 64)
    assert count_parameters(layer) == 64 * 32 + 32
    assert count_gflops(lambda: layer(x)) == pytest.approx(10 * 64 * 32 / 1e9)
    assert images_per_second(lambda: layer(x), 10, seconds=0.01) > 10


def test_metadata_of_weights_is_json(tmp_path):
    from backbones.checkpoint import read_metadata

    save_weights(tmp_path / "w.safetensors", {"w": torch.ones(2)}, {"classes": ["a"], "n": 3})
    found = read_metadata(tmp_path / "w.safetensors")
    assert (found["classes"], found["n"]) == (["a"], 3)
    assert len(str(found["sha256"])) == 64
    assert json.dumps(read_metadata(tmp_path / "w.safetensors"))
