"""The group-rational activation in plain PyTorch: the truth that faster forms are compared with.

F(x) = P(x) / Q(x), P = Σ_{i=0..m} a_i xⁱ, coefficients shared inside channel groups (arXiv 2409.10594).
Denominators: ``sum_abs`` Q = 1 + Σ_{j=1..n} |b_j||x|ʲ, ``abs_sum`` Q = 1 + |Σ_j b_j xʲ|.
"""

import torch
from torch import Tensor


def group_rational_reference(x: Tensor, numerator: Tensor, denominator: Tensor, form: str = "sum_abs") -> Tensor:
    """Differentiable decomposition; arguments as in ``group_rational``, computed in float32 (float64 stays)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = max(numerator.shape[0], denominator.shape[0])
    xg = x.to(dtype).unflatten(-1, (groups, -1))  # (..., g, C/g)
    a = numerator.to(dtype)[:, :, None]  # (1|g, m+1, 1)
    b = denominator.to(dtype)[:, :, None]
    p = a[:, -1].expand_as(xg)
    for i in range(a.shape[1] - 2, -1, -1):
        p = p * xg + a[:, i]
    if form == "sum_abs":
        ax, ab = _abs(xg), _abs(b)
        q = _horner(ax, ab) + 1
    else:
        q = _abs(_horner(xg, b)) + 1
    return (p / q).flatten(-2).to(x.dtype)


def _horner(x: Tensor, b: Tensor) -> Tensor:
    """Σ_{j=1..n} b_j xʲ."""
    s = b[:, -1] * x
    for j in range(b.shape[1] - 2, -1, -1):
        s = (s + b[:, j]) * x
    return s


def _abs(x: Tensor) -> Tensor:
    """|x| with derivative +1 at 0: autograd's 0 there would freeze b under the identity start (all b = 0)."""
    return torch.where(x < 0, -x, x)
