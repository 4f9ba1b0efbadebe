"""B-spline KAN feed-forward (arXiv 2404.19756), the baseline of GR-KAN (arXiv 2409.10594, Fig. 1)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .starts import STARTS


def uniform_knots(grid: int, order: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """(grid + 2·order + 1,) float64: ``grid`` equal intervals on [low, high], and ``order`` more on each side."""
    return low + torch.arange(-order, grid + order + 1, dtype=torch.float64) * ((high - low) / grid)


def bspline_basis(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """B-splines B_i(x) by the Cox-de Boor recursion; 0 outside the knots, and they sum to 1 on the inner interval.

    Args:
        x: any shape (...).
        grid: (K,) increasing knots, see ``uniform_knots``.
        order: degree k of the pieces, at least 0 and below K − 1.

    Returns:
        (..., K − 1 − k) in the common type of x and the knots.

    Raises:
        ValueError: for knots that are not 1-D, or too few of them for the order.
    """
    if grid.dim() != 1 or not 0 <= order < len(grid) - 1:
        raise ValueError(f"order {order} needs at least {order + 2} knots in one dimension, got {tuple(grid.shape)}.")
    x = x[..., None]
    basis = ((x >= grid[:-1]) & (x < grid[1:])).to(torch.promote_types(x.dtype, grid.dtype))
    for k in range(1, order + 1):
        rising = (x - grid[: -k - 1]) / (grid[k:-1] - grid[: -k - 1])
        falling = (grid[k + 1 :] - x) / (grid[k + 1 :] - grid[1:-k])
        basis = rising * basis[..., :-1] + falling * basis[..., 1:]
    return basis


class SplineLinear(nn.Module):
    """φ(x) = W silu(x) + Σ_i S_i B_i(x) on (..., dim): one learnable function per pair of channels, summed over inputs.

    Args:
        dim, out_dim: widths of input and output.
        grid: G, intervals on [-1, 1].
        order: k, degree of the pieces; the splines vanish outside ±(1 + 2k/G).
    """

    def __init__(self, dim: int, out_dim: int, grid: int = 5, order: int = 3):
        super().__init__()
        self.order = order
        self.base_weight = nn.Parameter(torch.empty(out_dim, dim))
        self.spline_weight = nn.Parameter(torch.empty(out_dim, dim, grid + order))
        self.register_buffer("knots", uniform_knots(grid, order).float(), persistent=False)
        # The base keeps the variance of its input; the splines start at about a tenth of it.
        nn.init.normal_(self.base_weight, std=math.sqrt(STARTS["sum_abs"]["swish"].gain / dim))
        nn.init.normal_(self.spline_weight, std=0.1 / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            basis = bspline_basis(x.float(), self.knots.float(), self.order).flatten(-2)  # (..., dim·(G+k))
        return F.linear(F.silu(x), self.base_weight) + F.linear(basis.to(x.dtype), self.spline_weight.flatten(1))


class SplineKAN(nn.Module):
    """Two KAN layers, dim → hidden_dim → dim, in place of an MLP.

    Its known failure is memory: a layer has G+k+1 = 9 weights where a linear one has 1, and keeps k+2 tensors of G+k
    values per input element for the backward pass, 41 times what an MLP keeps (measured at width 192, float32).
    """

    def __init__(self, dim: int, hidden_dim: int, grid: int = 5, order: int = 3, drop_rate: float = 0.0):
        super().__init__()
        self.kan1 = SplineLinear(dim, hidden_dim, grid, order)
        self.drop1 = nn.Dropout(drop_rate)
        self.kan2 = SplineLinear(hidden_dim, dim, grid, order)
        self.drop2 = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.kan2(self.drop1(self.kan1(x))))
