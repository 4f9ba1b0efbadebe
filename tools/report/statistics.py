"""Means over seeds, and when a difference between two rows is more than the luck of their seeds."""

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

CONFIDENCE = 0.95
Figures = Mapping[str, Any]  # by_seed, mean, std


def summarize(by_seed: Mapping[str, float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one seed) of a figure, with the single values."""
    values = list(by_seed.values())
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "by_seed": dict(by_seed)}


def paired_difference(a: Figures, b: Figures) -> tuple[float, float | None]:
    """Mean and sample standard deviation of a − b over the seeds that both have.

    The deviation is None of fewer than two common seeds: nothing is known then of what luck does.
    """
    seeds = [seed for seed in a["by_seed"] if seed in b["by_seed"]]
    differences = [a["by_seed"][seed] - b["by_seed"][seed] for seed in seeds]
    if not differences:
        return a["mean"] - b["mean"], None
    return fmean(differences), stdev(differences) if len(differences) > 1 else None


def half_width(a: Figures, b: Figures) -> float | None:
    """Half the width of the 95 % interval of the mean of a − b by Student's t; None of fewer than two common seeds."""
    count = len(a["by_seed"].keys() & b["by_seed"].keys())
    deviation = paired_difference(a, b)[1]
    if deviation is None:
        return None
    return float(student.ppf(0.5 + CONFIDENCE / 2, count - 1)) * deviation / math.sqrt(count)


def best_of(rows: Mapping[str, Figures], better: str) -> dict[str, Any] | None:
    """The row with the best mean of a column, and whether it is clear of every other row.

    Args:
        rows: figures by row.
        better: max or min.

    Returns:
        row, clear (False of one seed), and the difference to the nearest row with its half width (None without one).
    """
    if not rows:
        return None
    sign = 1 if better == "max" else -1
    name = max(rows, key=lambda row: sign * rows[row]["mean"])
    others = [other for row, other in rows.items() if row != name]
    pairs = [(paired_difference(rows[name], other)[0], half_width(rows[name], other)) for other in others]
    clear = bool(pairs) and all(margin is not None and sign * mean > margin for mean, margin in pairs)
    nearest = min(pairs, key=lambda pair: sign * pair[0], default=(None, None))
    return {"row": name, "clear": clear, "difference": nearest[0], "margin": nearest[1]}


def judge_control(best: Figures, controls: Mapping[str, Figures], better: str) -> dict[str, Any] | None:
    """How near the best control comes to the best row.

    Returns:
        row: of the control with the best mean; share: its mean over the best row's (None when that is 0);
        within_spread: whether some control lies within the spread: the mean of its paired differences to the best row
        is no larger than their standard deviation (None of one seed: not judged).
    """
    if not controls:
        return None
    sign = 1 if better == "max" else -1
    name = max(controls, key=lambda row: sign * controls[row]["mean"])
    pairs = [paired_difference(best, figures) for figures in controls.values()]
    unknown = any(deviation is None for _, deviation in pairs)
    within = None if unknown else any(sign * mean <= deviation for mean, deviation in pairs)
    return {
        "row": name,
        "share": controls[name]["mean"] / best["mean"] if best["mean"] else None,
        "within_spread": within,
    }
