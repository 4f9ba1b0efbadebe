"""The operators that are timed, each with its reference, its yardstick and its contestants.

A new operator is a new Case in CASES; a new implementation is a new Contestant of its case.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.ops import group_rational, norm_rational
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
    """``build(problem)`` returns the function to time, called with the inputs by name, or raises NotRunError.

    A contestant that is not ``gated`` computes another function, for comparison of its cost alone.
    """

    name: str
    build: Callable[[Any], Callable[..., Tensor]]
    gated: bool = True


@dataclass(frozen=True)
class Case:
    """An operator.

    Args:
        inputs: makes the tensors by name, all differentiated, from a problem (with ``shape``, ``dtype`` and ``device``)
            and a generator on its device.
        batched: names of inputs whose first dimension is the batch; the first has as many elements as the output.
        reference: ``reference(problem)`` returns the truth, differentiable in float64.
        yardstick: what the operator replaces; times are given as multiples of its forward and backward.
        passes: least number of passes over x's bytes in (forward, backward); None where traffic is not the limit.
    """

    name: str
    inputs: Callable[[Any, torch.Generator], dict[str, Tensor]]
    batched: tuple[str, ...]
    reference: Callable[[Any], Callable[..., Tensor]]
    yardstick: Contestant
    contestants: tuple[Contestant, ...]
    passes: tuple[int, int] | None = (2, 3)


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


def norm_inputs(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs of ``rational_inputs`` after a LayerNorm's weight and bias."""
    x, *coefficients = rational_inputs(problem, generator).items()
    draw = partial(torch.randn, problem.shape[-1], generator=generator, device=problem.device)
    return dict([x, ("weight", draw().requires_grad_()), ("bias", draw().requires_grad_()), *coefficients])


def norm_reference(problem: Problem) -> Callable[..., Tensor]:
    def reference(x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        return group_rational_reference(_layer_norm(x, weight, bias), numerator, denominator, problem.form)

    return reference


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), 1e-6)


def _unfused_norm(problem: Problem) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        return group_rational(_layer_norm(x, weight, bias), numerator, denominator, problem.form)

    return call


def bias_inputs(problem: Problem, generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs of ``rational_inputs`` and a bias per channel."""
    inputs = rational_inputs(problem, generator)
    bias = torch.randn(problem.shape[-1], generator=generator, device=problem.device)
    return {**inputs, "bias": bias.requires_grad_()}


def bias_reference(problem: Problem) -> Callable[..., Tensor]:
    def reference(x: Tensor, numerator: Tensor, denominator: Tensor, bias: Tensor) -> Tensor:
        return group_rational_reference((x + bias).to(x.dtype), numerator, denominator, problem.form)

    return reference


def _unfused_bias(problem: Problem) -> Callable[..., Tensor]:
    def call(x: Tensor, numerator: Tensor, denominator: Tensor, bias: Tensor) -> Tensor:
        return group_rational((x + bias).to(x.dtype), numerator, denominator, problem.form)

    return call


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
    Case(
        name="layer_norm + group_rational",
        inputs=norm_inputs,
        batched=("x",),
        reference=norm_reference,
        yardstick=Contestant(
            "layer_norm + gelu",
            lambda problem: lambda x, weight, bias, **_: F.gelu(_layer_norm(x, weight, bias)),
        ),
        contestants=(
            Contestant("unfused", _unfused_norm),
            Contestant("karvis", lambda problem: partial(norm_rational, form=problem.form)),
        ),
    ),
    Case(
        name="bias + group_rational",
        inputs=bias_inputs,
        batched=("x",),
        reference=bias_reference,
        yardstick=Contestant("bias + gelu", lambda problem: lambda x, bias, **_: F.gelu(x + bias.to(x.dtype))),
        contestants=(
            Contestant("unfused", _unfused_bias),
            Contestant("karvis", lambda problem: partial(group_rational, form=problem.form)),
        ),
    ),
)
