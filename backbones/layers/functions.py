"""A matrix of learnable functions per head, what KArAt's operators are made of (arXiv 2503.10632)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .bases import Base, Basis, Parameters

Resample = Callable[[Tensor, int, bool], Tensor]  # (tensor, token axis, keep the sum) to the tensor for other tokens

POINTS = 4096  # scores and functions that ``Sizes`` are means of


@dataclass(frozen=True)
class Sizes:
    """What one function φ is at the start, for x ~ N(0, 1).

    Args:
        value: root mean square of φ(x).
        slope: root mean square of φ'(x).
        gains: by tensor, mean of Σ|∂φ(x)/∂θ| over the numbers θ that it holds for the function.
    """

    value: float
    slope: float
    gains: dict[str, float]


class Functions(nn.Module):
    """A matrix of (outputs × inputs) learnable functions per head, φ = scale_base · β + scale_basis · Σ of the basis.

    Args:
        basis: what the functions are made of.
        shape: (heads, outputs, inputs).
        token_axes: which of the two last axes are tokens, among −2 (outputs) and −1 (inputs).
        std: of φ(x) for x ~ N(0, 1) at the start; None = the paper's literal start.
        base: name of the base function β.
        scales: make scale_base and scale_basis learnable, per function; else they are constants.
    """

    def __init__(
        self,
        basis: Basis,
        shape: tuple[int, int, int],
        token_axes: tuple[int, ...],
        std: float | None,
        base: str = "zero",
        scales: bool = False,
    ):
        super().__init__()
        self.basis, self.token_axes, self.shape = basis, token_axes, shape
        self.base = None if base == "zero" else Base(base)
        self.std, self.base_name = std, base
        self.base_factor = 1.0 if std is None else std
        for name, value in basis.start(shape, std).items():
            self.register_parameter(name, nn.Parameter(value))
        self.scales = scales
        if scales:
            self.scale_base = nn.Parameter(torch.ones(shape))
            self.scale_basis = nn.Parameter(torch.ones(shape))

    def token_axis(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(axes of a parameter that are tokens, whether their sum is kept when they are resampled)."""
        return self.token_axes, self.basis.names.get(name, False)

    def coefficients(self, resample: Resample) -> tuple[Parameters, Parameters | None]:
        """The basis's tensors with scale and window folded in, and the base function's, at other tokens."""
        own, window = {}, self.basis.window(self.shape[2])
        for name, keep_sum in self.basis.names.items():
            value = getattr(self, name)
            if keep_sum and self.scales:
                scale = self.scale_basis if value.dim() == 3 else self.scale_basis[:, None]
                if self.base is None:  # its scale enters with weight 0, so that it has a gradient (zero) to reduce
                    scale = scale + 0.0 * (self.scale_base if value.dim() == 3 else self.scale_base[:, None])
                value = value * scale
            if keep_sum and window is not None:
                value = value * window.to(value)
            own[name] = self._resampled(value, resample, keep_sum)
        if self.base is None:
            return own, None
        like = next(self.parameters())
        base = self.scale_base if self.scales else like.new_ones(self.shape)
        return own, {"c": self._resampled(base * self.base_factor, resample, True)[:, None]}

    def sizes(self) -> Sizes:
        """Size, slope and gains of a function at the start, whatever it has become."""
        basis = self.basis
        return _sizes(type(basis), basis.grid, basis.spline_order, self.std, self.base_name, self.scales)

    @torch.no_grad()
    def curve(self, x: Tensor, head: int, output: int, input: int) -> Tensor:
        """φ_pq(x) of one function at its native tokens, x (M,) to (M,)."""
        total = torch.zeros_like(x)
        for basis, c in zip((self.basis, self.base), self.coefficients(lambda t, *_: t), strict=True):
            if c is not None:
                one = {name: t[head : head + 1, ..., output, input, None, None] for name, t in c.items()}
                total += basis.evaluate(x.view(1, 1, -1, 1, 1), one).flatten()
        return total

    def _resampled(self, value: Tensor, resample: Resample, keep_sum: bool) -> Tensor:
        for axis in self.token_axes:
            value = resample(value, axis, keep_sum)
        return value

    def phi(self, q: Tensor, k: Tensor, resample: Resample, key_mask: Tensor | None, scale: float) -> Tensor:
        """H (B, h, N, outputs): H_kp = Σ_q φ_pq(S_kq), S = scale · Q Kᵀ; inputs are the keys."""
        own, base = self.coefficients(resample)
        h = self.basis.phi(q, k, own, key_mask, scale)
        return h if base is None else h + self.base.phi(q, k, base, key_mask, scale)

    def mix(self, z: Tensor, v: Tensor, resample: Resample, key_mask: Tensor | None) -> Tensor:
        """O (B, h, N, d): O_k = Σ_p v_p Σ_r φ_pr(z_kr); outputs are the keys."""
        own, base = self.coefficients(resample)
        out = self.basis.mix(z, v, own, key_mask)
        return out if base is None else out + self.base.mix(z, v, base, key_mask)

    def weights(self, resample: Resample) -> tuple[Callable[[Tensor], Tensor], int]:
        """The function z (B, h, m, r) to Σ_r φ_pr(z_kr) (B, h, m, outputs), and the numbers it makes per query."""
        own, base = self.coefficients(resample)
        size = self.basis.row_size(*self.shape[1:])

        def function(z: Tensor) -> Tensor:
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            total = self.basis.total(z, own)
            return total if base is None else total + self.base.total(z, base)

        return function, size


def measure(phi: Callable[[Tensor], Tensor], tensors: Parameters) -> Sizes:
    """Sizes of POINTS functions, each taken at a number of its own: their sum has all derivatives at once.

    Args:
        phi: x (1, 1, 1, POINTS) to the functions' values, of which the last axis counts the functions.
        tensors: what the functions are made of, ending in (..., POINTS) and requiring gradients.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, POINTS, generator=generator).requires_grad_()
    values = phi(x)
    slope, *gradients = torch.autograd.grad(values.sum(), (x, *tensors.values()), allow_unused=True)
    gains = {n: 0.0 if g is None else g.abs().sum().item() / POINTS for n, g in zip(tensors, gradients, strict=True)}
    return Sizes(values.detach().square().mean().sqrt().item(), slope.square().mean().sqrt().item(), gains)


@lru_cache
@torch.enable_grad()
def _sizes(basis: type[Basis], grid: int, spline_order: int, std: float | None, base: str, scales: bool) -> Sizes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        functions = Functions(basis(grid, spline_order), (1, 1, POINTS), (), std, base, scales)
    own, of_base = functions.coefficients(lambda t, *_: t)

    def phi(x: Tensor) -> Tensor:
        values = functions.basis.evaluate(x[..., None, :], own)
        return values if of_base is None else values + functions.base.evaluate(x[..., None, :], of_base)

    return measure(phi, dict(functions.named_parameters()))
