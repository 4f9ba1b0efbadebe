"""How does the C++ kernel take the functions of a block of scores? ``eager.py``'s interface, on ``native.cpp``."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from .. import native_build

LANES = 8  # the number of keys must be a multiple of it
DTYPES = (torch.float32, torch.bfloat16)  # computed in float32
_SOURCE = Path(__file__).with_name("native.cpp")


def available(q: Tensor) -> bool:
    """Whether the kernel can be used for q; builds it when it has not been built yet."""
    usable = q.device.type == "cpu" and q.dtype in DTYPES and native_build.enabled()
    return usable and native_build.library(_SOURCE) is not None


def pack(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The coefficients (h, G, r, N) as (h, N / LANES, G, 2, r, LANES), with zeros behind the last key."""
    n = a.shape[3]
    padded = a.new_zeros(*a.shape[:2], 2, a.shape[2], -(-n // LANES) * LANES, dtype=dtype)
    padded[:, :, 0, :, :n] = a.detach()
    padded[:, :, 1, :, :n] = b.detach()
    return padded.unflatten(4, (-1, LANES)).permute(0, 4, 1, 2, 3, 5).contiguous()


def unpack(sums: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(da, db), each (h, G, r, N), of sums in the form of ``pack``."""
    return sums.permute(3, 0, 2, 4, 1, 5).flatten(4)[..., :n].unbind()


def forward(s: Tensor, coefficients: Tensor, real: Tensor | None, h: Tensor) -> None:
    _call("fourier_forward", (s, real, coefficients, h), s, coefficients)


def backward(s: Tensor, dh: Tensor, coefficients: Tensor, real: Tensor | None, sums: Tensor) -> Tensor:
    _call("fourier_backward", (s, real, dh, coefficients, sums), s, coefficients)
    return s


def _call(name: str, tensors: tuple[Tensor | None, ...], s: Tensor, coefficients: Tensor) -> None:
    """Every tensor is contiguous."""
    sizes = map(ctypes.c_int64, (*s.shape[:3], s.shape[3] // LANES))
    function = getattr(native_build.library(_SOURCE), name)
    function(*map(native_build.pointer, tensors), *sizes, *coefficients.shape[2:5:2], torch.get_num_threads())
