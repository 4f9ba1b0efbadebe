#!/usr/bin/env python
"""Fits the functions that GR-KAN's rationals start as, and writes them to backbones/layers/starts.py.

tools/fit_starts.py            # a few seconds on one core
tools/fit_starts.py --check    # fits again and compares with the file, writes nothing

Each fit is the rational of degrees (5, 4) with the smallest largest error on [-limit, limit], by the differential
correction algorithm (Barrodale, Powell and Roberts, SIAM J. Numer. Anal. 9, 1972): one linear program per step. Once
the sign of what stands inside the absolute values is fixed, both denominators are linear in their coefficients.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import linprog
from scipy.special import erf, expit

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "backbones" / "layers" / "starts.py"
M, N = 5, 4
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "swish": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "tanh": np.tanh,
    "sigmoid": expit,
}
# Smooth functions are fitted where trained networks' pre-activations lie. The error at a kink grows with the range.
LIMITS = {"identity": 6.0, "swish": 6.0, "gelu": 6.0, "relu": 3.0, "leaky_relu": 3.0, "tanh": 6.0, "sigmoid": 6.0}
# What the released networks of arXiv 2409.10594 started from; it is kept as it is.
RELEASED_SWISH = (
    (
        3.054879741161051e-07,
        0.5000007853744493,
        0.24999783422824703,
        0.05326628273219478,
        0.005803034571292244,
        0.0002751961022402342,
    ),
    (-4.111554955950634e-06, 0.10652899335007572, -1.2690007399796238e-06, 0.0005502331264140556),
)


def evaluate(x: np.ndarray, a: np.ndarray, b: np.ndarray, form: str) -> np.ndarray:
    """P(x)/Q(x) with a_0 to a_m and b_1 to b_n, Q = 1+Σ|b_j||x|ʲ (``sum_abs``) or 1+|Σ b_j xʲ| (``abs_sum``)."""
    p = np.polynomial.polynomial.polyval(x, a)
    if form == "sum_abs":
        return p / (1 + np.polynomial.polynomial.polyval(np.abs(x), [0, *np.abs(b)]))
    return p / (1 + np.abs(np.polynomial.polynomial.polyval(x, [0, *b])))


def largest_error(name: str, a: np.ndarray, b: np.ndarray, form: str, limit: float) -> float:
    """max |F(x) − f(x)| over 20,001 points of [-limit, limit]."""
    x = np.linspace(-limit, limit, 20001)
    return float(np.abs(evaluate(x, a, b, form) - FUNCTIONS[name](x)).max())


def gain(name: str) -> float:
    """α = Var[x]/E[f(x)²] for x ~ N(0, 1), by the trapezoidal rule."""
    x = np.linspace(-12, 12, 48001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return float(1 / np.trapezoid(FUNCTIONS[name](x) ** 2 * density, x))


def fit(name: str, form: str, limit: float, points: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """The best rational for a function: a_0 to a_5 and b_1 to b_4.

    ``abs_sum`` is tried with an inner sum that is positive everywhere and with one that changes sign at 0.
    """
    t = np.cos(np.pi * np.arange(points) / (points - 1))  # denser at the ends, where errors peak
    y = FUNCTIONS[name](limit * t)
    numerator = t[:, None] ** np.arange(M + 1)
    powers = np.arange(1, N + 1)
    if form == "sum_abs":
        candidates = [_correct(y, numerator, np.abs(t)[:, None] ** powers, nonnegative=True)]
    else:
        inner = t[:, None] ** powers
        sign = np.sign(t)[:, None]
        candidates = [_correct(y, numerator, w, nonnegative=False) for w in (inner, sign * inner)]
    scale = limit ** np.arange(M + 1)
    fits = [(_rounded(a / scale), _rounded(b / scale[1 : N + 1])) for a, b in candidates]
    return min(fits, key=lambda ab: largest_error(name, *ab, form, limit))


def _correct(y: np.ndarray, v: np.ndarray, w: np.ndarray, nonnegative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes max |y − Va/(1+Wb)| subject to b ≥ 0, or to Wb ≥ 0: where it holds the denominator is 1+|Wb|."""
    m, n = v.shape[1], w.shape[1]
    a, b = np.linalg.lstsq(v, y, rcond=None)[0], np.zeros(n)
    error = np.abs(y - v @ a).max()
    bounds = [(-50, 50)] * m + [(0 if nonnegative else -50, 50)] * n + [(None, None)]
    for _ in range(60):
        q = 1 + w @ b
        # |y(1+Wb) − Va| − error·(1+Wb) ≤ λ·q for the least λ, which is negative until the fit is the best one.
        rows = [np.c_[-v, (y - error)[:, None] * w, -q], np.c_[v, (-y - error)[:, None] * w, -q]]
        right = [error - y, error + y]
        if not nonnegative:
            rows.append(np.c_[np.zeros_like(v), -w, np.zeros(len(y))])
            right.append(np.zeros(len(y)))
        cost = [0.0] * (m + n) + [1.0]
        step = linprog(cost, A_ub=np.concatenate(rows), b_ub=np.concatenate(right), bounds=bounds, method="highs")
        if step.status != 0:
            break
        new_a, new_b = step.x[:m], step.x[m : m + n]
        new = np.abs(y - v @ new_a / (1 + np.abs(w @ new_b))).max()
        if new >= error:
            break
        done = new > error * (1 - 1e-4)
        a, b, error = new_a, new_b, new
        if done:
            break
    return a, b


