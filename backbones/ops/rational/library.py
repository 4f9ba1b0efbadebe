"""The operators as torch.library ops: choice of the kernel, shapes for tracing, and autograd that saves only inputs.

No autocast rule is registered, on purpose: a rule could only cast x, and without one the ops take it as it comes.
Kernels: Triton on a GPU, ``native.cpp`` on a CPU with a C++ compiler, ``eager.py`` elsewhere and for float64.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import eager, native


@torch.library.custom_op("karvis::group_rational", mutates_args=())
def group_rational_op(x: Tensor, bias: Tensor | None, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x + bias); see ``group_rational``."""
    rows = _rows(x)
    if not rows.numel():
        return x.new_empty(x.shape)
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.forward(rows, bias, *_dense(numerator, denominator), form).view(x.shape)
    return _plain(x, numerator, denominator).forward(_biased(rows, bias), numerator, denominator, form).view(x.shape)


@torch.library.custom_op("karvis::group_rational_backward", mutates_args=())
def group_rational_backward_op(
    grad: Tensor, x: Tensor, bias: Tensor | None, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbias, dnumerator, ddenominator); dbias is empty without a bias."""
    rows, grads = _rows(x), _rows(grad)
    kernels = _kernels(x)
    if not rows.numel():
        dx, da, db = rows.new_empty(rows.shape), torch.zeros_like(numerator), torch.zeros_like(denominator)
        dbias = None if bias is None else torch.zeros_like(bias)
    elif kernels is not None:
        dx, dbias, da, db = kernels.backward(grads, rows, bias, *_dense(numerator, denominator), form)
    else:
        implementation = _plain(x, numerator, denominator)
        dx, da, db = implementation.backward(grads, _biased(rows, bias), numerator, denominator, form)
        dbias = None if bias is None else dx.sum(0, dtype=_wide(bias)).to(bias.dtype)
    return dx.view(x.shape), x.new_empty(0) if dbias is None else dbias, da, db


@torch.library.custom_op("karvis::norm_rational", mutates_args=())
def norm_rational_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, numerator: Tensor, denominator: Tensor, form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(F(LayerNorm(x)) in ``dtype``, mean, 1/σ); the last two are one number per row."""
    rows = _rows(x)
    kernels = _kernels(x)
    if not rows.numel():
        empty = x.new_empty(len(rows), dtype=_wide(x))
        return x.new_empty(x.shape, dtype=dtype), empty, empty.clone()
    if kernels is not None:
        out, mean, rstd = kernels.norm_forward(rows, weight, bias, eps, *_dense(numerator, denominator), form, dtype)
    else:
        normal, mean, rstd = _layer_norm(rows, weight, bias, eps)
        out = _plain(normal, numerator, denominator).forward(normal, numerator, denominator, form).to(dtype)
    return out.view(x.shape), mean, rstd


@torch.library.custom_op("karvis::norm_rational_backward", mutates_args=())
def norm_rational_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, numerator: Tensor,
    denominator: Tensor, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias, dnumerator, ddenominator)."""
    rows, grads = _rows(x), _rows(grad)
    kernels = _kernels(x)
    if not rows.numel():
        zeros = [torch.zeros_like(t) for t in (weight, bias, numerator, denominator)]
        return x.new_empty(x.shape), *zeros
    if kernels is not None:
        coefficients = _dense(numerator, denominator)
        dx, dw, dbias, da, db = kernels.norm_backward(grads, rows, weight, bias, mean, rstd, *coefficients, form)
        return dx.view(x.shape), dw, dbias, da, db
    scale = (rows.to(mean.dtype) - mean[:, None]) * rstd[:, None]
    normal = (scale * weight + bias).to(torch.promote_types(x.dtype, weight.dtype))
    implementation = _plain(normal, numerator, denominator)
    dnormal, da, db = implementation.backward(grads.to(normal.dtype), normal, numerator, denominator, form)
    dx, dw, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormal.to(mean.dtype), rows.to(mean.dtype), [x.shape[-1]], mean[:, None], rstd[:, None],
        weight.to(mean.dtype), bias.to(mean.dtype), [True, True, True],
    )  # fmt: skip
    return dx.view(x.shape).to(x.dtype), dw.to(weight.dtype), dbias.to(bias.dtype), da, db


@group_rational_op.register_fake
def _(x, bias, numerator, denominator, form):
    return x.new_empty(x.shape)


@group_rational_backward_op.register_fake
def _(grad, x, bias, numerator, denominator, form):
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), dbias, numerator.new_empty(numerator.shape), denominator.new_empty(denominator.shape)


@norm_rational_op.register_fake
def _(x, weight, bias, eps, numerator, denominator, form, dtype):
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=_wide(x)) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), mean, rstd


@norm_rational_backward_op.register_fake
def _(grad, x, weight, bias, mean, rstd, numerator, denominator, form):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias, numerator, denominator))


def _save(ctx, inputs, output):
    x, bias, numerator, denominator, ctx.form = inputs
    ctx.save_for_backward(x, bias, numerator, denominator)


def _backward(ctx, grad):
    x, bias, numerator, denominator = ctx.saved_tensors  # read once: checkpointing allows no more
    dx, dbias, da, db = group_rational_backward_op(grad, x, bias, numerator, denominator, ctx.form)
    return dx, None if bias is None else dbias, da, db, None


def _norm_save(ctx, inputs, output):
    x, weight, bias, _, numerator, denominator, ctx.form, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd, numerator, denominator)
    ctx.mark_non_differentiable(mean, rstd)


def _norm_backward(ctx, grad, *_):
    dx, dw, dbias, da, db = norm_rational_backward_op(grad, *ctx.saved_tensors, ctx.form)
    return dx, dw, dbias, None, da, db, None, None


group_rational_op.register_autograd(_backward, setup_context=_save)
norm_rational_op.register_autograd(_norm_backward, setup_context=_norm_save)


def fuses(x: Tensor) -> bool:
    """Whether a bias or a LayerNorm before F costs no pass of its own: True where the Triton kernels run."""
    return _kernels(x) is not None


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels when they can take x; imported here, at the first launch."""
    return _triton() if x.is_cuda and x.dtype != torch.float64 else None


@cache
def _triton() -> ModuleType | None:
    try:
        from . import triton
    except ImportError:
        return None
    return triton


def _plain(x: Tensor, numerator: Tensor, denominator: Tensor) -> ModuleType:
    return native if native.available(x, (numerator.shape[1] - 1, denominator.shape[1])) else eager


def _rows(x: Tensor) -> Tensor:
    """(rows, C) with adjacent channels, without a copy for any tensor that is already laid out so."""
    if not (_kernels(x) and x.stride(-1) == 1 and x.data_ptr() % 16 == 0):
        return x.reshape(-1, x.shape[-1]).contiguous()
    try:
        rows = x.view(-1, x.shape[-1])
    except RuntimeError:
        return x.reshape(-1, x.shape[-1])
    return rows if rows.stride(0) * x.element_size() % 16 == 0 and rows.stride(0) else rows.contiguous()


def _dense(*coefficients: Tensor) -> tuple[Tensor, ...]:
    return tuple(c.contiguous() for c in coefficients)


def _biased(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else (rows + bias).to(rows.dtype)


def _layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(rows)
    normal, mean, rstd = torch.ops.aten.native_layer_norm(
        rows.to(wide), [rows.shape[1]], weight.to(wide), bias.to(wide), eps
    )
    return normal.to(torch.promote_types(rows.dtype, weight.dtype)), mean[:, 0], rstd[:, 0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
