"""The figures of a comparison: what each run wrote, over seeds, with what is best and what the controls reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from backbones import create_backbone
from backbones.training.log import git_commit
from backbones.training.measure import count_gflops, count_parameters
from backbones.utils.documents import read_json
from backbones.utils.files import write_json
from suite.plan import Data, Job
from suite.rows import Row

from .statistics import best_of, judge_control, summarize


@dataclass(frozen=True)
class Column:
    """A figure of the table.

    Args:
        task: whose metrics.json holds it.
        key: its name there.
        heading: with its unit.
        main: the figure that curves and sweeps show.
        per_class: key of the figures by class, whose mean over a group's classes is the group's column.
    """

    task: str
    key: str
    heading: str
    main: bool = False
    per_class: str | None = None


COLUMNS = (
    Column("classification", "top1", "top-1 %", True, "top1_per_class"),
    Column("detection", "box_ap", "box AP"),
    Column("detection", "box_ap50", "box AP50", True, "box_ap50_per_class"),
    Column("detection", "mask_ap", "mask AP"),
    Column("segmentation", "miou", "mIoU %", True, "iou_per_class"),
)
PARTS = ("attention", "ffn")


def collect(
    rows: Sequence[Row],
    jobs: Sequence[Job],
    failures: Mapping[str, str],
    data: Data,
    settings: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Gathers all figures into ``out``/results.json and returns them; the same runs give the same file.

    Args:
        failures: by name of a job, how its log ended.
    """
    done = [job for job in jobs if job.is_done()]
    metrics = {job: read_json(job.folder / "metrics.json", "metrics") for job in done}
    columns = [c for column in COLUMNS if column.task in settings["tasks"] for c in _with_groups(column, metrics, data)]
    table = {row.name: _row(row, jobs, metrics, failures, columns, settings["size"]) for row in rows}
    best, controls = {}, {}
    for column in columns:
        name = column["name"]
        compared = _figures(table, name, None)
        found = best_of(_figures(table, name), column["better"])
        if found:
            best[name] = found
        first = best_of(compared, column["better"])
        if first:
            judged = {
                part: judge_control(compared[first["row"]], _figures(table, name, part), column["better"])
                for part in PARTS
            }
            controls[name] = {part: value for part, value in judged.items() if value}
    results = {
        "settings": settings,
        "git_commit": git_commit(),
        "commits": list(dict.fromkeys(read_json(job.folder / "run.json", "run").get("git_commit") for job in done)),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "columns": [{key: value for key, value in column.items() if key != "source"} for column in columns],
        "rows": table,
        "best": best,
        "controls": controls,
        "baselines": _baselines(metrics, columns),
    }
    write_json(out / "results.json", results)
    return results


def _with_groups(column: Column, metrics: Mapping[Job, Any], data: Data) -> list[dict[str, Any]]:
    """The column, and one for each group of classes that its task knows."""
    name = f"{column.task}.{column.key}"
    base = {
        "name": name,
        "task": column.task,
        "heading": column.heading,
        "group": None,
        "better": "max",
        "main": column.main,
    }
    columns = [base | {"source": (column.key, None)}]
    known = {c for job, m in metrics.items() if job.task == column.task for c in m.get(column.per_class or "", {})}
    for group, classes in data.groups.items():
        if known.intersection(classes):
            own = {"name": f"{name}@{group}", "heading": f"{column.heading}, {group}", "group": group, "main": False}
            columns.append(base | own | {"source": (column.per_class, classes)})
    return columns


def _row(
    row: Row,
    jobs: Sequence[Job],
    metrics: Mapping[Job, Any],
    failures: Mapping[str, str],
    columns: Sequence[dict[str, Any]],
    size: str,
) -> dict[str, Any]:
    own = [job for job in jobs if job.row == row.name]
    figures = {}
    for column in columns:
        found = {
            str(job.seed): value
            for job in own
            if job.task == column["task"] and job in metrics
            if (value := _value(metrics[job], *column["source"])) is not None
        }
        if found:
            figures[column["name"]] = summarize(found)
    failed: dict[str, dict[str, str]] = {}
    for job in own:
        if job.name in failures:
            failed.setdefault(job.task, {})[str(job.seed)] = failures[job.name]
    return row.to_dict() | _size(row, size) | {"figures": figures, "failures": failed}


def _value(metrics: dict[str, Any], key: str, classes: Sequence[str] | None) -> float | None:
    value = metrics.get(key)
    if classes is None:
        return None if value is None else float(value)
    values = [value[c] for c in classes if value is not None and value.get(c) is not None]
    return fmean(values) if values else None


def _figures(table: Mapping[str, Any], column: str, *control: str | None) -> dict[str, Any]:
    """Figures by row: of all rows, or of those whose ``control`` is the one given."""
    return {
        name: row["figures"][column]
        for name, row in table.items()
        if column in row["figures"] and (not control or row["control"] == control[0])
    }


def _size(row: Row, size: str) -> dict[str, float]:
    network = create_backbone(row.backbone(size), num_classes=10, weights=None)
    image = torch.zeros(1, network.config.in_chans, *network.config.img_size)
    return {"parameters": count_parameters(network), "gflops": count_gflops(lambda: network(image))}


def _baselines(metrics: Mapping[Job, Any], columns: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What guessing reaches: one of all classes, and the most frequent class of every pixel."""
    baselines = {}
    for job, found in metrics.items():
        if job.task == "classification":
            chance = 100 / len(found["top1_per_class"])
            baselines |= {c["name"]: chance for c in columns if c["task"] == "classification" and not c["group"]}
        if job.task == "segmentation" and found.get("miou_most_frequent_class") is not None:
            baselines["segmentation.miou"] = found["miou_most_frequent_class"]
    return baselines
