"""H = Φ̂(scale · Q Kᵀ) as a torch.library op: choice of the kernel, shapes for tracing, autograd that saves only inputs.

No autocast rule is registered, as for the rational op. Kernels: Triton on a GPU; elsewhere, and for float64, blocks of
queries (``blocked.py``), whose functions are C++ on a CPU that has a compiler.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import blocked


@torch.library.custom_op("karvis::fourier_phi", mutates_args=())
def fourier_phi_op(q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """(B, h, N, r); see ``fourier_phi``."""
    if not q.numel():
        return q.new_zeros(*q.shape[:3], a.shape[2])
    return _kernels(q).forward(q, k, a, b, key_mask, scale)


@torch.library.custom_op("karvis::fourier_phi_backward", mutates_args=())
def fourier_phi_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, da, db)."""
    if not q.numel():
        return tuple(t.new_zeros(t.shape) for t in (q, k, a, b))
    return _kernels(q).backward(grad, q, k, a, b, key_mask, scale)


@fourier_phi_op.register_fake
def _(q, k, a, b, key_mask, scale):
    return q.new_empty(*q.shape[:3], a.shape[2])


@fourier_phi_backward_op.register_fake
def _(grad, q, k, a, b, key_mask, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, a, b))


def _save(ctx, inputs, output):
    q, k, a, b, key_mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, a, b, key_mask)


def _backward(ctx, grad):
    grads = fourier_phi_backward_op(grad, *ctx.saved_tensors, ctx.scale)  # read once: checkpointing allows no more
    return *grads, None, None


fourier_phi_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.karvis.fourier_phi)
def _(q_shape, k_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = q_shape
    return 2 * batch * heads * n**2 * (d + 2 * a_shape[1] * a_shape[2])  # scores, and two products per harmonic


@register_flop_formula(torch.ops.karvis.fourier_phi_backward)
def _(grad_shape, q_shape, k_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = q_shape
    return 2 * batch * heads * n**2 * (3 * d + 4 * a_shape[1] * a_shape[2])


def _kernels(q: Tensor) -> ModuleType:
    kernels = _triton() if q.is_cuda and q.dtype != torch.float64 else None
    return blocked if kernels is None else kernels


@cache
def _triton() -> ModuleType | None:
    try:
        from . import triton  # imported here, at the first launch
    except ImportError:
        return None
    return triton
