"""Where and how figures were measured, and the tables: on the terminal, as Markdown and as JSON."""

import platform
import shlex
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from backbones.training.log import git_commit
from backbones.utils.files import write_json, write_text

Rows = list[dict[str, Any]]


def number(digits: int, scale: float = 1.0, unit: str = "") -> Callable[[Any], str]:
    """A cell for a number; None is n/a."""
    return lambda value: "n/a" if value is None else f"{scale * value:,.{digits}f}{unit}"


# Heading, key of the row, how it is shown.
OPERATOR_COLUMNS = [
    ("operator", "case", str),
    ("shape", "shape", str),
    ("type", "dtype", str),
    ("contestant", "contestant", str),
    ("forward ms", "forward_ms", number(3)),
    ("backward ms", "backward_ms", number(3)),
    ("time / GELU", "ratio", number(2)),
    ("forward, share of copy", "forward_share", number(0, 100, " %")),
    ("backward, share of copy", "backward_share", number(0, 100, " %")),
    ("spread", "step_spread", number(0, 100, " %")),
    ("peak MiB", "peak_mib", number(0)),
]
ATTENTION_COLUMNS = [
    ("attention", "case", str),
    ("BxHxNxD", "shape", str),
    ("type", "dtype", str),
    ("contestant", "contestant", str),
    ("forward ms", "forward_ms", number(2)),
    ("backward ms", "backward_ms", number(2)),
    ("time / SDPA", "ratio", number(2)),
    ("spread", "step_spread", number(0, 100, " %")),
    ("peak MiB", "peak_mib", number(0)),
]
MODEL_COLUMNS = [
    ("backbone", "arch", str),
    ("batch", "batch", str),
    ("type", "dtype", str),
    ("forward img/s", "forward_img_per_s", number(1)),
    ("ratio", "forward_ratio", number(2)),
    ("training img/s", "train_img_per_s", number(1)),
    ("ratio", "train_ratio", number(2)),
    ("spread", "train_spread", number(0, 100, " %")),
    ("peak MiB", "peak_mib", number(0)),
]


def environment(device: torch.device, argv: list[str], seed: int) -> dict[str, Any]:
    """Device, versions, commit, command and seed."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "timm"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions,
        "git_commit": git_commit(),
        "command": shlex.join(["python", "tools/benchmark.py", *argv]),
        "seed": seed,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.processor() or platform.machine()} CPU"


def headline(about: dict[str, Any]) -> str:
    """Device and versions in one line."""
    threads = f", {about['threads']} threads" if about["threads"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return f"{about['device']}{threads}; {versions}"


def print_table(rows: Rows, columns: list, about: dict[str, Any]) -> None:
    """The rows with figures on the terminal, and what kept the others from having any."""
    table = Table(title=headline(about), caption=None)
    for position, (heading, _, _) in enumerate(columns):
        table.add_column(heading, justify="left" if position == 0 else "right")
    for cells in _cells(rows, columns):
        table.add_row(*cells)
    console = Console(width=max(160, Console().width))
    console.print(table)
    for line in _problems(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(rows: Rows, columns: list, about: dict[str, Any], json_path: str | None, markdown_path: str | None) -> None:
    """Writes the files that were asked for."""
    if json_path:
        write_json(json_path, {**about, "rows": rows})
    if markdown_path:
        lines = [
            "| " + " | ".join(heading for heading, _, _ in columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(cells) + " |" for cells in _cells(rows, columns)),
        ]
        notes = [f"- {line}" for line in _problems(rows)]
        parts = [f"{headline(about)}; `{about['command']}`", "\n".join(lines), "\n".join(notes)]
        write_text(markdown_path, "\n\n".join(part for part in parts if part) + "\n")


def _cells(rows: Rows, columns: list) -> list[list[str]]:
    return [[show(row[key]) for _, key, show in columns] for row in rows if not row["problem"]]


def _problems(rows: Rows) -> list[str]:
    """A line per contestant and problem, with the rows it concerns unless they are all of the contestant's."""
    lines: dict[tuple[str, str], list[str]] = {}
    counts: dict[str, int] = {}
    for row in rows:
        name = row.get("arch") or row["contestant"]
        counts[name] = counts.get(name, 0) + 1
        if row["problem"]:
            where = "" if "arch" in row else f"{row['case']} {row['shape']} {row['dtype']}"
            lines.setdefault((name, row["problem"]), []).append(where)
    return [
        f"{name}: {problem}" + ("" if len(where) == counts[name] else f" [{'; '.join(where)}]")
        for (name, problem), where in lines.items()
    ]
