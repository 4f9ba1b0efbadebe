"""Fourier-KArAt attention over blocks of queries, recomputed in the backward pass: memory grows with N, not N².

The derivatives of the formula in reference.py, per head, with dH = dO Uᵀ and U = Wᵀ V:
dS = Σ_m m (cos(mS) ⊙ (dH b_m) − sin(mS) ⊙ (dH a_m)), da_m = dHᵀ cos(mS), db_m = dHᵀ sin(mS), dU = Hᵀ dO.
Heads come first and the images of a block are stacked, so that each product with the coefficients is one per head.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one block of scores: within a CPU core's cache, large enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_GPU = 2**27


class FourierAttention(torch.autograd.Function):
    """Same values and gradients as ``fourier_attention_reference``; saves only the inputs."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, w, key_mask, scale):
        ctx.save_for_backward(q, k, v, a, b, w, key_mask)
        ctx.scale = scale
        u = w.transpose(-2, -1) @ _masked(v, key_mask)  # (B, h, r, d)
        a, b = (t.permute(1, 0, 3, 2).contiguous() for t in (a, b))  # (G, h, N, r)
        out = torch.empty_like(q)
        for images, rows in _blocks(q):
            s = _scores(q[images, :, rows], k[images], scale)  # (h, images·rows, N)
            h = 0
            for m, cos, sin in _harmonics(s, len(a), key_mask, images):
                h = torch.bmm(cos, a[m - 1]) if m == 1 else h.baddbmm_(cos, a[m - 1])
                h.baddbmm_(sin, b[m - 1])
            h = h.unflatten(1, (images.stop - images.start, -1)).transpose(0, 1)  # (images, h, rows, r)
            out[images, :, rows] = h @ u[images]
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, a, b, w, key_mask = ctx.saved_tensors
        vr = _masked(v, key_mask)
        u = w.transpose(-2, -1) @ vr
        a, b = (t.transpose(0, 1).contiguous() for t in (a, b))  # (G, h, r, N)
        dq, dk, du = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(u)
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for images, rows in _blocks(q):
            qb, do, count = q[images, :, rows], grad[images, :, rows], images.stop - images.start
            dh = _stack(do @ u[images].transpose(-2, -1))  # (h, images·rows, r)
            dht = dh.transpose(1, 2)
            s = _scores(qb, k[images], ctx.scale)
            ds, h = torch.zeros_like(s), torch.zeros_like(dh)
            for m, cos, sin in _harmonics(s, len(a), key_mask, images):
                am, bm = a[m - 1], b[m - 1]
                h.baddbmm_(cos, am.transpose(1, 2)).baddbmm_(sin, bm.transpose(1, 2))
                ds.addcmul_(cos, torch.bmm(dh, bm), value=m).addcmul_(sin, torch.bmm(dh, am), value=-m)
                da[m - 1].baddbmm_(dht, cos)
                db[m - 1].baddbmm_(dht, sin)
            du[images] += h.unflatten(1, (count, -1)).transpose(0, 1).transpose(-2, -1) @ do
            ds = ds.unflatten(1, (count, -1)).transpose(0, 1)  # (images, h, rows, N)
            dq[images, :, rows] = ds @ k[images] * ctx.scale
            dk[images] += ds.transpose(-2, -1) @ qb * ctx.scale
        dv = _masked(w @ du, key_mask)
        dw = (vr @ du.transpose(-2, -1)).sum(0)
        return dq, dk, dv, da.transpose(0, 1), db.transpose(0, 1), dw, None, None


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Pairs (images, rows): several whole images, or some rows of one, whose scores fit the device's block size."""
    batch, heads, n, _ = q.shape
    row_bytes = max(1, heads * n * q.element_size())
    rows = min(n, max(8, _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_GPU) // row_bytes))
    images = 1 if rows < n else max(1, _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_GPU) // (row_bytes * max(1, n)))
    for first in range(0, batch, images):
        for start in range(0, n, max(1, rows)):
            yield slice(first, min(batch, first + images)), slice(start, min(n, start + rows))


def _stack(t: Tensor) -> Tensor:
    """(images, h, rows, c) to (h, images·rows, c)."""
    return t.transpose(0, 1).flatten(1, 2)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled scores (h, images·rows, N)."""
    return (q.transpose(0, 1) * scale @ k.transpose(0, 1).transpose(-2, -1)).flatten(1, 2)


def _harmonics(s: Tensor, grid: int, key_mask: Tensor | None, images: slice) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, cos(m s), sin(m s)) for m = 1..G, zero at masked keys, from one sin/cos pair by angle addition.

    Masked entries stay zero through the recurrence.
    """
    cos1, sin1 = torch.cos(s), torch.sin(s)
    if key_mask is not None:
        real = key_mask[images, None].to(s.dtype)  # (images, 1, N)
        for t in (cos1, sin1):
            t.unflatten(1, (len(real), -1)).mul_(real)
    cos, sin = cos1, sin1
    yield 1, cos, sin
    for m in range(2, grid + 1):
        cos, sin = (cos * cos1).addcmul_(sin, sin1, value=-1), (sin * cos1).addcmul_(cos, sin1)
        yield m, cos, sin


def _masked(t: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B, h, N, d) with the rows of masked tokens set to zero."""
    return t if key_mask is None else t * key_mask[:, None, :, None]
