"""How does Fourier attention run in memory that grows with N, not N²? Block by block of scores, taken again backward.

Per head, with S = scale · Q Kᵀ (arXiv 2503.10632): H_kr = Σ_q φ_rq(S_kq),
φ_rq(s) = Σ_{m=1..G} a_mrq cos(m s) + b_mrq sin(m s), the sum over real keys q; dQ = scale · dS K, dK = scale · dSᵀ Q.
A block is several images, some heads of one image, or some rows of one head: adjacent in memory in each case.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import eager, native
from .linear import slices

# Bytes of one block of scores: within a CPU's caches, large enough to fill a GPU.
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
    queries = q.to(dtype).contiguous()
    keys, real = _keys(k, key_mask, functions.LANES, dtype)
    h = queries.new_empty(*q.shape[:3], a.shape[2])
    for images, heads, rows, s in _scores(queries, keys, scale):
        mask = None if real is None else real[images]
        functions.forward(s, coefficients[heads], mask, h[images, heads, rows])
    return h.to(q.dtype)


def backward(
    dh: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, da, db) in the types of q, k, a and b, from dh (B, h, N, r); the other arguments as in ``forward``."""
    functions, dtype = _functions(q)
    coefficients = functions.pack(a, b, dtype)
    queries, grad = q.to(dtype).contiguous(), dh.to(dtype).contiguous()
    keys, real = _keys(k, key_mask, functions.LANES, dtype)
    sums = torch.zeros_like(coefficients)
    dq, dk = torch.empty_like(queries), torch.empty_like(queries)
    for images, heads, rows, s in _scores(queries, keys, scale):
        mask = None if real is None else real[images]
        ds = functions.backward(s, grad[images, heads, rows], coefficients[heads], mask, sums[heads]).flatten(0, 1)
        dq[images, heads, rows].flatten(0, 1).baddbmm_(ds, keys[images, heads].flatten(0, 1), beta=0, alpha=scale)
        dk[images, heads].flatten(0, 1).baddbmm_(
            ds[..., : k.shape[2]].transpose(1, 2),
            queries[images, heads, rows].flatten(0, 1),
            beta=0 if rows.start == 0 else 1,  # dk has no values before the first rows
            alpha=scale,
        )
    da, db = (t.clone(memory_format=torch.contiguous_format) for t in functions.unpack(sums, k.shape[2]))
    return dq.to(q.dtype), dk.to(k.dtype), da.to(a.dtype), db.to(b.dtype)


def _functions(q: Tensor) -> tuple[ModuleType, torch.dtype]:
    """Who takes the functions of a block of scores, and the type that everything is computed in."""
    return native if native.available(q) else eager, torch.promote_types(q.dtype, torch.float32)


def _keys(k: Tensor, key_mask: Tensor | None, lanes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys (B, h, N, d) and which are real (B, N), both padded with zeros to a multiple of ``lanes``.

    Masked keys are zero, so that none of what they hold reaches a score; φ of that score counts for nothing.
    """
    batch, heads, n, d = k.shape
    if key_mask is None and n % lanes == 0:
        return k.to(dtype).contiguous(), None
    keys = k.new_zeros(batch, heads, -(-n // lanes) * lanes, d, dtype=dtype)
    keys[:, :, :n] = k
    if key_mask is None:
        return keys, None
    real = keys.new_zeros(batch, keys.shape[2])
    real[:, :n] = key_mask
    return keys.masked_fill_(real[:, None, :, None] == 0, 0), real


def _scores(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """(images, heads, rows, their scores (images, h, rows, N)) block by block, each of which overwrites the last."""
    batch, heads, n, _ = q.shape
    most = max(1, _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_GPU) // (k.shape[2] * q.itemsize))  # rows of a block
    pairs = max(1, most // n)  # whole heads of a block
    space = q.new_empty(min(batch * heads * n, most) * k.shape[2])
    for images in slices(batch, max(1, pairs // heads)):
        for some_heads in slices(heads, pairs):
            keys = k[images, some_heads].flatten(0, 1).transpose(1, 2)
            for rows in slices(n, most):
                queries = q[images, some_heads, rows]
                s = space[: queries.numel() // q.shape[3] * k.shape[2]].view(*queries.shape[:3], k.shape[2])
                s.flatten(0, 1).baddbmm_(queries.flatten(0, 1), keys, beta=0, alpha=scale)
                yield images, some_heads, rows, s
