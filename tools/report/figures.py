"""Curves of the runs with bands over seeds, and plots of what was swept."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from backbones.training.log import read_metrics

from .drawing import file_name, legend_below, line_style, literal, png

# Task: the validation figure by epoch, in metrics.jsonl and as a label.
VALIDATION = {
    "classification": ("top1", "top-1 %"),
    "detection": ("box_ap50", "box AP50"),
    "segmentation": ("miou", "mIoU %"),
}
MOST_BANDS = 12  # with more rows bands only hide each other
_SIZE = (4.2, 2.9)  # inches: 85 CSS pixels an inch on a phone, so that 9 points stay legible
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A picture as PNG bytes, the name of its file without suffix, and what it shows."""

    name: str
    title: str
    picture: bytes


def curves(jobs: list[Any], task: str) -> list[Plot]:
    """Training loss and validation figure of a task by epoch; none where no run logged anything.

    A row's line is the mean over its finished seeds, the band their smallest and largest value (up to MOST_BANDS rows);
    an unfinished run is a thin dotted line.

    Args:
        jobs: all runs, of which those of ``task`` are drawn.
    """
    rows = list(dict.fromkeys(job.row for job in jobs))
    metric, label = VALIDATION[task]
    runs = []
    for job in jobs:
        path = job.folder / "metrics.jsonl"
        if job.task == task and path.is_file():
            runs.append((job.row, job.is_done(), read_metrics(path)))
    plots = []
    for split, name, what in (("train", "loss", "training loss"), ("val", metric, f"validation {label}")):
        found = [(row, done, points) for row, done, log in runs if (points := _points(log, split, name))]
        if found:
            picture = _draw_curves(found, rows, what, marked=split == "val")
            plots.append(Plot(f"{task}_{'loss' if split == 'train' else 'validation'}", f"{task}: {what}", picture))
    return plots


def mean_and_band(seeds: list[Curve]) -> list[tuple[float, float, float, float]]:
    """(epoch, mean, smallest, largest) at the epochs where every curve has a value."""
    values = [dict(curve) for curve in seeds]
    shared = sorted(set.intersection(*(set(curve) for curve in values)))
    rows = [(epoch, [curve[epoch] for curve in values]) for epoch in shared]
    return [(epoch, float(np.mean(row)), min(row), max(row)) for epoch, row in rows]


def sweeps(results: dict[str, Any]) -> list[Plot]:
    """Each main figure, and each of the relations, against the settings that a variant sweeps; [] without a sweep."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"].values():
        if row["sweep"]:
            variants.setdefault(row["variant"], []).append(row)
    columns = [column for column in results["columns"] if column["main"] or column["group"]]
    plots = []
    for variant, rows in variants.items():
        for column in columns:
            shown = [(row["sweep"], row["figures"][column["name"]]) for row in rows if column["name"] in row["figures"]]
            if shown:
                title = f"{variant}: {column['task']} {column['heading']}"
                name = file_name(f"sweep_{variant}_{column['name']}")
                plots.append(Plot(name, title, _draw_sweep(shown, column)))
    return plots


def setting_text(value: Any) -> str:
    """A setting's value as in YAML: ``true``, ``[12, 8]``, ``gelu``."""
    return value if isinstance(value, str) else json.dumps(value)


def _points(log: Iterable[dict[str, Any]], split: str, name: str) -> Curve:
    return [
        (round(float(entry["epoch"]), 6), entry["value"])
        for entry in log
        if entry["split"] == split
        and entry["name"] == name
        and entry["epoch"] is not None
        and math.isfinite(entry["value"])
    ]


def _draw_curves(found: list[tuple[str, bool, Curve]], rows: list[str], label: str, marked: bool) -> bytes:
    figure, axis = plt.subplots(figsize=_SIZE, layout="constrained")
    mark = {"marker": "o", "markersize": 3} if marked else {}
    handles = {}
    for index, row in enumerate(rows):
        style = line_style(index)
        finished = [points for name, done, points in found if name == row and done]
        band = mean_and_band(finished) if finished else []
        if band:
            epochs, mean, low, high = zip(*band, strict=True)
            handles[row] = axis.plot(epochs, mean, linewidth=1.4, **style, **mark)[0]
            if len(rows) <= MOST_BANDS:
                axis.fill_between(epochs, low, high, color=style["color"], alpha=0.13, linewidth=0)
        for points in (points for name, done, points in found if name == row and not done):
            thin = axis.plot(*zip(*points, strict=True), color=style["color"], linestyle=":", linewidth=0.8)[0]
            handles.setdefault(row, thin)
    axis.set_xlabel("epoch", fontsize=9)
    axis.set_ylabel(literal(label), fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.grid(alpha=0.3)
    legend_below(figure, list(handles.values()), list(handles))
    return png(figure)


def _draw_sweep(shown: list[tuple[dict[str, Any], dict[str, Any]]], column: dict[str, Any]) -> bytes:
    """The first setting along x as a category; a line for each combination of the others."""
    first, *others = list(shown[0][0])
    values = list(dict.fromkeys(setting_text(sweep[first]) for sweep, _ in shown))
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for sweep, figure in shown:
        label = ", ".join(f"{key} = {setting_text(sweep[key])}" for key in others)
        lines.setdefault(label, []).append((values.index(setting_text(sweep[first])), figure))
    picture, axis = plt.subplots(figsize=_SIZE, layout="constrained")
    handles = []
    for index, points in enumerate(lines.values()):
        style = line_style(index)
        aside = 0.1 * (index - (len(lines) - 1) / 2) / max(1, len(lines) / 4)
        points = sorted(points, key=lambda point: point[0])
        x = [place + aside for place, _ in points]
        error = [figure["std"] or 0.0 for _, figure in points]
        mean = [figure["mean"] for _, figure in points]
        handles.append(axis.errorbar(x, mean, error, capsize=3, linewidth=1.4, elinewidth=1, **style)[0])
        for place, (_, figure) in zip(x, points, strict=True):
            seeds = list(figure["by_seed"].values())
            axis.plot([place] * len(seeds), seeds, "o", markersize=3, alpha=0.6, color=style["color"])
    axis.set_xticks(range(len(values)), [literal(value) for value in values])
    axis.set_xlim(-0.4, len(values) - 0.6)
    longest = max(map(len, values))
    axis.tick_params(labelsize=8.5)
    if longest * len(values) > 48:
        axis.tick_params(axis="x", labelrotation=30)
    axis.set_xlabel(literal(first), fontsize=9)
    axis.set_ylabel(literal(column["heading"]), fontsize=9)
    axis.grid(alpha=0.3)
    if others:
        legend_below(picture, handles, list(lines))
    return png(picture)
