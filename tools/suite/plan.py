"""Which runs a comparison consists of: for each row and seed pretrain, then detect and segment from that checkpoint."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backbones.models.presets import FAMILIES, preset_name
from backbones.training.folder import CHECKPOINT, METRICS, WEIGHTS
from backbones.utils.documents import read_json, read_yaml
from backbones.utils.errors import UserError, check_keys

from .rows import TASKS, Row

ROOT = Path(__file__).resolve().parents[2]
_DATA_KEYS = {
    "classification": ("root",),
    "detection": ("train_json", "train_images", "test_json", "test_images"),
    "segmentation": ("data_root",),
}
_GROUPS = "groups"
SAMPLE = {"full": {"scenes": (400, 80), "objects": (120, 40)}, "quick": {"scenes": (24, 8), "objects": (16, 8)}}


@dataclass(frozen=True)
class Data:
    """Where the three data sets are, and overrides of each task's settings, in each framework's own form.

    Args:
        groups: name to classes whose figures get columns of their own; a task has those of them that it knows.
    """

    classification: dict[str, str]
    detection: dict[str, str]
    segmentation: dict[str, str]
    overrides: dict[str, list[str]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {task: getattr(self, task) for task in TASKS} | {"overrides": self.overrides, _GROUPS: self.groups}


@dataclass(frozen=True)
class Job:
    """One training run: a command that a user could type, and the folder it writes."""

    row: str
    task: str
    seed: int
    pretraining: str  # the row whose classifier it starts from
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row} {self.task}, seed {self.seed}"

    def is_done(self) -> bool:
        return (self.folder / METRICS).is_file() and (self.folder / WEIGHTS).is_file()

    def resumable(self) -> bool:
        return (self.folder / CHECKPOINT).is_file()

    def starts_from(self, other: "Job") -> bool:
        """Whether ``other`` is the pretraining that this run needs."""
        return (
            self.task != "classification"
            and other.task == "classification"
            and (other.row, other.seed) == (self.pretraining, self.seed)
        )


def check_size(size: str, rows: Sequence[Row]) -> str:
    """``size``, which every row must have, with settings that fit it; UserError names the first that does not."""
    for row in rows:
        preset_name(row.family, size)
        row.backbone(size)
    return size


def check_tasks(text: str) -> tuple[str, ...]:
    """``classification,detection`` as a tuple; classification is always among them, the others start from it."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    check_keys("--tasks", names, TASKS)
    if not names:
        raise UserError(f"--tasks is {text!r}; give one or more of {', '.join(TASKS)}.")
    return tuple(task for task in TASKS if task in names or task == "classification")


def sample_data(folder: Path) -> Data:
    """The three layouts that make_sample_data.py writes into ``folder``."""
    detection = folder / "detection"
    return Data(
        {"root": str(folder / "classification")},
        {
            "train_json": str(detection / "annotations" / "train.json"),
            "train_images": str(detection / "train"),
            "test_json": str(detection / "annotations" / "val.json"),
            "test_images": str(detection / "val"),
        },
        {"data_root": str(folder / "segmentation")},
        groups=read_json(folder / "sample_data.json", "sample data marker")["groups"],
    )


def read_data(path: str) -> Data:
    """Reads the data file: per task its paths, and an optional ``overrides`` list of that task's own settings."""
    values = read_yaml(path, "--data")
    if not isinstance(values, dict):
        raise UserError(f"--data {path} must hold the keys {', '.join(TASKS)}.")
    check_keys(path, values, (*TASKS, _GROUPS))
    paths: dict[str, dict[str, str]] = {}
    overrides: dict[str, list[str]] = {}
    for task in TASKS:
        section = values.get(task)
        if not isinstance(section, dict):
            raise UserError(f"{path} needs the section {task} with {', '.join(_DATA_KEYS[task])}.")
        check_keys(f"{path}: {task}", section, (*_DATA_KEYS[task], "overrides"))
        missing = [key for key in _DATA_KEYS[task] if not section.get(key)]
        if missing:
            raise UserError(f"{path}: {task}.{missing[0]} is missing.")
        paths[task] = {key: str(Path(section[key]).resolve()) for key in _DATA_KEYS[task]}
        for key, value in paths[task].items():
            if not Path(value).exists():
                raise UserError(f"{path}: {task}.{key} {value} does not exist. Check the path.")
        overrides[task] = [str(item) for item in section.get("overrides") or []]
    return Data(*(paths[task] for task in TASKS), overrides, _check_groups(path, values.get(_GROUPS) or {}))


