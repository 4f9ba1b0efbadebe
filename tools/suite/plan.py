"""Which runs a comparison consists of: for each backbone pretrain, then detect and segment from that checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backbones.models.presets import FAMILIES, preset_name
from backbones.utils.errors import UserError, check_keys, suggest

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("classification", "detection", "segmentation")
_STATES = {"classification": "checkpoint.pt", "detection": "checkpoint.pth", "segmentation": "last_checkpoint"}
_DATA_KEYS = {
    "classification": ("root",),
    "detection": ("train_json", "train_images", "test_json", "test_images"),
    "segmentation": ("data_root",),
}
SAMPLE = {"full": {"scenes": (400, 80), "objects": (240, 40)}, "quick": {"scenes": (24, 8), "objects": (16, 8)}}


@dataclass(frozen=True)
class Data:
    """Where the three data sets are, and overrides of each task's settings, in each framework's own form."""

    classification: dict[str, str]
    detection: dict[str, str]
    segmentation: dict[str, str]
    overrides: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {task: getattr(self, task) for task in TASKS} | {"overrides": self.overrides}


@dataclass(frozen=True)
class Job:
    """One training run: a command that a user could type, and the folder it writes."""

    family: str
    task: str
    folder: Path
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.family} {self.task}"

    def is_done(self) -> bool:
        return (self.folder / "metrics.json").is_file() and (self.folder / "model.safetensors").is_file()

    def resumable(self) -> bool:
        return (self.folder / _STATES[self.task]).is_file()


def check_families(text: str) -> list[str]:
    """``vit,karat`` as a list; an unknown or repeated name raises UserError."""
    families = [name.strip() for name in text.split(",") if name.strip()]
    for name in families:
        if name not in FAMILIES:
            raise UserError(f"unknown backbone {name!r}; allowed: {', '.join(FAMILIES)}.{suggest(name, FAMILIES)}")
    if not families or len(set(families)) < len(families):
        raise UserError(f"--backbones is {text!r}; give each of {', '.join(FAMILIES)} at most once, and at least one.")
    return families


def check_size(size: str, families: Sequence[str]) -> str:
    """``size``, which every family must have; UserError names the first that lacks it, and its sizes."""
    for family in families:
        preset_name(family, size)
    return size


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
    )


def read_data(path: str) -> Data:
    """Reads the data file: per task its paths, and an optional ``overrides`` list of that task's own settings."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"--data {path} does not exist. Give 'sample' or a YAML file with the paths of your data."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--data {path} must hold the keys {', '.join(TASKS)}.")
    check_keys(path, values, TASKS)
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
    return Data(paths["classification"], paths["detection"], paths["segmentation"], overrides)


def make_jobs(families: Sequence[str], size: str, data: Data, out: Path, quick: bool) -> list[Job]:
    """All runs, pretraining first; ``quick`` cuts the schedules to an epoch."""
    return [job for task in TASKS for family in families for job in [_job(family, task, size, data, out, quick)]]


def _job(family: str, task: str, size: str, data: Data, out: Path, quick: bool) -> Job:
    folder = out / family / task
    weights = out / family / "classification" / "model.safetensors"
    extra = data.overrides.get(task, [])
    name = "softmax" if family == "vit" else family
    pyramid = "fpn" if FAMILIES[family][0] == "swin" else "vitdet"
    if task == "classification":
        recipe = "nano" if size == "nano" else "deit"
        words = ["--config", f"classification/recipes/{recipe}.yaml", f"model.arch={preset_name(family, size)}"]
        words += [f"data.root={data.classification['root']}", f"output={folder}"]
        words += ["train.epochs=2", "train.warmup_epochs=1", "train.batch_size=32"] if quick else []
        return _make(family, task, folder, "pretrain_cls.py", [*words, *extra])
    if task == "detection":
        words = ["--config", f"detection/{pyramid}_{name}.yaml", "--size", size, "--output", str(folder)]
        words += [w for key, value in data.detection.items() for w in (f"DATASETS.{key.upper()}", value)]
        words += ["MODEL.VIT.weights", str(weights)]
        words += ["SOLVER.EPOCHS", "1.0"] if quick else []
        return _make(family, task, folder, "train_net.py", [*words, *extra])
    words = [f"segmentation/configs/upernet_{name}.py", "--size", size, "--work-dir", str(folder)]
    words += ["--cfg-options", f"data_root={data.segmentation['data_root']}", f"model.backbone.weights={weights}"]
    words += ["schedule.epochs=1", "schedule.val_epochs=1"] if quick else []
    return _make(family, task, folder, "train_seg.py", [*words, *extra])


def _make(family: str, task: str, folder: Path, tool: str, words: list[str]) -> Job:
    return Job(family, task, folder, (sys.executable, str(ROOT / "tools" / tool), *words))