def _rounded(values: np.ndarray) -> np.ndarray:
    """Ten digits; what vanishes beside float32's resolution becomes 0."""
    return np.array([float(f"{value:.10g}") if abs(value) > 1e-9 else 0.0 for value in values])


def all_fits(form: str) -> dict[str, tuple[tuple[float, ...], tuple[float, ...], float, float, float]]:
    """Every start of a denominator: coefficients, limit, largest error, gain."""
    rows = {}
    for name, limit in LIMITS.items():
        if name == "identity":
            a, b = (0.0, 1.0), ()
        elif (name, form) == ("swish", "sum_abs"):
            a, b = RELEASED_SWISH
            limit = 3.0
        else:
            a, b = (tuple(map(float, c)) for c in fit(name, form, limit))
        error = largest_error(name, np.array(a), np.array(b), form, limit)
        rows[name] = (a, b, limit, float(f"{error:.3g}"), float(f"{gain(name):.7g}"))
    return rows


def render() -> str:
    """The text of backbones/layers/starts.py."""
    lines = [
        '"""Rationals of degrees (5, 4) that GR-KAN starts as. Written by tools/fit_starts.py: change that."""',
        "",
        "from typing import NamedTuple",
        "",
        "",
        "class Start(NamedTuple):",
        '    """a_0 to a_5, b_1 to b_4; error = max |F − f| on [-limit, limit]; gain = 1/E[f(x)²], x ~ N(0, 1)."""',
        "",
        "    numerator: tuple[float, ...]",
        "    denominator: tuple[float, ...]",
        "    limit: float",
        "    error: float",
        "    gain: float",
        "",
        "",
        "STARTS: dict[str, dict[str, Start]] = {",
    ]
    for form in ("sum_abs", "abs_sum"):
        lines.append(f'    "{form}": {{')
        for name, (a, b, limit, error, alpha) in all_fits(form).items():
            lines.append(f'        "{name}": Start(')
            for values in (a, b):
                text = ", ".join(map(repr, values))
                if len(text) <= 104:
                    lines.append(f"            ({text}),")
                else:
                    lines += ["            (", *[f"                {value!r}," for value in values], "            ),"]
            lines += [f"            {limit!r},", f"            {error!r},", f"            {alpha!r},", "        ),"]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the fits with the file, write nothing")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        TARGET.write_text(render(), encoding="utf-8")
    sys.path.insert(0, str(ROOT))
    from backbones.layers.starts import STARTS
    from backbones.utils.errors import UserError

    worse = []
    for form, starts in STARTS.items():
        new = all_fits(form) if arguments.check else {}
        for name, start in starts.items():
            again = f" fitted again {new[name][3]:.2e}" if new else ""
            print(f"{form} {name:<10} error {start.error:.2e} on ±{start.limit:g}, gain {start.gain:.4f}{again}")
            if new and abs(new[name][3] - start.error) > 0.05 * start.error + 1e-7:
                worse.append(f"{form} {name}")
    if worse:
        raise UserError(
            f"{TARGET.name} does not hold the fits of this script: {', '.join(worse)}. Run it without --check."
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from backbones.utils.errors import run_main

    run_main(main)
