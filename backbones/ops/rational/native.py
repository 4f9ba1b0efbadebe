"""The CPU kernel: ``native.cpp`` built on first use by the C++ compiler at hand, and called without copies."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native_build

_SOURCE = Path(__file__).with_name("native.cpp")
_CHUNK = 32  # rows whose coefficient gradients share one partial sum: their data stays within the caches
DTYPES = (torch.float32, torch.bfloat16)


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x) for contiguous x (rows, C); arguments as in ``group_rational``."""
    library = _library(numerator.shape[1] - 1, denominator.shape[1], form == "abs_sum", x.dtype == torch.bfloat16)
    a, b, groups = _coefficients(numerator, denominator, form)
    out = torch.empty_like(x)
    sizes = (x.shape[0], groups, x.shape[1] // groups, _CHUNK, torch.get_num_threads())
    library.rational_forward(*map(native_build.pointer, (x, a, b, out)), *_integers(sizes))
    return out


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dnumerator, ddenominator) for contiguous grad and x (rows, C)."""
    library = _library(numerator.shape[1] - 1, denominator.shape[1], form == "abs_sum", x.dtype == torch.bfloat16)
    a, b, groups = _coefficients(numerator, denominator, form)
    dx = torch.empty_like(x)
    sums = torch.empty(-(-x.shape[0] // _CHUNK), groups, a.shape[1] + b.shape[1])
    sizes = (x.shape[0], groups, x.shape[1] // groups, _CHUNK, torch.get_num_threads())
    library.rational_backward(*map(native_build.pointer, (grad, x, a, b, dx, sums)), *_integers(sizes))
    da, db = sums.sum(0, dtype=torch.float64).split([a.shape[1], b.shape[1]], 1)
    if form == "sum_abs":
        db = torch.where(denominator < 0, -db, db)
    return dx, _shared(da, numerator), _shared(db, denominator)


def available(x: Tensor, degrees: tuple[int, int]) -> bool:
    """Whether the kernel can be used for x; builds it when it has not been built yet."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or not native_build.enabled():
        return False
    return _library(*degrees, False, x.dtype == torch.bfloat16) is not None


def _library(degree_p: int, degree_q: int, signed: bool, bf16: bool) -> ctypes.CDLL | None:
    defines = {"DEGREE_P": degree_p, "DEGREE_Q": degree_q, "SIGNED": int(signed), "BF16": int(bf16)}
    return native_build.library(_SOURCE, **defines)


def _coefficients(numerator: Tensor, denominator: Tensor, form: str) -> tuple[Tensor, Tensor, int]:
    groups = max(len(numerator), len(denominator))
    a, b = (c.detach().float().expand(groups, -1).contiguous() for c in (numerator, denominator))
    return a, b.abs() if form == "sum_abs" else b, groups


def _shared(sums: Tensor, coefficient: Tensor) -> Tensor:
    return (sums.sum(0, keepdim=True) if len(coefficient) == 1 else sums).to(coefficient.dtype)


def _integers(sizes: tuple[int, int, int, int, int]) -> tuple:
    rows, groups, width, chunk, threads = sizes
    return ctypes.c_int64(rows), groups, width, ctypes.c_int64(chunk), threads
