"""What a run leaves beside its weights: metrics.jsonl, TensorBoard events, run.json, metrics.json."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..utils.files import make_folder, write_json, write_text

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "detectron2",
    "sal-detectron2",
    "onedl-mmsegmentation",
    "onedl-mmengine",
    "numpy",
)


class MetricsLog:
    """Appends (step, epoch, split, name, value) rows to ``metrics.jsonl`` and the same values to TensorBoard.

    Only the main process should hold one. ``resume_step`` drops rows past that step, written by a run that stopped
    after its last checkpoint, so that a resumed run leaves one row per step.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = make_folder(folder)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            rows = read_metrics(path) if resume_step is not None else []
            kept = [row for row in rows if resume_step is not None and row["step"] <= resume_step]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, epoch: float | None, split: str, values: dict[str, float]) -> None:
        """One row per value. ``split`` is train or val."""
        numbers = {name: float(value) for name, value in values.items()}
        place = {"step": step, "epoch": epoch, "split": split}
        rows = [{**place, "name": name, "value": value} for name, value in numbers.items()]
        # In one piece, so that a run that dies leaves all values of a step or none.
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
        for name, value in numbers.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def sync(self) -> None:
        """Waits until all rows are on the disk, as a checkpoint of their step must be."""
        os.fsync(self._file.fileno())

    def values(self, split: str, name: str) -> list[float]:
        """All that was written of one figure, this run's earlier parts included."""
        return [row["value"] for row in self._rows() if (row["split"], row["name"]) == (split, name)]

    def has(self, split: str, step: int) -> bool:
        """Whether a step has a row of ``split``."""
        return any((row["split"], row["step"]) == (split, step) for row in self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; what a crash left of a step, of which a line is cut short, is dropped."""
    rows: list[dict[str, Any]] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            found = re.match(r'\{"step": (\d+), "epoch": [^,]*, "split": "(\w+)"', line)
            torn = (int(found[1]), found[2]) if found else None
            return [row for row in rows if (row["step"], row["split"]) != torn]
    return rows


def write_provenance(folder: str | Path, config: Any, seed: int | None, protocol: dict[str, Any]) -> None:
    """Writes run.json: the resolved config, seed, data protocol, versions, git commit, command and machine."""
    write_json(
        Path(folder) / "run.json",
        {
            "command": sys.argv,
            "config": config,
            "seed": seed,
            "data_protocol": protocol,
            "git_commit": git_commit(),
            "versions": versions(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        },
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` when tracked files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
