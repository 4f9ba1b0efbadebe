"""Both halves of Fourier attention as torch.library ops: kernels, shapes for tracing, autograd that saves only inputs.

No autocast rule is registered, as for the rational op. Kernels: Triton on a GPU; elsewhere, and for float64, blocks of
queries (``blocked.py``), whose functions are C++ on a CPU that has a compiler.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import blocked, linear


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


@torch.library.custom_op("karvis::fourier_mix", mutates_args=())
def fourier_mix_op(z: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(B, h, M, d); see ``fourier_mix``."""
    return linear.forward(z, v, a, b)


@torch.library.custom_op("karvis::fourier_mix_backward", mutates_args=())
def fourier_mix_backward_op(
    grad: Tensor, z: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dv, da, db)."""
    return linear.backward(grad, z, v, a, b)


@fourier_mix_op.register_fake
def _(z, v, a, b):
    return v.new_empty(*z.shape[:3], v.shape[3])


@fourier_mix_backward_op.register_fake
def _(grad, z, v, a, b):
    return tuple(t.new_empty(t.shape) for t in (z, v, a, b))


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


def _mix_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mix_backward(ctx, grad):
    return fourier_mix_backward_op(grad, *ctx.saved_tensors)


fourier_phi_op.register_autograd(_backward, setup_context=_save)
fourier_mix_op.register_autograd(_mix_backward, setup_context=_mix_save)


@register_flop_formula(torch.ops.karvis.fourier_phi)
def _(q_shape, k_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = q_shape
    return 2 * batch * heads * n**2 * (d + 2 * a_shape[1] * a_shape[2])  # scores, and two products per harmonic


@register_flop_formula(torch.ops.karvis.fourier_phi_backward)
def _(grad_shape, q_shape, k_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = q_shape
    return 2 * batch * heads * n**2 * (3 * d + 4 * a_shape[1] * a_shape[2])


@register_flop_formula(torch.ops.karvis.fourier_mix)
def _(z_shape, v_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = v_shape
    return 4 * batch * heads * (z_shape[2] + n) * a_shape[1] * a_shape[3] * d  # sums over the keys, then the queries


@register_flop_formula(torch.ops.karvis.fourier_mix_backward)
def _(grad_shape, z_shape, v_shape, a_shape, *_, **__) -> int:
    batch, heads, n, d = v_shape
    return 4 * batch * heads * (2 * z_shape[2] + 3 * n) * a_shape[1] * a_shape[3] * d


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
