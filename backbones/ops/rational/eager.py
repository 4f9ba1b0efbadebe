"""The group-rational activation with a hand-written backward that saves only x: less memory and time than autograd."""

import torch
from torch import Tensor


class GroupRational(torch.autograd.Function):
    """Same values and gradients as ``group_rational_reference``.

    With r = 1/Q, y = P r and upstream gradient g (arXiv 2409.10594, sgn(0) = +1):
    dx = g r (P' − y Q'), da_i = Σ g r xⁱ, db_j = −Σ g r y ∂Q/∂b_j.
    """

    @staticmethod
    def forward(ctx, x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.form = form
        xg, a, b = _grouped(x, numerator, denominator)
        q, _ = _denominator(xg, b, form)
        return _polynomial(xg, a).div_(q).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, numerator, denominator = ctx.saved_tensors
        xg, a, b = _grouped(x, numerator, denominator)
        q, base = _denominator(xg, b, ctx.form)  # base: |x| or x, what the powers in Q are taken of
        sign = torch.where(xg < 0, -1.0, 1.0).to(xg.dtype)
        if ctx.form == "abs_sum":
            sign = torch.where(_sum_powers(base, b) < 0, -1.0, 1.0).to(xg.dtype)  # sgn of the sum inside |.|
        y = _polynomial(xg, a).div_(q)
        gr = grad.to(xg.dtype).unflatten(-1, xg.shape[-2:]) / q
        gy = gr * y
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            weight = b.abs() if ctx.form == "sum_abs" else b
            slope = _derivative(base, weight).mul_(sign)  # Q'
            dx = _derivative(xg, a[:, 1:]).mul_(gr).sub_(slope.mul_(gy)).flatten(-2).to(x.dtype)
        if ctx.needs_input_grad[1]:
            sums, term = [], gr
            for i in range(a.shape[1]):
                term = term * xg if i else gr
                sums.append(_per_group(term))
            da = _fold(torch.stack(sums, 1), numerator)
        if ctx.needs_input_grad[2]:
            sums, term = [], (gy if ctx.form == "sum_abs" else gy.mul_(sign))
            for _ in range(b.shape[1]):
                term = term * base
                sums.append(-_per_group(term))
            db = torch.stack(sums, 1)
            if ctx.form == "sum_abs":
                db = db * torch.where(b < 0, -1.0, 1.0).squeeze(-1)
            db = _fold(db, denominator)
        return dx, da, db, None


def _grouped(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = max(numerator.shape[0], denominator.shape[0])
    xg = x.to(dtype).unflatten(-1, (groups, -1))  # (..., g, C/g)
    return xg, numerator.to(dtype)[:, :, None], denominator.to(dtype)[:, :, None]


def _polynomial(x: Tensor, a: Tensor) -> Tensor:
    """Σ_{i=0..m} a_i xⁱ by Horner's rule."""
    if a.shape[1] == 1:
        return a[:, 0].expand_as(x).clone()
    p = torch.addcmul(a[:, -2], x, a[:, -1])
    for i in range(a.shape[1] - 3, -1, -1):
        p = p.mul_(x).add_(a[:, i])
    return p


def _derivative(x: Tensor, c: Tensor) -> Tensor:
    """d/dx Σ_{j=1..k} c_j xʲ = Σ j c_j xʲ⁻¹, with c_1 first."""
    if c.shape[1] == 0:
        return torch.zeros_like(x)
    degrees = torch.arange(1, c.shape[1] + 1, dtype=c.dtype, device=c.device)
    return _polynomial(x, c * degrees[:, None])


def _sum_powers(x: Tensor, b: Tensor) -> Tensor:
    """Σ_{j=1..n} b_j xʲ."""
    return _polynomial(x, b).mul_(x)


def _denominator(x: Tensor, b: Tensor, form: str) -> tuple[Tensor, Tensor]:
    if form == "sum_abs":
        base = x.abs()
        return _sum_powers(base, b.abs()).add_(1), base
    return _sum_powers(x, b).abs_().add_(1), x


def _per_group(t: Tensor) -> Tensor:
    """Sums (..., g, C/g) over everything but the group."""
    return t.sum(-1).flatten(0, -2).sum(0) if t.dim() > 2 else t.sum(-1)


def _fold(sums: Tensor, coefficient: Tensor) -> Tensor:
    """Sums over groups when they share the coefficient, and casts to its type."""
    return (sums.sum(0, keepdim=True) if coefficient.shape[0] == 1 else sums).to(coefficient.dtype)
