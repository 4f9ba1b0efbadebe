"""Fourier-KArAt attention and its two halves: checks, and the products around the kernel."""

import torch
from torch import Tensor

from ...utils.errors import check_choice
from .library import fourier_mix_op, fourier_phi_op
from .reference import fourier_mix_reference, fourier_phi_reference

__all__ = ["ORDERS", "fourier_attention", "fourier_mix", "fourier_phi"]

ORDERS = ("w_phi", "phi_w")


def fourier_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    order: str = "w_phi",
) -> Tensor:
    """Attention whose weights are learnable functions of the scores instead of their softmax (arXiv 2503.10632).

    Per head, with functions φ(s) = Σ_m a_m cos(m s) + b_m sin(m s) and S = scale · Q Kᵀ:
    ``w_phi`` is O = (W Φ̂(S)) V, in time N² and memory N; ``phi_w`` is O = Φ̂(W S) V, exact in time and memory N.

    Args:
        q, k, v: (B, h, N, d), floating point, of one type.
        a, b: coefficients of the cosines and sines: (h, G, r, N) for ``w_phi``, (h, G, N, r) for ``phi_w``.
        w: (h, N, r) for ``w_phi``, (h, r, N) for ``phi_w``.
        key_mask: (B, N) bool, True = real token. A masked key adds nothing to Φ̂ and its value gets no weight.
        scale: factor of the scores; None = 1/√d.
        order: ``w_phi`` or ``phi_w``.

    Returns:
        (B, h, N, d) in q's type. Products take operands of q's type and add up in float32 at least; scores and their
        functions are float32 (float64 for float64 inputs). Gradients are equal bit for bit in every run.

    Raises:
        ValueError: for an unknown order, and when shapes, types or devices do not fit each other, naming both.
    """
    check_choice("order", order, ORDERS)
    _check_tokens(q, k, v, key_mask)
    rank_last = order == "phi_w"
    _check_functions(a, b, q, rank_last)
    heads, n, rank = q.shape[1], q.shape[2], a.shape[3 if rank_last else 2]
    expected = (heads, rank, n) if rank_last else (heads, n, rank)
    if w.shape != expected:
        names = f"(h={heads}, r={rank}, N={n})" if rank_last else f"(h={heads}, N={n}, r={rank})"
        raise ValueError(f"w must be {names} for order {order!r}, got {tuple(w.shape)}.")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if rank_last:
            z = q @ ((w * scale).to(q.dtype) @ _masked(k, key_mask)).transpose(-2, -1)
            return _mix(z, _masked(v, key_mask), a, b)
        return _phi(q, k, a, b, key_mask, scale) @ (w.to(q.dtype).transpose(-2, -1) @ _masked(v, key_mask))


def fourier_phi(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The first half of order ``w_phi``: H = Φ̂(scale · Q Kᵀ), (B, h, N, r) in q's type; arguments as there.

    Scores are never stored: forward and backward compute them tile by tile.
    """
    _check_tokens(q, k, k, key_mask)
    _check_functions(a, b, q, rank_last=False)
    return _phi(q, k, a, b, key_mask, q.shape[3] ** -0.5 if scale is None else scale)


def fourier_mix(z: Tensor, v: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The second half of order ``phi_w``: O_k = Σ_p v_p Σ_r φ_pr(z_kr), linear in the number of tokens.

    Args:
        z: (B, h, M, r), r numbers per query.
        v: (B, h, N, d).
        a, b: (h, G, N, r).
        key_mask: (B, N) bool, True = real token.

    Returns:
        (B, h, M, d) in v's type.
    """
    if z.dim() != 4 or v.dim() != 4 or z.shape[:2] != v.shape[:2]:
        raise ValueError(f"z must be (B, h, M, r) and v (B, h, N, d), got {tuple(z.shape)} and {tuple(v.shape)}.")
    _check_tokens(v, v, v, key_mask)
    _check_functions(a, b, v, rank_last=True)
    if a.shape[3] != z.shape[3]:
        raise ValueError(f"z holds r={z.shape[3]} numbers per query, a and b have r={a.shape[3]}.")
    with torch.autocast(z.device.type, enabled=False):
        return _mix(z, _masked(v, key_mask), a, b)


def _phi(q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    function = fourier_phi_reference if torch.compiler.is_exporting() else fourier_phi_op
    return function(q, k, a, b, key_mask, scale)


def _mix(z: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    function = fourier_mix_reference if torch.compiler.is_exporting() else fourier_mix_op
    return function(z, v, a, b)


def _masked(t: Tensor, key_mask: Tensor | None) -> Tensor:
    """(B, h, N, d) with the rows of masked tokens set to zero, also where they are not finite."""
    return t if key_mask is None else torch.where(key_mask[:, None, :, None], t, 0)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must share one shape (B, h, N, d), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must be of one floating-point type, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if key_mask is not None and (key_mask.shape != (q.shape[0], q.shape[2]) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool (B={q.shape[0]}, N={q.shape[2]}), got {key_mask.dtype} {tuple(key_mask.shape)}."
        )


def _check_functions(a: Tensor, b: Tensor, q: Tensor, rank_last: bool) -> None:
    heads, n = q.shape[1:3]
    axis = 2 if rank_last else 3
    if a.dim() != 4 or a.shape != b.shape or a.shape[0] != heads or a.shape[axis] != n:
        names = f"(h={heads}, G, N={n}, r)" if rank_last else f"(h={heads}, G, r, N={n})"
        raise ValueError(
            f"a and b must be {names}, got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Resample the coefficients to another number of tokens."
        )
    if not a.shape[1]:
        raise ValueError("a and b hold no harmonic; G must be at least 1.")
    if a.device != q.device:
        raise ValueError(f"q is on {q.device} and the coefficients on {a.device}; move both to one device.")
