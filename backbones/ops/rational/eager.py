"""The group-rational activation and its gradients in PyTorch, block by block: what runs without any kernel.

Coefficients are widened to one row per channel, so that every step is a plain pass over rows.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**18  # of one block of rows on a CPU: its temporaries stay within the caches


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x) for rows x (R, C); arguments as in ``group_rational``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = _widen(numerator, x, dtype), _widen(denominator, x, dtype)
    weight = [c.abs() for c in b] if form == "sum_abs" else b
    out = x.new_empty(x.shape)
    for block in _blocks(x):
        xb = x[block].to(dtype)
        out[block] = _polynomial(xb, a).div_(_denominator(xb.abs() if form == "sum_abs" else xb, weight)[0])
    return out


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dnumerator, ddenominator) for rows grad and x (R, C).

    With r = 1/Q, y = P r and upstream gradient g (arXiv 2409.10594, sgn(0) = +1):
    dx = g r (P' − y Q'), da_i = Σ g r xⁱ, db_j = −Σ g r y ∂Q/∂b_j.
    """
    signed = form == "abs_sum"
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = _widen(numerator, x, dtype), _widen(denominator, x, dtype)
    weight = b if signed else [c.abs() for c in b]
    dx = x.new_empty(x.shape)
    da = x.new_zeros(len(a), x.shape[1], dtype=dtype)
    db = x.new_zeros(len(b), x.shape[1], dtype=dtype)
    for block in _blocks(x):
        xb = x[block].to(dtype)
        base = xb if signed else xb.abs()  # what Q's powers are taken of
        q, inner = _denominator(base, weight)
        sign = _sign(inner if signed else xb)
        term = grad[block].to(dtype) / q  # g r
        scaled = _polynomial(xb, a).div_(q).mul_(term)  # g r y
        slope = _derivative(base, weight).mul_(sign).mul_(scaled)
        dx[block] = _derivative(xb, a[1:]).mul_(term).sub_(slope)
        da[0] += term.sum(0)
        for i in range(1, len(a)):
            da[i] += term.mul_(xb).sum(0)
        if signed:
            scaled.mul_(sign)
        for j in range(len(b)):
            db[j] -= scaled.mul_(base).sum(0)
    if not signed:
        db *= torch.stack([_sign(c) for c in _widen(denominator, x, dtype, always=True)])
    return dx, _narrow(da, numerator), _narrow(db, denominator)


def _blocks(rows: Tensor) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _widen(coefficient: Tensor, x: Tensor, dtype: torch.dtype, always: bool = False) -> list[Tensor]:
    """One tensor per degree: (C,) with each group's coefficient repeated, or () when all groups share it."""
    c = coefficient.detach().to(dtype)
    if len(c) == 1 and not always:
        return list(c[0])
    return list(c.repeat_interleave(x.shape[-1] // len(c), 0).T.contiguous())


def _narrow(sums: Tensor, coefficient: Tensor) -> Tensor:
    """(degrees, C) summed over the channels of each row of ``coefficient``."""
    return sums.unflatten(1, (len(coefficient), -1)).sum(2).T.to(coefficient.dtype)


def _sign(x: Tensor) -> Tensor:
    """sgn with sgn(0) = +1."""
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


def _polynomial(x: Tensor, c: list[Tensor]) -> Tensor:
    """Σ_{i=0..m} c_i xⁱ by Horner's rule."""
    p = (x * c[-1]).add_(c[-2]) if len(c) > 1 else torch.zeros_like(x).add_(c[0])
    for i in range(len(c) - 3, -1, -1):
        p.mul_(x).add_(c[i])
    return p


def _derivative(x: Tensor, c: list[Tensor]) -> Tensor:
    """d/dx Σ_{j=1..k} c_j xʲ = Σ j c_j xʲ⁻¹, with c_1 first."""
    return _polynomial(x, [j * cj for j, cj in enumerate(c, 1)]) if c else torch.zeros_like(x)


def _denominator(base: Tensor, weight: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Q = 1 + |Σ_{j=1..n} w_j baseʲ| and the sum inside."""
    inner = _polynomial(base, weight).mul_(base)
    return inner.abs().add_(1), inner
