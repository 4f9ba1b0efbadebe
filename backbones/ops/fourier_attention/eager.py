"""How are φ's sums over the keys and their gradients taken of a block of scores in plain PyTorch, on any device?

The images of a block are stacked under each head, so that a product with the coefficients is one per head.
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


def forward(s: Tensor, coefficients: Tensor, real: Tensor | None, h: Tensor) -> None:
    """Writes H (images, h, rows, r) of the scores s (images, h, rows, N); real (images, N) is 0 at masked keys."""
    out = 0
    for m, cos, sin in _harmonics(s, coefficients.shape[1], real):
        a, b = coefficients[:, m - 1].transpose(-2, -1).unbind(1)  # (h, N, r)
        out = out + torch.bmm(cos, a).baddbmm_(sin, b)
    h.copy_(_images(out, s))


def backward(s: Tensor, dh: Tensor, coefficients: Tensor, real: Tensor | None, sums: Tensor) -> Tensor:
    """dS from dH (images, h, rows, r); adds da_m = dHᵀ cos(mS) and db_m = dHᵀ sin(mS) to sums. May overwrite s.

    dS = Σ_m m (cos(mS) ⊙ (dH b_m) − sin(mS) ⊙ (dH a_m)).
    """
    dh, ds = _heads(dh), 0
    for m, cos, sin in _harmonics(s, coefficients.shape[1], real):
        a, b = coefficients[:, m - 1].unbind(1)  # (h, r, N)
        ds = ds + (cos * torch.bmm(dh, b)).addcmul_(sin, torch.bmm(dh, a), value=-1).mul_(m)
        for i, values in enumerate((cos, sin)):
            sums[:, m - 1, i] += torch.bmm(dh.transpose(1, 2), values)
    return _images(ds, s)


def _heads(t: Tensor) -> Tensor:
    """(images, h, rows, c) to (h, images·rows, c)."""
    return t.transpose(0, 1).flatten(1, 2)


def _images(t: Tensor, s: Tensor) -> Tensor:
    """The inverse of ``_heads``, for the images of s."""
    return t.unflatten(1, (s.shape[0], s.shape[2])).transpose(0, 1)


def _harmonics(s: Tensor, grid: int, real: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, cos(m s), sin(m s)), each (h, images·rows, N), for m = 1..G from one sin/cos pair by angle addition.

    Masked entries are zero, and stay zero through the recurrence.
    """
    cos1, sin1 = torch.cos(s), torch.sin(s)
    if real is not None:
        cos1, sin1 = cos1 * real[:, None, None], sin1 * real[:, None, None]
    cos, sin = cos1, sin1 = _heads(cos1), _heads(sin1)
    for m in range(1, grid + 1):
        if m > 1:
            cos, sin = (cos * cos1).addcmul_(sin, sin1, value=-1), (sin * cos1).addcmul_(cos, sin1)
        yield m, cos, sin
