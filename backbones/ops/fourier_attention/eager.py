"""How are φ's sums over the keys and their gradients taken of a block of scores in plain PyTorch, on any device?

Heads come first and the images of a block are stacked, so that each product with the coefficients is one per head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LANES = 1  # the number of keys must be a multiple of it


def pack(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The coefficients (h, G, r, N) in the form that the other functions take: (h, G, 2, r, N)."""
    return torch.stack([a.detach(), b.detach()], 2).to(dtype)


def unpack(sums: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(da, db), each (h, G, r, N), of sums in the form of ``pack``."""
    return sums[:, :, 0, :, :n], sums[:, :, 1, :, :n]


def forward(s: Tensor, coefficients: Tensor, real: Tensor | None) -> Tensor:
    """H (h, images, rows, r) of the scores s (h, images, rows, N); real (images, N): 0 at masked keys, else 1."""
    h = s.new_zeros(len(s), s.shape[1] * s.shape[2], coefficients.shape[3])
    for m, cos, sin in _harmonics(s, coefficients.shape[1], real):
        a, b = coefficients[:, m - 1].transpose(-2, -1).unbind(1)  # (h, N, r)
        h.baddbmm_(cos, a).baddbmm_(sin, b)
    return h.unflatten(1, s.shape[1:3])


def backward(s: Tensor, dh: Tensor, coefficients: Tensor, real: Tensor | None, sums: Tensor) -> Tensor:
    """dS from dH (h, images, rows, r); adds da_m = dHᵀ cos(mS) and db_m = dHᵀ sin(mS) to sums. May overwrite s.

    dS = Σ_m m (cos(mS) ⊙ (dH b_m) − sin(mS) ⊙ (dH a_m)).
    """
    dh = dh.flatten(1, 2)
    ds = torch.zeros_like(s).flatten(1, 2)
    for m, cos, sin in _harmonics(s, coefficients.shape[1], real):
        a, b = coefficients[:, m - 1].unbind(1)  # (h, r, N)
        ds.addcmul_(cos, torch.bmm(dh, b), value=m).addcmul_(sin, torch.bmm(dh, a), value=-m)
        for i, values in enumerate((cos, sin)):
            sums[:, m - 1, i] += torch.bmm(dh.transpose(1, 2), values)
    return ds.view(s.shape)


def _harmonics(s: Tensor, grid: int, real: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, cos(m s), sin(m s)), each (h, images·rows, N), for m = 1..G from one sin/cos pair by angle addition.

    Masked entries are zero, and stay zero through the recurrence.
    """
    cos1, sin1 = torch.cos(s), torch.sin(s)
    if real is not None:
        for t in (cos1, sin1):
            t.mul_(real[:, None])
    cos1, sin1 = cos1.flatten(1, 2), sin1.flatten(1, 2)
    cos, sin = cos1, sin1
    for m in range(1, grid + 1):
        if m > 1:
            cos, sin = (cos * cos1).addcmul_(sin, sin1, value=-1), (sin * cos1).addcmul_(cos, sin1)
        yield m, cos, sin
