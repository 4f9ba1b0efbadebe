"""Kolmogorov-Arnold attention (KArAt, arXiv 2503.10632): softmax replaced by learnable functions of the scores."""

import math

import torch
from torch import Tensor, nn

from ..ops import fourier_attention
from .attention import Attention
from .resample import Grid, resample_tokens

# Tensors of an operator whose last axis is tokens (w: the axis before it), and whether sums over them are kept.
TOKEN_AXIS = {"a": True, "b": True, "w": True, "scale_base": False, "scale_basis": False}


class FourierOperator(nn.Module):
    """h operators W Φ̂ with Φ̂ of r×N Fourier functions and W of N×r, over a grid of tokens.

    Args:
        num_heads: h.
        grid: native (rows, columns) of tokens; ``coefficients`` resamples to any other.
        prefix: number of class tokens, which keep rows and columns of their own.
        harmonics: G.
        rank: r.
        scales: add the paper's scales of the base function and of the Fourier sum. The base function is zero, so the
            first has no effect on the output; it is there for the paper's parameter count.
        init: ``variance_preserving`` draws a, b ~ N(0, 1/(N·G)) and w ~ N(0, 1/(N·r)), which keeps the output's
            variance at the values'; ``paper`` draws a, b ~ N(0, 1) and leaves w at PyTorch's linear start.
    """

    def __init__(
        self, num_heads: int, grid: Grid, prefix: int, harmonics: int, rank: int, scales: bool = False, init: str = ""
    ):
        super().__init__()
        self.grid, self.prefix = grid, prefix
        n = grid[0] * grid[1] + prefix
        self.a = nn.Parameter(torch.empty(num_heads, harmonics, rank, n))
        self.b = nn.Parameter(torch.empty(num_heads, harmonics, rank, n))
        self.w = nn.Parameter(torch.empty(num_heads, n, rank))
        if scales:
            self.scale_base = nn.Parameter(torch.ones(num_heads, rank, n))
            self.scale_basis = nn.Parameter(torch.ones(num_heads, rank, n))
        self.scales = scales
        std = 1.0 if init == "paper" else 1 / math.sqrt(n * harmonics)
        nn.init.normal_(self.a, std=std)
        nn.init.normal_(self.b, std=std)
        if init == "paper":
            nn.init.uniform_(self.w, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
        else:
            nn.init.normal_(self.w, std=1 / math.sqrt(n * rank))

    def coefficients(self, grid: Grid, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, b (h, G, r, N) and w (h, N, r) for the tokens of ``grid`` and ``prefix``, with the scale folded in."""
        a, b = self.a, self.b
        if self.scales:
            # The base function is zero: its scale enters with weight 0, so that it has a gradient (zero) to reduce.
            scale = self.scale_basis[:, None] + 0.0 * self.scale_base[:, None]
            a, b = a * scale, b * scale
        a, b = (resample_tokens(t, self.grid, grid, self.prefix, prefix, keep_sum=True) for t in (a, b))
        w = resample_tokens(self.w.transpose(1, 2), self.grid, grid, self.prefix, prefix, keep_sum=True)
        return a, b, w.transpose(1, 2)


class KArAttention(Attention):
    """Attention whose scores pass a FourierOperator of its own, or one shared by all blocks.

    Args:
        operator: the block's own operator; None when ``forward`` is given a shared one.
    """

    def __init__(self, dim: int, num_heads: int, operator: FourierOperator | None, drop_rate: float = 0.0):
        super().__init__(dim, num_heads, drop_rate)
        self.operator = operator

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None, shared) -> Tensor:
        operator = shared if self.operator is None else self.operator
        return fourier_attention(q, k, v, *operator.coefficients(grid, prefix), key_mask=key_mask)