def _check_groups(path: str, groups: Any) -> dict[str, list[str]]:
    """Groups of classes with columns of their own, as they stand in the data file."""
    valid = isinstance(groups, dict) and all(
        isinstance(name, str) and isinstance(classes, list) and classes for name, classes in groups.items()
    )
    if not valid:
        raise UserError(
            f"{path}: groups is {groups!r}; it must map names to lists of classes, as in animals: [cat, dog]."
        )
    return {name: [str(c) for c in classes] for name, classes in groups.items()}


def make_jobs(
    rows: Sequence[Row],
    size: str,
    data: Data,
    out: Path,
    seeds: int = 1,
    tasks: Sequence[str] = TASKS,
    quick: bool = False,
) -> list[Job]:
    """All runs, seed by seed, pretraining first; ``quick`` cuts the schedules to an epoch.

    A row that starts from another row's pretraining has no classification of its own.
    """
    return [
        _job(row, task, seed, size, data, out, quick)
        for seed in range(seeds)
        for task in tasks
        for row in rows
        if task != "classification" or row.pretraining == row.name
    ]


def job_folder(out: Path, row: str, seed: int, task: str) -> Path:
    return out / row / f"seed{seed}" / task


def _job(row: Row, task: str, seed: int, size: str, data: Data, out: Path, quick: bool) -> Job:
    folder = job_folder(out, row.name, seed, task)
    weights = job_folder(out, row.pretraining, seed, "classification") / WEIGHTS
    extra = [*data.overrides.get(task, []), *row.task_settings.get(task, [])]
    name = "softmax" if row.family == "vit" else row.family
    if task == "classification":
        recipe = "nano" if size == "nano" else "deit"
        words = ["--config", f"classification/recipes/{recipe}.yaml", f"model.arch={preset_name(row.family, size)}"]
        words += [f"data.root={data.classification['root']}", f"output={folder}", f"train.seed={seed}"]
        words += ["train.epochs=2", "train.warmup_epochs=1", "train.batch_size=32"] if quick else []
        words += [f"model.{key}={_yaml(value)}" for key, value in row.settings.items()]
        tool = "pretrain_cls.py"
    elif task == "detection":
        pyramid = "fpn" if FAMILIES[row.family][0] == "swin" else "vitdet"
        words = ["--config", f"detection/{pyramid}_{name}.yaml", "--size", size, "--output", str(folder)]
        words += [w for key, value in data.detection.items() for w in (f"DATASETS.{key.upper()}", value)]
        words += ["SEED", str(seed)]
        words += ["SOLVER.EPOCHS", "1.0"] if quick else []
        words += [w for key, value in row.settings.items() for w in (f"MODEL.VIT.{key}", str(value))]
        words += ["MODEL.VIT.weights", str(weights)]
        tool = "train_net.py"
    else:
        words = [f"segmentation/configs/upernet_{name}.py", "--size", size, "--work-dir", str(folder), "--cfg-options"]
        words += [f"data_root={data.segmentation['data_root']}", f"randomness.seed={seed}"]
        words += ["schedule.epochs=1", "schedule.val_epochs=1"] if quick else []
        words += [f"model.backbone.{key}={_bare(value)}" for key, value in row.settings.items()]
        words += [f"model.backbone.weights={weights}"]
        tool = "train_seg.py"
    command = (sys.executable, str(ROOT / "tools" / tool), *words, *extra)
    return Job(row.name, task, seed, row.pretraining, folder, command)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _bare(value: Any) -> str:
    """A value as mmengine's --cfg-options reads it: lists without blanks."""
    return str(value).replace(" ", "")


def check_settings(jobs: Sequence[Job], where: Mapping[str, str] | None = None) -> None:
    """Reads each run's settings as the run itself will.

    Args:
        where: by row, what messages begin with: where it comes from.

    Raises:
        UserError: naming row, task and setting, before anything runs.
    """
    from mmengine.config import DictAction

    from classification.config import load_recipe
    from detection.config import load_config as load_detection
    from segmentation.config import load_config as load_segmentation

    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    for job in jobs:
        words = list(job.command[2:])
        try:
            if job.task == "classification":
                load_recipe(ROOT / words[1], words[2:])
            elif job.task == "detection":
                load_detection(ROOT / words[1], words[3], words[6:])
            else:
                options = parser.parse_args(words[5:]).cfg_options
                load_segmentation(ROOT / words[0], words[2], options, words[4])
        except UserError as error:
            raise UserError(f"{(where or {}).get(job.row, '')}row {job.row!r}, {job.task}: {error}") from None
