"""Rows of an operator's contestants: gate, time, memory, share of the device's copy speed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Contestant, NotRunError
from .gate import Gate
from .options import show_shape
from .timing import Stage, interleaved, peak_mib, summary

COPY = "copy"


def run_case(case: Case, problem: Any, dtype: str, chosen: list[str] | None, rounds: int, seed: int) -> list[dict]:
    """One row per contestant; a row without times has ``problem``, the reason.

    Args:
        dtype: name of problem.dtype for the rows.
        chosen: names of contestants, or None for all; the yardstick always runs.
    """
    torch.compiler.reset()  # each shape gets its own compilation, whatever was compiled before
    generator = torch.Generator(problem.device).manual_seed(seed)
    inputs = case.inputs(problem, generator)
    first = inputs[case.batched[0]]
    grad = torch.randn(first.shape, generator=generator, device=problem.device).to(problem.dtype)
    contestants = [case.yardstick, *(c for c in case.contestants if chosen is None or c.name in chosen)]
    rows, calls = _gated(case, problem, contestants, inputs, grad)
    source, copy = first.detach(), torch.empty_like(first)
    stages: dict[str, list[Stage]] = {name: _stages(call, inputs, grad) for name, call in calls.items()}
    stages[COPY] = [lambda _: copy.copy_(source)]
    times = interleaved(stages, problem.device, rounds)
    copied = summary(times[COPY][0])["ms"]
    yardstick = summary(_steps(times[case.yardstick.name]))["ms"]
    size = first.numel() * first.element_size()
    for row in rows:
        row |= {"case": case.name, "shape": show_shape(problem.shape), "dtype": dtype}
        if row["contestant"] not in calls:
            continue
        forward, backward = (summary(t) for t in times[row["contestant"]])
        step = summary(_steps(times[row["contestant"]]))
        row |= {
            "forward_ms": forward["ms"],
            "backward_ms": backward["ms"],
            "step_ms": step["ms"],
            "step_spread": step["spread"],
            "ratio": step["ms"] / yardstick,
            "forward_share": case.passes and case.passes[0] / 2 * copied / forward["ms"],
            "backward_share": case.passes and case.passes[1] / 2 * copied / backward["ms"],
            "copy_gb_per_s": 2 * size / copied / 1e6,
            "peak_mib": peak_mib(lambda r=row: _step(calls[r["contestant"]], inputs, grad), problem.device),
        }
    return rows


def _gated(
    case: Case, problem: Any, contestants: list[Contestant], inputs: dict[str, Tensor], grad: Tensor
) -> tuple[list[dict[str, Any]], dict[str, Callable[..., Tensor]]]:
    """A row per contestant with its errors, and the functions of those that may be timed."""
    gate = Gate(case.reference(problem), inputs, case.batched, grad)
    rows, calls = [], {}
    for contestant in contestants:
        row: dict[str, Any] = {"contestant": contestant.name, "problem": None}
        rows.append(row)
        try:
            call = contestant.build(problem)
            if contestant is case.yardstick or not contestant.gated:
                _step(call, inputs, grad)
            else:
                row["errors"], row["problem"] = gate.check(call)
                row["allowed"] = gate.limits
        except NotRunError as reason:
            row["problem"] = f"not run: {reason}"
        except torch.OutOfMemoryError:
            row["problem"] = "out of memory"
        except Exception as error:  # whatever another's code or a compiler raises; the others still run
            if contestant is case.yardstick:
                raise
            row["problem"] = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        if row["problem"] is None:
            calls[contestant.name] = call
    return rows, calls


def _stages(call: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor) -> list[Stage]:
    leaves = list(inputs.values())
    return [
        lambda _: call(**inputs),
        lambda output: torch.autograd.grad(output, leaves, grad, allow_unused=True),
    ]


def _step(call: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor) -> None:
    torch.autograd.grad(call(**inputs), list(inputs.values()), grad, allow_unused=True)


def _steps(stages: list[list[float]]) -> list[float]:
    """Forward and backward together, per round."""
    return [sum(values) for values in zip(*stages, strict=True)]
