"""``group_rational``: checks and dispatch of the group-rational activation."""

import torch
from torch import Tensor

from ...utils.errors import check_choice
from .eager import GroupRational

FORMS = ("sum_abs", "abs_sum")


def group_rational(x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "sum_abs") -> Tensor:
    """Applies F(x) = P(x)/Q(x) per channel, with coefficients shared inside channel groups (arXiv 2409.10594).

    Args:
        x: (..., C), floating point.
        numerator: (1 or g, m+1), a_0 to a_m; one row = shared by all groups.
        denominator: (1 or g, n), b_1 to b_n.
        form: ``sum_abs`` for Q = 1+Σ|b_j||x|ʲ, ``abs_sum`` for Q = 1+|Σ b_j xʲ|.

    Returns:
        (..., C) in x's type, computed in float32 (float64 for float64 input). Gradients use sgn(0) = +1.

    Raises:
        ValueError: for integer input, another device, coefficients that are not 2-D, or C not divisible by g.
    """
    check_choice("form", form, FORMS)
    if not x.is_floating_point():
        raise ValueError(f"group_rational needs floating-point x, got {x.dtype}.")
    for name, c in (("numerator", numerator), ("denominator", denominator)):
        if c.dim() != 2 or c.shape[1] < 1:
            raise ValueError(f"{name} must be (1 or groups, coefficients), got shape {tuple(c.shape)}.")
        if c.device != x.device:
            raise ValueError(f"x is on {x.device} and {name} on {c.device}; move both to one device.")
    rows = {numerator.shape[0], denominator.shape[0]}
    groups = max(rows)
    if rows - {1, groups}:
        raise ValueError(f"numerator has {numerator.shape[0]} groups and denominator {denominator.shape[0]}.")
    if x.dim() < 1 or x.shape[-1] % groups or x.shape[-1] == 0:
        raise ValueError(f"width {tuple(x.shape)[-1:]} of x is not divisible by {groups} groups.")
    with torch.autocast(x.device.type, enabled=False):
        return GroupRational.apply(x, numerator, denominator, form)
