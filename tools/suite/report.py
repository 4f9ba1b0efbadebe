"""report.html, self-contained, and the same table on the terminal and as Markdown."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from backbones.utils.files import atomic_path, write_text

from . import figures
from .plan import Data, Job
from .results import COLUMNS, value


def print_table(results: dict[str, Any]) -> None:
    """The comparison on the terminal."""
    table = Table(title=f"size {results['settings']['size']}, {results['device']}")
    table.add_column("backbone")
    for _, _, heading, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for family, cells in _rows(results):
        table.add_row(family, *(f"[bold]{text}[/]" if best else text for text, best in cells))
    table.add_row("to beat", *_baselines(results), style="dim")
    Console(width=max(150, Console().width)).print(table)


def write_report(results: dict[str, Any], jobs: list[Job], data: Data, out: Path) -> Path:
    """Writes ``out``/report.html with every picture inside, table.md and pictures/; returns the report's path."""
    by_task = {
        task: [job for job in jobs if job.task == task] for task in ("classification", "detection", "segmentation")
    }
    pictures = [
        ("Learning curves", "Training loss and validation figures by epoch.", figures.curves(jobs)),
        (
            "Classification",
            "Validation images under their true class.",
            figures.classification_examples(by_task["classification"], data),
        ),
        (
            "Detection",
            "Truth and predictions with a score of at least 0.3.",
            figures.detection_examples(by_task["detection"], data),
        ),
        (
            "Segmentation",
            "Truth (black: unlabelled) and predictions.",
            figures.segmentation_examples(by_task["segmentation"], data),
        ),
    ]
    learned = figures.learned_functions(by_task["classification"])
    if learned:
        note = "Functions of the pretrained classifiers: KArAt's in place of softmax, GR-KAN's in place of GELU."
        pictures.append(("Learned functions", note, learned))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("report.html.j2").render(
        families=list(results["backbones"]),
        size=results["settings"]["size"],
        headings=[heading for _, _, heading, _ in COLUMNS],
        rows=_rows(results),
        baselines=_baselines(results),
        pictures=[(title, note, base64.b64encode(png).decode()) for title, note, png in pictures],
        machine=f"{results['device']}, torch {results['torch']}.",
        settings=json.dumps(results["settings"]),
        commit=results["git_commit"],
    )
    write_text(out / "report.html", text)
    write_text(out / "table.md", _markdown(results))
    for title, _, png in pictures:
        with atomic_path(out / "pictures" / f"{title.lower().replace(' ', '_')}.png") as temporary:
            temporary.write_bytes(png)
    return out / "report.html"


def _markdown(results: dict[str, Any]) -> str:
    headings = ["backbone", *(heading for _, _, heading, _ in COLUMNS)]
    lines = [headings, ["---", *["---:"] * len(COLUMNS)]]
    lines += [[family, *(f"**{text}**" if best else text for text, best in cells)] for family, cells in _rows(results)]
    lines.append(["to beat", *_baselines(results)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _rows(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """(family, [(text, best of its column)]) in the order of COLUMNS."""
    rows = results["backbones"]
    best = {}
    for task, key, _, more_is_better in COLUMNS:
        numbers = [n for row in rows.values() if (n := value(row, task, key)) is not None]
        if more_is_better is not None and len(rows) > 1 and numbers:
            best[task, key] = max(numbers) if more_is_better else min(numbers)
    return [
        (
            family,
            [
                (_text(n := value(row, task, key)), n is not None and n == best.get((task, key)))
                for task, key, _, _ in COLUMNS
            ],
        )
        for family, row in rows.items()
    ]


def _baselines(results: dict[str, Any]) -> list[str]:
    known = {
        ("classification", "top1"): results["baselines"]["top1_chance"],
        ("segmentation", "miou"): results["baselines"]["miou_most_frequent_class"],
    }
    return [_text(known.get((task, key))) if (task, key) in known else "" for task, key, _, _ in COLUMNS]


def _text(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.0f}" if number >= 100 else f"{number:.2f}" if number >= 1 else f"{number:.3f}"
