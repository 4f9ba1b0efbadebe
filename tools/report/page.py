"""report.html, self-contained, and its table on the terminal and as Markdown."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import rich.table
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from backbones.utils.files import atomic_path, write_text

from .drawing import image_bytes
from .examples import Section, example_sections, first_done
from .figures import MOST_BANDS, curves, setting_text, sweeps
from .functions import MOST_ROWS, function_panels, learned_functions, panel_picture
from .notes import notes, short, warnings
from .operators import operator_table
from .table import Cell, Line, Table, make_table

_WIDTHS = (24, 14)  # letters on the terminal, of the first column and of the others


def print_table(results: dict[str, Any], speed: dict[str, Any]) -> None:
    """The comparison on the terminal: the figures of the tasks, then size and speed, then the notes."""
    table = make_table(results, speed)
    settings = results["settings"]
    tasks = [i for i, column in enumerate(table.columns) if column.group in settings["tasks"]]
    others = [i for i in range(len(table.columns)) if i not in tasks]
    print()
    for title, places in ((f"size {settings['size']}, {results['device']}", tasks), ("size and speed", others)):
        drawn = _terminal_table(title, table, places)
        console = Console()
        needed = Measurement.get(console, console.options.update(max_width=1000), drawn).maximum
        Console(width=max(needed, console.width)).print(drawn)
    for line in warnings(results):
        print(f"! {line}")
    for line in notes(results):
        print(line)


def markdown_table(results: dict[str, Any], speed: dict[str, Any]) -> str:
    """The table as Markdown, best figures between ``**``, without the notes. The same input gives the same text."""
    table = make_table(results, speed)
    lines = [["row", *(_markdown(column.heading) for column in table.columns)], ["---", *["---:"] * len(table.columns)]]
    for line in (*table.rows, *table.controls, *table.references):
        name = _markdown(line.name) + (" (control)" if line.control else "")
        lines.append([name, *(f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in line.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_report(results: dict[str, Any], speed: dict[str, Any], jobs: list[Any], data: Any, out: Path) -> Path:
    """Writes ``out``/report.html with every picture inside, table.md and pictures/; returns the report's path.

    Args:
        results: what results.json holds.
        speed: what speed.json holds; rows may be missing.
        jobs: all runs; pictures are made of the finished ones, of each row's first finished seed.
        data: the data sets that the runs used.
    """
    pictures: dict[str, bytes] = {}
    curve_plots = {task: curves(jobs, task) for task in dict.fromkeys(job.task for job in jobs)}
    sweep_plots = sweeps(results)
    for plot in (*(plot for plots in curve_plots.values() for plot in plots), *sweep_plots):
        pictures[plot.name] = plot.picture
    sections = example_sections(jobs, data)
    for section in sections:
        pictures[section.task] = image_bytes(section.montage, "png")
    classifiers = first_done(jobs, "classification")
    panels = function_panels(classifiers)
    if panels:
        pictures["learned_functions"] = learned_functions(panels)

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"png": _png_uri, "short": short, "json": lambda value: json.dumps(value, indent=2)}
    text = environment.get_template("report.html.j2").render(
        results=results,
        table=make_table(results, speed),
        warnings=warnings(results),
        notes=notes(results),
        settings={name: _settings(row) for name, row in results["rows"].items()},
        failures=_failures(results),
        curves={task: plots for task, plots in curve_plots.items() if plots},
        most_bands=MOST_BANDS,
        most_functions=MOST_ROWS,
        sweeps=sweep_plots,
        sections=[(section, _panels(section)) for section in sections],
        functions=[(panel[0], panel_picture(panel)) for panel in panels],
        operators=operator_table(classifiers),
    )
    write_text(out / "report.html", text)
    write_text(out / "table.md", markdown_table(results, speed))
    for name, picture in pictures.items():
        with atomic_path(out / "pictures" / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    return out / "report.html"


def _terminal_table(title: str, table: Table, places: list[int]) -> rich.table.Table:
    drawn = rich.table.Table(title=title)
    drawn.add_column("row", max_width=_WIDTHS[0])
    for place in places:
        drawn.add_column(table.columns[place].heading, justify="right", max_width=_WIDTHS[1])

    def add(lines: list[Line], style: str = "") -> None:
        shown = [line for line in lines if any(line.cells[place].text for place in places)]
        for line in shown:
            name = Text(line.name + (" (control)" if line.control else ""), style)
            drawn.add_row(name, *(_terminal_cell(line.cells[place], style) for place in places))
        if shown:
            drawn.add_section()

    add(table.rows)
    add(table.controls)
    add(table.references, "dim")
    return drawn


def _terminal_cell(cell: Cell, style: str) -> Text:
    return Text(cell.text, "bold" if cell.bold else "dim" if cell.dim else style)


def _markdown(text: str) -> str:
    """``text`` as Markdown shows it letter by letter, also in a table."""
    return re.sub(r"([\\`*{}\[\]<>|$~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _settings(row: dict[str, Any]) -> list[str]:
    """A row's settings, those of one task behind its name."""
    lines = [f"{key} = {setting_text(value)}" for key, value in row["settings"].items()]
    return lines + [f"{task}: {' '.join(map(str, words))}" for task, words in row["task_settings"].items() if words]


def _failures(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(row, task, seed, end of the log) of every failed run."""
    return [
        (name, task, seed, log)
        for name, row in results["rows"].items()
        for task, seeds in row["failures"].items()
        for seed, log in seeds.items()
    ]


def _panels(section: Section) -> list[tuple[str, list[tuple[Any, str]]]]:
    """(title, [(panel, its picture as a URI)]) of each example."""
    return [
        (example.title, [(panel, _uri("jpeg", image_bytes(panel.picture, "jpeg"))) for panel in example.panels])
        for example in section.examples
    ]


def _png_uri(picture: bytes) -> str:
    return _uri("png", picture)


def _uri(kind: str, picture: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
