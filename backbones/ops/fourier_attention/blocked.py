"""Fourier-KArAt attention over blocks of queries, recomputed in the backward pass: memory grows with N, not N².

The derivatives of the formula in reference.py, per head, with dH = dO Uᵀ and U = Wᵀ V:
dS = Σ_m m (cos(mS) ⊙ (dH b_m) − sin(mS) ⊙ (dH a_m)), da_m = dHᵀ cos(mS), db_m = dHᵀ sin(mS), dU = Hᵀ dO.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one scores tile: within a CPU core's cache, large enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 2**20}
_BLOCK_BYTES_GPU = 2**27


class FourierAttention(torch.autograd.Function):
    """Same values and gradients as ``fourier_attention_reference``; saves only the inputs."""

    @staticmethod
    def forward(ctx, q, k, v, a, b, w, key_mask, scale):
        ctx.save_for_backward(q, k, v, a, b, w, key_mask)
        ctx.scale = scale
        real = None if key_mask is None else key_mask[:, None, :, None].to(q.dtype)
        u = w.transpose(-2, -1) @ (v if real is None else v * real)  # (B, h, r, d)
        at, bt = a.transpose(-2, -1), b.transpose(-2, -1)  # (h, G, N, r)
        out = torch.empty_like(q)
        for rows in _blocks(q, k):
            out[:, :, rows] = _functions(_scores(q[:, :, rows], k, scale), at, bt, real) @ u
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, a, b, w, key_mask = ctx.saved_tensors
        real = None if key_mask is None else key_mask[:, None, :, None].to(q.dtype)
        vr = v if real is None else v * real
        u = w.transpose(-2, -1) @ vr
        at, bt = a.transpose(-2, -1), b.transpose(-2, -1)
        dq, dk, du = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(u)
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for rows in _blocks(q, k):
            do = grad[:, :, rows]
            s = _scores(q[:, :, rows], k, ctx.scale)
            dh = do @ u.transpose(-2, -1)  # (B, h, n, r)
            du += _functions(s, at, bt, real).transpose(-2, -1) @ do
            ds = torch.zeros_like(s)
            for m, cos, sin in _harmonics(s, a.shape[1]):
                if real is not None:
                    cos, sin = cos * real.transpose(-2, -1), sin * real.transpose(-2, -1)
                ds.addcmul_(cos, dh @ b[:, m - 1], value=m).addcmul_(sin, dh @ a[:, m - 1], value=-m)
                da[:, m - 1] += (dh.transpose(-2, -1) @ cos).sum(0)
                db[:, m - 1] += (dh.transpose(-2, -1) @ sin).sum(0)
            dq[:, :, rows] = ds @ k * ctx.scale
            dk.add_(ds.transpose(-2, -1) @ q[:, :, rows], alpha=ctx.scale)
        dv = w @ du
        dw = (vr @ du.transpose(-2, -1)).sum(0)
        return dq, dk, dv if real is None else dv * real, da, db, dw, None, None


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the queries whose scores tile stays within the device's block size."""
    batch, heads, n, _ = q.shape
    row_bytes = max(1, batch * heads * k.shape[2] * q.element_size())
    size = max(8, _BLOCK_BYTES.get(q.device.type, _BLOCK_BYTES_GPU) // row_bytes)
    for start in range(0, n, size):
        yield slice(start, start + size)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q * scale) @ k.transpose(-2, -1)


def _harmonics(s: Tensor, grid: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, cos(m s), sin(m s)) for m = 1..G, by the angle-addition recurrence from one sin/cos pair."""
    cos1, sin1 = torch.cos(s), torch.sin(s)
    cos, sin = cos1, sin1
    yield 1, cos, sin
    for m in range(2, grid + 1):
        cos, sin = cos * cos1 - sin * sin1, sin * cos1 + cos * sin1
        yield m, cos, sin


def _functions(s: Tensor, at: Tensor, bt: Tensor, real: Tensor | None) -> Tensor:
    """H (B, h, n, r) = Σ_q φ_rq(S_kq); masked keys are left out through their coefficients."""
    h = None
    for m, cos, sin in _harmonics(s, at.shape[1]):
        am, bm = at[:, m - 1], bt[:, m - 1]  # (h, N, r)
        if real is not None:
            am, bm = am * real, bm * real  # (B, h, N, r)
        term = cos @ am + sin @ bm
        h = term if h is None else h + term
    return h
