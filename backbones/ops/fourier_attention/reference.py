"""Fourier-KArAt attention in plain PyTorch, exactly reassociated: the truth that faster forms are compared with.

Per head, with S = scale · Q Kᵀ: H_kr = Σ_q φ_rq(S_kq), φ_rq(s) = Σ_{m=1..G} a_mrq cos(m s) + b_mrq sin(m s), and
O = H (Wᵀ V), which is (W Φ̂(S)) V of arXiv 2503.10632 without its second N×N matrix. Harmonics are added one by one,
each as a matrix product, so that neither an N×N×r nor an N×N×G tensor exists.
"""

import torch
from torch import Tensor


def fourier_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    """Differentiable decomposition; arguments as in ``fourier_attention``."""
    s = (q * scale) @ k.transpose(-2, -1)  # (B, h, N, N)
    h = 0
    for m in range(1, a.shape[1] + 1):
        cos, sin = torch.cos(m * s), torch.sin(m * s)
        if key_mask is not None:
            real = key_mask[:, None, None, :]
            cos, sin = cos * real, sin * real
        h = h + cos @ a[:, m - 1].transpose(-2, -1) + sin @ b[:, m - 1].transpose(-2, -1)  # (B, h, N, r)
    if key_mask is not None:
        v = v * key_mask[:, None, :, None]
    return h @ (w.transpose(-2, -1) @ v)
