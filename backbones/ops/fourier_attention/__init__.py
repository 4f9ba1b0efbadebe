"""``fourier_attention``: checks and dispatch of Fourier-KArAt attention."""

import torch
from torch import Tensor

from .blocked import FourierAttention


def fourier_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention whose weights are learnable functions of the scores instead of their softmax (arXiv 2503.10632).

    O = (W Φ̂(scale · Q Kᵀ)) V per head, with Φ̂'s functions φ(s) = Σ_m a_m cos(m s) + b_m sin(m s).

    Args:
        q, k, v: (B, h, N, d), floating point.
        a, b: (h, G, r, N), cosine and sine coefficients of φ_rq for harmonic m = 1..G.
        w: (h, N, r).
        key_mask: (B, N) bool, True = real token. A masked key adds nothing to Φ̂ and its value gets no weight.
        scale: factor of the scores; None = 1/√d.

    Returns:
        (B, h, N, d) in q's type. Computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: when shapes do not fit each other, naming both.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must share one shape (B, h, N, d), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if not q.is_floating_point():
        raise ValueError(f"fourier_attention needs floating-point q, got {q.dtype}.")
    batch, heads, n, d = q.shape
    if a.dim() != 4 or a.shape != b.shape or a.shape[0] != heads or a.shape[3] != n:
        raise ValueError(
            f"a and b must be (h={heads}, G, r, N={n}), got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Resample the coefficients to another number of tokens."
        )
    if w.shape != (heads, n, a.shape[2]):
        raise ValueError(f"w must be (h={heads}, N={n}, r={a.shape[2]}), got {tuple(w.shape)}.")
    if key_mask is not None and (key_mask.shape != (batch, n) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool (B={batch}, N={n}), got {key_mask.dtype} {tuple(key_mask.shape)}.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        tensors = (t.to(dtype) for t in (q, k, v, a, b, w))
        return FourierAttention.apply(*tensors, key_mask, d**-0.5 if scale is None else scale).to(q.dtype)
