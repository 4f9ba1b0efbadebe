"""What KArAt's operators did while the classifiers were pretrained: scores, output, change by a step, and gates."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from backbones.training.log import read_metrics

from .functions import MOST_ROWS
from .table import Cell, number

_LOGGED = ("score_max", "output", "step")  # what is shown of what backbones.training.monitor writes
Series = dict[str, list[float]]  # name of a figure: its values by logged step


@dataclass(frozen=True)
class OperatorLine:
    """One line of the table: an operator, or a block that only has gates on the operator shared by all blocks.

    Args:
        name: the comparison's row.
        block: the operator's place in the network.
        score_median, score_last: largest |score|, over the logged steps and at the last.
        output_last: root mean square of the output over that of the values.
        step_median, step_largest: change of the output by one step, in percent of the output.
        gates: of the served heads, as trained; empty without gates.
    """

    name: str
    block: str
    score_median: float | None
    score_last: float | None
    output_last: float | None
    step_median: float | None
    step_largest: float | None
    gates: tuple[float, ...]

    @property
    def cells(self) -> list[Cell]:
        """The cells behind the row's name."""
        figures = (self.score_median, self.score_last, self.output_last, self.step_median, self.step_largest)
        gates = ", ".join(f"{gate:.3f}" for gate in self.gates)
        return [Cell(self.block), *(number(figure) for figure in figures), Cell(gates)]


def operator_table(jobs: Iterable[Any], at_most: int = MOST_ROWS) -> list[OperatorLine]:
    """A line for each operator of the pretrained networks, in the order of rows and blocks.

    Args:
        jobs: finished classification runs; those that logged nothing of operators are passed over.
        at_most: networks to show, the first ones.
    """
    shown = islice((lines for job in jobs if (lines := _lines_of(job))), at_most)
    return [line for lines in shown for line in lines]


def _lines_of(job: Any) -> list[OperatorLine]:
    from classification.state import load_trained

    logged = _logged(job.folder / "metrics.jsonl")
    if not logged:
        return []
    network, _ = load_trained(job.folder)
    gates = {n.removesuffix(".gate"): p.tolist() for n, p in network.named_parameters() if n.endswith(".gate")}
    return [_line(job.row, place, logged[place], gates.get(place, ())) for place in dict.fromkeys([*logged, *gates])]


def _logged(path: Path) -> defaultdict[str, Series]:
    """The figures of each operator by its place in the network; none of runs that watched no operators."""
    places: defaultdict[str, Series] = defaultdict(dict)
    for row in read_metrics(path) if path.is_file() else []:
        place, _, name = row["name"].rpartition("/")
        if row["split"] == "train" and name in _LOGGED:
            places[place].setdefault(name, []).append(row["value"])
    return places


def _line(row: str, place: str, series: Series, gates: Sequence[float]) -> OperatorLine:
    scores, outputs, steps = (np.array(series.get(name, [])) for name in _LOGGED)
    return OperatorLine(
        row,
        place.removesuffix(".attn"),
        score_median=float(np.median(scores)) if scores.size else None,
        score_last=float(scores[-1]) if scores.size else None,
        output_last=float(outputs[-1]) if outputs.size else None,
        step_median=100 * float(np.median(steps)) if steps.size else None,
        step_largest=100 * float(steps.max()) if steps.size else None,
        gates=tuple(gates),
    )
