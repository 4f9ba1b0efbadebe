"""Exact Euclidean projection onto the probability simplex, row by row (Condat, Math. Program. 158, 2016)."""

import torch
from torch import Tensor


def project_simplex(y: Tensor, mask: Tensor | None = None) -> Tensor:
    """The nearest x to y with x ≥ 0 and Σ x = 1 over the last axis: x = (y − λ)₊, λ found by sorting.

    Args:
        y: (..., n), n at least 1.
        mask: bool, broadcastable to y; False entries get 0 and are no part of the sum. A row without True is all 0.

    Returns:
        (..., n) in y's type, computed in float32 at least. Its gradient is exact wherever the support does not change.
    """
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    if mask is not None:
        wide = torch.where(mask, wide, 0)
    with torch.no_grad():
        support = _support(wide, mask)
        count = support.sum(-1, keepdim=True)
    threshold = ((wide * support).sum(-1, keepdim=True) - 1) / count.clamp(min=1)
    return ((wide - threshold) * support).to(y.dtype)


def _support(y: Tensor, mask: Tensor | None) -> Tensor:
    """Where the projection is positive: the ρ largest entries, ρ = max{i : y(i) − (Σ_{j≤i} y(j) − 1)/i > 0}."""
    ordered = y if mask is None else y.masked_fill(~mask, -torch.inf)
    ordered = ordered.sort(-1, descending=True).values
    rank = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    # Masked entries come last; their sums are −∞ − −∞, a NaN, and no number is above that.
    threshold = (ordered.cumsum(-1) - 1) / rank
    count = (ordered > threshold).sum(-1, keepdim=True)
    last = threshold.gather(-1, (count - 1).clamp(min=0))
    support = y > last
    return support if mask is None else support & mask
