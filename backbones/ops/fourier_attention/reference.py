"""Fourier-KArAt attention in plain PyTorch, exactly reassociated: the truth that faster forms are compared with.

Functions are φ(s) = Σ_{m=1..G} a_m cos(m s) + b_m sin(m s) (arXiv 2503.10632). With S = scale · Q Kᵀ per head,
H_kr = Σ_q φ_rq(S_kq) and O = H (Wᵀ V), which is the paper's (W Φ̂(S)) V without its second N×N matrix. Harmonics are
added one by one, each as a matrix product, so that neither an N×N×r nor an N×N×G tensor exists.
"""

import torch
from torch import Tensor


def fourier_phi_reference(q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """H = Φ̂(S) (B, h, N, r), differentiable; arguments as in ``fourier_phi``."""
    if key_mask is not None:
        k = torch.where(key_mask[:, None, :, None], k, 0)
    s = (q * scale) @ k.transpose(-2, -1)  # (B, h, N, N)
    h = 0
    for m in range(1, a.shape[1] + 1):
        cos, sin = torch.cos(m * s), torch.sin(m * s)
        if key_mask is not None:
            real = key_mask[:, None, None, :]
            cos, sin = cos * real, sin * real
        h = h + cos @ a[:, m - 1].transpose(-2, -1).to(s.dtype) + sin @ b[:, m - 1].transpose(-2, -1).to(s.dtype)
    return h


def fourier_mix_reference(z: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """O_k = Σ_p v_p Σ_r φ_pr(z_kr), (B, h, M, d), differentiable; arguments as in ``fourier_mix``, without a mask."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    out = 0
    for m in range(1, a.shape[1] + 1):
        for harmonic, c in ((torch.cos(m * wide), a), (torch.sin(m * wide), b)):
            out = out + harmonic.to(v.dtype) @ (c[:, m - 1].transpose(-2, -1).to(v.dtype) @ v)
    return out
