"""The three tasks as the fault tests see them: one way to train each on tiny data, whole or with a fault in it."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("classification", "detection", "segmentation")
MOMENTS = ("step", "save", "evaluation")
# Where a step, a save and an evaluation pass by, as names to patch.
_PLACES = {
    "classification": {"step": "classification.engine.train_step", "evaluation": "classification.engine.evaluate"},
    "detection": {"step": "detection.engine.train_step", "evaluation": "detection.engine.evaluate"},
    "segmentation": {
        "step": "segmentation.backbone.CheckedEncoderDecoder.loss",
        "evaluation": "mmengine.runner.loops.ValLoop.run",
    },
}
SAVE = "backbones.training.state.seal"  # when the checkpoint lies complete under its temporary name


@dataclass(frozen=True)
class Task:
    """A task and its data."""

    name: str
    data: Path  # the folder with all three

    def train(self, folder: Path, changes: dict[str, Any] | None = None, resume: bool = False) -> dict[str, Any]:
        """Trains for two evaluations, with checkpoints between them; ``changes`` by the names of settings."""
        return getattr(self, f"_{self.name}")(folder, changes or {}, resume)

    def _classification(self, folder: Path, changes: dict[str, Any], resume: bool) -> dict[str, Any]:
        from classification.config import load_recipe
        from classification.engine import train

        settings = {
            **{"data.root": self.data / "classification", "output": folder, "data.workers": 0},
            **{"model.arch": "karkat_nano_patch8_64", "model.depth": 2, "model.img_size": 32, "model.drop_path": 0.2},
            **{"train.epochs": 2, "train.warmup_epochs": 0, "train.batch_size": 16, "train.log_every": 1},
            **{"augment.mixup": 0.5, "train.ema_decay": 0.9, "train.save_steps": 4, **changes},
        }
        words = [f"{name}={value}" for name, value in settings.items()]
        return train(load_recipe(ROOT / "classification/recipes/nano.yaml", words), resume)

    def _detection(self, folder: Path, changes: dict[str, Any], resume: bool) -> dict[str, Any]:
        from detection.config import load_config
        from detection.engine import train

        data = self.data / "detection"
        settings = {
            **{"DATASETS.TRAIN_JSON": data / "annotations/train.json", "DATASETS.TRAIN_IMAGES": data / "train"},
            **{"DATASETS.TEST_JSON": data / "annotations/val.json", "DATASETS.TEST_IMAGES": data / "val"},
            **{"OUTPUT_DIR": folder, "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0, "INPUT.IMAGE_SIZE": 64},
            **{"MODEL.VIT.depth": 2, "MODEL.VIT.window_size": 4, "MODEL.VIT.global_blocks": [1]},
            **{"MODEL.VIT.drop_path": 0.2, "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 20, "MODEL.RPN.POST_NMS_TOPK_TRAIN": 10},
            **{"MODEL.RPN.PRE_NMS_TOPK_TEST": 20, "MODEL.RPN.POST_NMS_TOPK_TEST": 10, "SOLVER.IMS_PER_BATCH": 4},
            **{"SOLVER.EPOCHS": 1.0, "SOLVER.LOG_STEPS": 2, "TEST.EVAL_EPOCHS": 0.5, "SOLVER.CHECKPOINT_STEPS": 2},
            **changes,
        }
        words = [str(word) for pair in settings.items() for word in pair]
        return train(load_config(ROOT / "detection/vitdet_karkat.yaml", "nano", words), resume)

    def _segmentation(self, folder: Path, changes: dict[str, Any], resume: bool) -> dict[str, Any]:
        from segmentation.config import CONFIG_FOLDER, load_config
        from segmentation.engine import train

        settings = {
            **{"data_root": str(self.data / "segmentation"), "crop_size": 64, "schedule.max_iters": 6},
            **{"schedule.val_epochs": 0.25, "train_dataloader.batch_size": 2, "val_dataloader.dataset.indices": 2},
            **{"model.backbone.drop_path": 0.2, "default_hooks.checkpoint.interval": 2, "log_interval": 1, **changes},
        }
        cfg = load_config(CONFIG_FOLDER / "upernet_karkat.py", "nano", settings, folder)
        cfg.launcher = "pytorch" if "RANK" in os.environ else "none"
        return train(cfg, resume)

    def data_copy(self, folder: Path) -> "Task":
        """The same with data of its own, which a test may damage."""
        import shutil

        shutil.copytree(self.data / self.name, folder / self.name)
        return Task(self.name, folder)


def run_rank(
    task: Task, folder: Path, resume: bool, rank: int, port: int, fault: tuple[int, int] | None, log: Path
) -> None:
    """Trains as one of two processes, which gets a signal at a step: ``fault`` is (number, step); then exits."""
    from backbones.utils.errors import run_main

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _quietly(log)

    def train(_words: list[str]) -> None:
        if task.name == "detection":
            from train_net import join_torchrun

            join_torchrun()
        place, (number, count) = _PLACES[task.name]["step"], fault or (0, 0)
        with mock.patch(place, _signalling(_found(place), number, count)):
            task.train(folder, resume=resume)

    run_main(train)


def _quietly(log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["tool.py", "settings"]
    torch.set_num_threads(1)


def run_with_fault(task: Task, folder: Path, resume: bool, number: int, moment: str, count: int, log: Path) -> None:
    """Trains in this process, which gets the signal ``number`` at the ``count``-th time of a moment; then exits."""
    _quietly(log)
    place = SAVE if moment == "save" else _PLACES[task.name][moment]
    with mock.patch(place, _signalling(_found(place), number, count)):
        task.train(folder, resume=resume)


def _found(place: str) -> Callable[..., Any]:
    target, name = mock._get_target(place)
    return getattr(target(), name)


def _signalling(function: Callable[..., Any], number: int, count: int) -> Callable[..., Any]:
    calls = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    return called


def same_results(folder: Path, other: Path) -> None:
    """Asserts that two runs ended in the same weights and wrote the same log, times apart."""
    ours, theirs = (load_file(f / "model.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, other)]
    rows = [[row for row in part if not row["name"].endswith("per_s")] for part in rows]
    assert rows[0] == rows[1]


def expected_exit(number: int) -> int:
    return -number if number == signal.SIGKILL else 128 + number
