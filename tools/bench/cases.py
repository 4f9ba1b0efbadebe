"""The operators that are timed, each with its reference, its yardstick and its contestants.

A new operator is a new Case in CASES; a new implementation is a new Contestant of its case.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.ops import group_rational
from backbones.ops.rational.reference import group_rational_reference


class NotRunError(Exception):
    """A contestant that does not run here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One row set: the shape and type of x, and the rational function's settings."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device
    groups: int = 8
    degrees: tuple[int, int] = (5, 4)
    form: str = "sum_abs"


@dataclass(frozen=True)
class Contestant:
    """``build(problem)`` returns the function to time, called with the inputs by name, or raises NotRunError."""

    name: str
    build: Callable[[Problem], Callable[..., Tensor]]


@dataclass(frozen=True)
class Case:
    """An operator.

    Args:
        inputs: makes the tensors by name, all differentiated, from a problem and a generator on its device.
        batched: names of inputs whose first dimension is the batch; the first has as many elements as the output.
        reference: ``reference(problem)`` returns the truth, differentiable in float64.
        yardstick: what the operator replaces; times are given as multiples of its forward and backward.
        passes: least number of passes over x's bytes in (forward, backward).
    """

    name: str
    inputs: Callable[[Problem, torch.Generator], dict[str, Tensor]]
    batched: tuple[str, ...]
    reference: Callable[[Problem], Callable[..., Tensor]]
    yardstick: Contestant
    contestants: tuple[Contestant, ...]
    passes: tuple[int, int] = (2, 3)


def compiled(reference: Callable[[Problem], Callable[..., Tensor]]) -> Contestant:
    """The reference through torch.compile."""
    return Contestant("compiled reference", lambda problem: torch.compile(reference(problem), dynamic=False))


def rational_inputs(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """x ~ N(0, 1), a numerator shared by all groups and a denominator per group, as GR-KAN layers have them."""
    draw = partial(torch.randn, generator=generator, device=problem.device)
    m, n = problem.degrees
    inputs = {
        "x": draw(problem.shape).to(problem.dtype),
        "numerator": draw(1, m + 1) / 2,
        "denominator": draw(problem.groups, n) / 2,
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def rational_reference(problem: Problem) -> Callable[..., Tensor]:
    return lambda x, numerator, denominator: group_rational_reference(x, numerator, denominator, problem.form)


def _karvis(problem: Problem) -> Callable[..., Tensor]:
    return lambda x, numerator, denominator: group_rational(x, numerator, denominator, problem.form)


def _peer(module: str, attribute: str, takes_groups: bool) -> Callable[[Problem], Callable[..., Tensor]]:
    """A published kernel, called as its own layer calls it: one numerator row per group."""

    def build(problem: Problem) -> Callable[..., Tensor]:
        if problem.degrees != (5, 4) or problem.form != "sum_abs":
            raise NotRunError("it has degrees 5,4 and the form sum_abs only")
        if problem.device.type != "cuda":
            raise NotRunError("it needs a GPU")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except ImportError:
            raise NotRunError("not installed") from None
        extra = (problem.groups,) if takes_groups else ()

        def call(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
            return function.apply(x, numerator.repeat(problem.groups, 1), denominator, *extra)

        return call

    return build


CASES = (
    Case(
        name="group_rational",
        inputs=rational_inputs,
        batched=("x",),
        reference=rational_reference,
        yardstick=Contestant("gelu", lambda problem: lambda x, numerator, denominator: F.gelu(x)),
        contestants=(
            Contestant("reference", rational_reference),
            compiled(rational_reference),
            Contestant("karvis", _karvis),
            Contestant("rational_kat_cu", _peer("kat_rational", "RationalTriton1DGroup", takes_groups=True)),
            Contestant(
                "flashkat",
                _peer("rational_kat.kernels.flash_rational_triton", "FlashRationalTriton1DGroup", takes_groups=False),
            ),
        ),
    ),
    # The fused LayerNorm + F1 (norm_rational) and bias + F2 (group_rational with bias) go here, each with its own
    # inputs and reference; their yardsticks are GELU after LayerNorm and GELU after the bias.
)
