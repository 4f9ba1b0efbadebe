"""How does order ``phi_w`` stay linear in time and memory? Harmonics of Z meet sums over the keys, block by block.

O_k = Σ_i f_i(Z_k) · sums_i per head, with f = (cos m z_r, sin m z_r) for m = 1..G, r = 1..R, and sums = (aᵀ V, bᵀ V) of
(2·G·R, d) (arXiv 2503.10632, reassociated). The backward pass takes sums and harmonics again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Numbers of one block of harmonics or functions: within a CPU's caches, or enough to fill a GPU.
_BLOCK = {"cpu": 2**20}
_BLOCK_GPU = 2**25


def forward(z: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(B, h, M, d) in v's type from z (B, h, M, r), v (B, h, N, d) and a, b (h, G, N, r)."""
    sums = v.new_empty(*v.shape[:2], 2 * a.shape[1] * a.shape[3], v.shape[3])
    for heads in _heads(a, v):
        sums[:, heads] = _functions(a[heads], b[heads], v.dtype) @ v[:, heads]
    out = v.new_empty(*z.shape[:3], v.shape[3])
    for rows in _blocks(z, sums):
        cos, sin = _harmonics(z[rows], a.shape[1])
        out[rows] = torch.cat([cos, sin], -1).to(v.dtype) @ sums[rows[:2]]
    return out


def backward(grad: Tensor, z: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dv, da, db), with (dcos, dsin) = dO sumsᵀ, dz_r = Σ_m m (dsin_mr cos m z_r − dcos_mr sin m z_r),
    dsums = (cos, sin)ᵀ dO, (da, db) = V dsumsᵀ and dv = (a, b) dsums.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    sums = v.new_empty(*v.shape[:2], 2 * a.shape[1] * a.shape[3], v.shape[3])
    for heads in _heads(a, v):
        sums[:, heads] = _functions(a[heads], b[heads], v.dtype) @ v[:, heads]
    dz, dsums = z.new_empty(z.shape), torch.zeros_like(sums, dtype=wide)
    for rows in _blocks(z, sums):
        cos, sin = _harmonics(z[rows], a.shape[1])
        dcos, dsin = (grad[rows] @ sums[rows[:2]].transpose(-2, -1)).to(cos.dtype).chunk(2, -1)
        slopes = (dsin * cos).addcmul_(dcos, sin, value=-1).unflatten(-1, (-1, z.shape[3]))  # (..., G, r)
        dz[rows] = (slopes * _orders(a.shape[1], cos)).sum(-2)
        dsums[rows[:2]] += torch.cat([cos, sin], -1).to(grad.dtype).transpose(-2, -1) @ grad[rows]
    dsums = dsums.to(v.dtype)
    dv, da, db = v.new_empty(v.shape), a.new_empty(a.shape), b.new_empty(b.shape)
    for heads in _heads(a, v):
        functions = _functions(a[heads], b[heads], v.dtype)
        dv[:, heads] = functions.transpose(-2, -1) @ dsums[:, heads]
        slopes = _over_batch(v[:, heads], dsums[:, heads]).to(wide)  # (h, N, 2·G·r)
        slopes = slopes.unflatten(-1, (2, a.shape[1], a.shape[3])).permute(2, 0, 3, 1, 4)
        da[heads], db[heads] = slopes.unbind()
    return dz, dv, da, db


def _functions(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(h, 2·G·r, N) of a, b (h, G, N, r)."""
    return torch.cat([a.transpose(2, 3), b.transpose(2, 3)], 1).flatten(1, 2).to(dtype)


def _over_batch(v: Tensor, dsums: Tensor) -> Tensor:
    """Σ over the images of V dsumsᵀ, (h, N, 2·G·r): one product per head over images and channels."""
    images_and_channels = v.permute(1, 2, 0, 3).flatten(2)  # (h, N, B·d)
    return images_and_channels @ dsums.permute(1, 0, 3, 2).flatten(1, 2)


def _heads(a: Tensor, v: Tensor) -> list[slice]:
    """Heads whose functions, or values of all images, fill a block."""
    each = max(2 * a[0].numel(), v[:, :1].numel(), 1)
    return slices(a.shape[0], max(1, _BLOCK.get(a.device.type, _BLOCK_GPU) // each))


def _blocks(z: Tensor, sums: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(images, heads, rows): several images, some heads of one, or some rows of one head, adjacent in memory."""
    batch, heads, n, _ = z.shape
    most = max(1, _BLOCK.get(z.device.type, _BLOCK_GPU) // sums.shape[2])  # rows
    pairs = max(1, most // max(1, n))  # whole heads
    for images in slices(batch, max(1, pairs // heads)):
        for some_heads in slices(heads, pairs):
            for rows in slices(n, most):
                yield images, some_heads, rows


def slices(total: int, size: int) -> list[slice]:
    """``range(total)`` in pieces of ``size``."""
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def _harmonics(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin of m z_r for m = 1..count, each (..., count·r), in float32 at least."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    angles = (wide[..., None, :] * _orders(count, wide)).flatten(-2)
    return angles.cos(), angles.sin()


def _orders(count: int, like: Tensor) -> Tensor:
    return torch.arange(1, count + 1, device=like.device, dtype=like.dtype)[:, None]
