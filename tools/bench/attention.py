"""Attention as an operator that is timed: KArAt in both orders against softmax, and against its own naive form."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbones.ops import fourier_attention
from backbones.ops.fourier_attention.reference import fourier_phi_reference

from .cases import Case, Contestant, NotRunError


@dataclass(frozen=True)
class AttentionProblem:
    """q, k and v of one shape (B, h, N, d) and type, and the size of the functions."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    harmonics: int = 3
    rank: int = 12
    order: str = "w_phi"


def attention_case(order: str, harmonics: int, rank: int) -> Case:
    """KArAt of one order and size; times are given as multiples of F.scaled_dot_product_attention's."""
    naive = (Contestant("naive", _naive),) if order == "w_phi" else ()
    return Case(
        name=f"{order} G{harmonics} r{rank}",
        inputs=attention_inputs,
        batched=("q", "k", "v"),
        reference=attention_reference,
        yardstick=Contestant("sdpa", lambda problem: lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v)),
        contestants=(
            Contestant("eager softmax", _eager_softmax, gated=False),
            *naive,
            Contestant("karvis", lambda problem: partial(fourier_attention, order=problem.order)),
        ),
        passes=None,
    )


def attention_inputs(problem: AttentionProblem, generator: torch.Generator) -> dict[str, Tensor]:
    """q, k, v ~ N(0, 1), as one projection leaves them in memory, and functions at KArAt's start."""
    batch, heads, n, d = problem.shape
    draw = partial(torch.randn, generator=generator, device=problem.device)
    q, k, v = draw(batch, n, 3, heads, d).to(problem.dtype).permute(2, 0, 3, 1, 4).unbind(0)
    outputs, inputs = (problem.rank, n) if problem.order == "w_phi" else (n, problem.rank)
    shape = (heads, problem.harmonics, outputs, inputs)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "a": draw(shape) / math.sqrt(n * problem.harmonics),
        "b": draw(shape) / math.sqrt(n * problem.harmonics),
        "w": draw(heads, inputs, outputs) / math.sqrt(n),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def attention_reference(problem: AttentionProblem) -> Callable[..., Tensor]:
    """The plain form, head by head and recomputed, so that its N×N scores fit."""
    scale = problem.shape[3] ** -0.5

    def head(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        if problem.order == "w_phi":
            return fourier_phi_reference(q, k, a, b, None, scale) @ (w.to(q.dtype).transpose(-2, -1) @ v)
        z = (q @ (w.to(q.dtype) @ k).transpose(-2, -1)) * scale
        weights = 0
        for m in range(1, problem.harmonics + 1):
            weights = weights + torch.cos(m * z) @ a[:, m - 1].to(q.dtype).transpose(-2, -1)
            weights = weights + torch.sin(m * z) @ b[:, m - 1].to(q.dtype).transpose(-2, -1)
        return weights @ v

    def reference(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        parts = zip(*(t.split(1, 1) for t in (q, k, v)), *(t.split(1, 0) for t in (a, b, w)), strict=True)
        return torch.cat([checkpoint(head, *part, use_reentrant=False) for part in parts], 1)

    return reference


def _eager_softmax(problem: AttentionProblem) -> Callable[..., Tensor]:
    _check_room(problem, 3)
    scale = problem.shape[3] ** -0.5
    return lambda q, k, v, **_: ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v


def _naive(problem: AttentionProblem) -> Callable[..., Tensor]:
    """Every value of every function in memory at once, (B, h, N, r, N), as KAN layers are usually written."""
    _check_room(problem, 4 * problem.harmonics * problem.rank)
    m = torch.arange(1, problem.harmonics + 1, device=problem.device).view(-1, 1, 1)
    scale = problem.shape[3] ** -0.5

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        angles = (q.float() @ k.float().transpose(-2, -1) * scale)[:, :, :, None, None] * m  # (B, h, N, G, 1, N)
        values = angles.cos() * a[:, None] + angles.sin() * b[:, None]  # (B, h, N, G, r, N)
        phi = values.sum((-3, -1))  # (B, h, N, r)
        return ((phi @ w.transpose(-2, -1)) @ v.float()).to(v.dtype)

    return call


def _check_room(problem: AttentionProblem, copies: int) -> None:
    """Refuses what would not fit: on a CPU the system would end the process."""
    batch, heads, n, _ = problem.shape
    need = 4 * copies * batch * heads * n * n
    if problem.device.type == "cuda":
        free = torch.cuda.mem_get_info(problem.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > 0.8 * free:
        raise NotRunError(f"it would hold {need / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free")
