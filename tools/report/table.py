"""What stands in each cell of the comparison's table, before it is drawn on a terminal, as Markdown or as HTML."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

UNSTEADY = 0.2  # two measurements of a speed that differ by more than this share give no figure
MEASURES = {"attention": "attention", "ffn": "the feed-forward"}  # what a kind of control replaces


@dataclass(frozen=True)
class Column:
    """A heading, and what the column belongs to: a task, or "size and speed"."""

    group: str
    heading: str


@dataclass(frozen=True)
class Cell:
    """A text and how it is set: bold, dimmed (no figure), or plain."""

    text: str
    bold: bool = False
    dim: bool = False


@dataclass(frozen=True)
class Line:
    """One line of the table. ``control`` names what a control row replaces; None for every other line."""

    name: str
    cells: list[Cell]
    control: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns, rows in their order, controls after them, and below the figures that both are judged by."""

    columns: list[Column]
    rows: list[Line]
    controls: list[Line]
    references: list[Line]

    def groups(self) -> list[tuple[str, list[Column]]]:
        """The columns under the heading that they share."""
        return [(group, list(columns)) for group, columns in groupby(self.columns, lambda column: column.group)]


def make_table(results: dict[str, Any], speed: dict[str, Any]) -> Table:
    """The cells of a comparison.

    Args:
        results: what results.json holds.
        speed: what speed.json holds; a row may be missing.
    """
    columns = [Column(column["task"], column["heading"]) for column in results["columns"]]
    columns += [Column("size and speed", heading) for heading, _ in _SPEED]
    lines = [
        Line(
            name,
            [_figure(results, name, column) for column in results["columns"]]
            + [cell(row, speed.get(name, {})) for _, cell in _SPEED],
            row["control"],
        )
        for name, row in results["rows"].items()
    ]
    return Table(
        columns,
        [line for line in lines if line.control is None],
        [line for line in lines if line.control is not None],
        _references(results, len(_SPEED)),
    )


def one_seed(results: dict[str, Any]) -> bool:
    """Whether the comparison has no spread to judge by."""
    return len(results["settings"]["seeds"]) < 2


def _figure(results: dict[str, Any], name: str, column: dict[str, Any]) -> Cell:
    """Mean ± standard deviation; with the number of seeds where some have no figure."""
    row = results["rows"][name]
    figure = row["figures"].get(column["name"])
    if figure is None:
        failed = row["failures"].get(column["task"])
        return Cell("failed" if failed else "–", dim=True)
    best = results["best"].get(column["name"])
    bold = best is not None and best["row"] == name and best["clear"] and not one_seed(results)
    text = f"{figure['mean']:.1f}"
    if figure["std"] is not None:
        text += f" ± {figure['std']:.1f}"
    seeds = len(figure["by_seed"])
    if seeds < len(results["settings"]["seeds"]):
        text += f" ({seeds} seed{'s' if seeds > 1 else ''})"
    return Cell(text, bold)


def _references(results: dict[str, Any], empty: int) -> list[Line]:
    """The baselines to beat, and for each kind of control how near its best comes to the best row."""
    names = [column["name"] for column in results["columns"]]
    blank = [Cell("")] * empty
    lines = []
    if results["baselines"]:
        known = results["baselines"]
        lines.append(Line("to beat", [Cell(f"{known[name]:.1f}" if name in known else "") for name in names] + blank))
    for kind, what in MEASURES.items():
        judged = [results["controls"].get(name, {}).get(kind) for name in names]
        if any(judged):
            label = f"best control of {what.removeprefix('the ')} / best"
            lines.append(Line(label, [_share(control, what) for control in judged] + blank))
    return lines


def _share(control: dict[str, Any] | None, what: str) -> Cell:
    if control is None:
        return Cell("")
    share = "–" if control["share"] is None else f"{100 * control['share']:.0f} %"
    text = f"{share} ({control['row']})"
    return Cell(f"{text}: does not measure {what} here" if control["within_spread"] else text)


def _known(key: str, scale: float = 1.0) -> Callable[[dict[str, Any], dict[str, Any]], Cell]:
    """A figure of the row itself."""
    return lambda row, _: number(None if row.get(key) is None else row[key] * scale)


def _measured(key: str) -> Callable[[dict[str, Any], dict[str, Any]], Cell]:
    """The mean of the measurements of a row's speed; what they differ by where that is too much to name a figure."""

    def cell(_: dict[str, Any], speed: dict[str, Any]) -> Cell:
        values = speed.get(key) or [None]
        if any(value is None for value in values):
            return number(None)
        low, high = min(values), max(values)
        if high > low * (1 + UNSTEADY):
            return Cell(f"unsteady (+{100 * (high / low - 1):.0f} %)" if low > 0 else "unsteady", dim=True)
        return number(sum(values) / len(values))

    return cell


def number(value: float | None) -> Cell:
    """A positive figure to three or four digits; a dash for None."""
    if value is None:
        return Cell("–", dim=True)
    return Cell(f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}")


_SPEED = [
    ("parameters M", _known("parameters", 1e-6)),
    ("GFLOPs", _known("gflops")),
    ("inference img/s", _measured("images_per_s")),
    ("training img/s", _measured("train_images_per_s")),
    ("step memory MiB", _measured("memory_mib")),
]
