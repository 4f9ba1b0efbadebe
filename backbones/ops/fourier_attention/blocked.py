"""How does Fourier attention run in memory that grows with N, not N²? Block by block of scores, taken again backward.

Per head, with S = scale · Q Kᵀ (arXiv 2503.10632): H_kr = Σ_q φ_rq(S_kq),
φ_rq(s) = Σ_{m=1..G} a_mrq cos(m s) + b_mrq sin(m s), the sum over real keys q; dQ = scale · dS K, dK = scale · dSᵀ Q.
A block is several images, some heads of one image, or some rows of one head.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import eager, native

# Bytes of one block of scores: within a CPU core's cache, large enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_GPU = 2**27


def forward(q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """H (B, h, N, r) in q's type.

    Args:
        q, k: (B, h, N, d) of any strides. Computed in float32, in float64 for float64 q.
        a, b: (h, G, r, N).
        key_mask: (B, N) bool, True = real key. What masked keys hold does not matter, NaN included.
    """
    functions, dtype = _functions(q)
    coefficients = functions.pack(a, b, dtype)
    h = q.new_empty(*q.shape[:3], a.shape[2])
    for images, heads, blocks in _blocks(q):
        keys, real = _keys(k[images, heads], key_mask, images, functions.LANES, dtype)
        for rows in blocks:
            s = _queries(q[images, heads, rows], scale, dtype) @ keys.transpose(-2, -1)
            h[images, heads, rows] = functions.forward(s, coefficients[heads], real).transpose(0, 1)
    return h


def backward(
    dh: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, da, db) in the types of q, k, a and b, from dh (B, h, N, r); the other arguments as in ``forward``."""
    functions, dtype = _functions(q)
    coefficients = functions.pack(a, b, dtype)
    sums = torch.zeros_like(coefficients)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    for images, heads, blocks in _blocks(q):
        keys, real = _keys(k[images, heads], key_mask, images, functions.LANES, dtype)
        dkeys = torch.zeros_like(keys)
        for rows in blocks:
            queries = _queries(q[images, heads, rows], scale, dtype)
            grad = dh[images, heads, rows].transpose(0, 1).to(dtype).contiguous()
            s = queries @ keys.transpose(-2, -1)
            ds = functions.backward(s, grad, coefficients[heads], real, sums[heads])
            dq[images, heads, rows] = (ds @ keys).mul_(scale).transpose(0, 1)
            dkeys.flatten(0, 1).baddbmm_(ds.flatten(0, 1).transpose(1, 2), queries.flatten(0, 1))
        dk[images, heads] = dkeys[:, :, : k.shape[2]].transpose(0, 1)
    da, db = functions.unpack(sums, k.shape[2])
    return dq, dk, *(t.to(p.dtype, memory_format=torch.contiguous_format, copy=True) for t, p in ((da, a), (db, b)))


def _functions(q: Tensor) -> tuple[ModuleType, torch.dtype]:
    """Who takes the functions of a block of scores, and the type that everything is computed in."""
    return native if native.available(q) else eager, torch.promote_types(q.dtype, torch.float32)


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice, list[slice]]]:
    """(images, heads, blocks of rows), the scores of each of which fit the device's block size."""
    batch, heads, n, _ = q.shape
    row_bytes = max(1, n) * torch.promote_types(q.dtype, torch.float32).itemsize
    rows = max(1, _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_GPU) // row_bytes)
    pairs = max(1, rows // max(1, n))  # whole heads of a block
    for images in _slices(batch, max(1, pairs // max(1, heads))):
        for some_heads in _slices(heads, pairs):
            yield images, some_heads, _slices(n, rows)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]


def _queries(q: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Scaled queries (h, images, rows, d)."""
    return q.transpose(0, 1).to(dtype) * scale


def _keys(
    k: Tensor, key_mask: Tensor | None, images: slice, lanes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Keys (h, images, N, d) and which are real (images, N), both padded with zeros to a multiple of ``lanes``.

    Masked keys are zero, so that none of what they hold reaches a score; φ of that score counts for nothing.
    """
    n = k.shape[2]
    keys = k.new_zeros(k.shape[1], k.shape[0], -(-n // lanes) * lanes, k.shape[3], dtype=dtype)
    keys[:, :, :n] = k.transpose(0, 1)
    if key_mask is None:
        return keys, None
    real = keys.new_zeros(keys.shape[1:3])
    real[:, :n] = key_mask[images]
    return keys.masked_fill_(real[..., None] == 0, 0), real
