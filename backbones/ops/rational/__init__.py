"""``group_rational`` and ``norm_rational``: checks of the group-rational activation, and the way it is traced."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.errors import check_choice
from .library import fuses, group_rational_op, norm_rational_op
from .reference import group_rational_reference

__all__ = ["FORMS", "fuses", "group_rational", "norm_rational"]

FORMS = ("sum_abs", "abs_sum")


def group_rational(
    x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "sum_abs", bias: Tensor | None = None
) -> Tensor:
    """Applies F(x) = P(x)/Q(x) per channel, with coefficients shared inside channel groups (arXiv 2409.10594).

    Args:
        x: (..., C), float16, bfloat16, float32 or float64, any strides.
        numerator: (1 or g, m+1), a_0 to a_m; one row = shared by all groups.
        denominator: (1 or g, n), b_1 to b_n.
        form: ``sum_abs`` for Q = 1+Σ|b_j||x|ʲ, ``abs_sum`` for Q = 1+|Σ b_j xʲ|.
        bias: (C,), added to x in the same pass.

    Returns:
        (..., C) in x's type, computed in float32 (float64 for float64 input), also under autocast. Gradients use
        sgn(0) = +1 and are equal bit for bit in every run. Backward keeps x alone.

    Raises:
        ValueError: for integer input, another device, coefficients that are not 2-D, or C not divisible by g.
    """
    _check(x, numerator, denominator, form)
    if bias is not None:
        _check_channels("bias", bias, x)
    if torch.compiler.is_exporting():
        return group_rational_reference(x if bias is None else (x + bias).to(x.dtype), numerator, denominator, form)
    return group_rational_op(x, bias, numerator, denominator, form)


def norm_rational(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    form: str = "sum_abs",
    eps: float = 1e-6,
) -> Tensor:
    """``group_rational(layer_norm(x), ...)`` in one pass over memory each way.

    Args:
        x: (..., C).
        weight, bias: (C,), those of the LayerNorm over C; ``eps`` is added to its variance.
        numerator, denominator, form: as in ``group_rational``.

    Returns:
        (..., C) in x's type; under autocast float32 comes out in the autocast type, as the product that follows would
        cast it anyway.

    Raises:
        ValueError: as ``group_rational``, and for weight or bias that are not (C,).
    """
    _check(x, numerator, denominator, form)
    _check_channels("weight", weight, x)
    _check_channels("bias", bias, x)
    dtype, kind = x.dtype, x.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if torch.compiler.is_exporting():
        normal = F.layer_norm(x, weight.shape, weight, bias, eps)
        return group_rational_reference(normal, numerator, denominator, form).to(dtype)
    return norm_rational_op(x, weight, bias, eps, numerator, denominator, form, dtype)[0]


def _check(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> None:
    check_choice("form", form, FORMS)
    if not x.is_floating_point():
        raise ValueError(f"group_rational needs floating-point x, got {x.dtype}.")
    for name, c in (("numerator", numerator), ("denominator", denominator)):
        if c.dim() != 2 or c.shape[1] < 1:
            raise ValueError(f"{name} must be (1 or groups, coefficients), got shape {tuple(c.shape)}.")
        if not c.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {c.dtype}.")
        if c.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {c.device}; move both to one device.")
    rows = {numerator.shape[0], denominator.shape[0]}
    groups = max(rows)
    if rows - {1, groups} or 0 in rows:
        raise ValueError(f"numerator has {numerator.shape[0]} groups and denominator {denominator.shape[0]}.")
    if x.dim() < 1 or x.shape[-1] % groups or x.shape[-1] == 0:
        raise ValueError(f"width {tuple(x.shape)[-1:]} of x is not divisible by {groups} groups.")


def _check_channels(name: str, value: Tensor, x: Tensor) -> None:
    if value.shape != x.shape[-1:]:
        raise ValueError(f"{name} must be ({x.shape[-1]},) as x has {x.shape[-1]} channels, got {tuple(value.shape)}.")
    if value.device != x.device:
        raise ValueError(f"x is on {x.device} and {name} on {value.device}; move both to one device.")
