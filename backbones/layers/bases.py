"""The bases of KArAt's functions, one class each; a new basis is one class and one row of BASES.

A basis has no parameters of its own. It says which tensors describe a matrix of (outputs × inputs) functions per head,
how they start, and what the functions are (arXiv 2503.10632). The tensors end in (..., outputs, inputs).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import fourier_mix, fourier_phi
from ..ops.rows import by_rows
from .spline_kan import bspline_basis, uniform_knots

Parameters = Mapping[str, Tensor]
SPLINE_RANGE = 4.0  # splines live on scores in [-4, 4]


class Basis(ABC):
    """Functions φ_pq given number by number; a subclass defines ``names``, ``start`` and ``evaluate``.

    Args:
        grid: G, of the bases that have one.
        spline_order: degree of B-splines.
        compiled: run ``total`` through torch.compile.
    """

    # Parameters by name; True: φ is linear in it, so that a token axis of it is resampled with its sum kept.
    names: ClassVar[dict[str, bool]]

    def __init__(self, grid: int, spline_order: int, compiled: bool = False):
        self.grid, self.spline_order = grid, spline_order
        if compiled:
            self.total = torch.compile(self.total)

    @abstractmethod
    def start(self, shape: tuple[int, int, int], std: float | None) -> dict[str, Tensor]:
        """Starting values for (heads, outputs, inputs) functions.

        Args:
            std: of φ(x) for x ~ N(0, 1); None = the paper's literal start.
        """

    @abstractmethod
    def evaluate(self, x: Tensor, c: Parameters) -> Tensor:
        """φ_pq(x): (B, h, M, 1, inputs) to (B, h, M, outputs, inputs)."""

    def window(self, inputs: int) -> Tensor | None:
        """(inputs,), a fixed factor of the functions of each input."""
        return None

    def row_size(self, outputs: int, inputs: int) -> int:
        """Numbers that ``total`` makes for a query, for the size of a block."""
        return 8 * outputs * inputs

    def total(self, x: Tensor, c: Parameters, mask: Tensor | None = None) -> Tensor:
        """Σ_q φ_pq(x_q): (B, h, M, inputs) to (B, h, M, outputs); ``mask`` (B, 1, 1, inputs), False adds nothing."""
        values = self.evaluate(x[..., None, :], c)
        return (values if mask is None else values * mask[..., None, :]).sum(-1)

    def phi(self, q: Tensor, k: Tensor, c: Parameters, key_mask: Tensor | None, scale: float) -> Tensor:
        """H_kp = Σ_q φ_pq(scale · Q Kᵀ): (B, h, N, outputs) in q's type; inputs are the N keys."""
        mask = None if key_mask is None else key_mask[:, None, None]
        if key_mask is not None:
            k = torch.where(key_mask[:, None, :, None], k, 0)
        outputs, inputs = next(iter(c.values())).shape[-2:]

        def rows(part: Tensor) -> Tensor:
            scores = (_wide(part) * scale) @ _wide(k).transpose(-2, -1)
            return self.total(scores, c, mask).to(q.dtype)

        return by_rows(rows, q, self.row_size(outputs, inputs))

    def mix(self, z: Tensor, v: Tensor, c: Parameters, key_mask: Tensor | None) -> Tensor:
        """O_k = Σ_p v_p Σ_r φ_pr(z_kr): (B, h, N, d) from z (B, h, N, r) and v; outputs are the N keys."""
        if key_mask is not None:
            v = torch.where(key_mask[:, None, :, None], v, 0)
        outputs, inputs = next(iter(c.values())).shape[-2:]
        return by_rows(lambda part: self.total(_wide(part), c).to(v.dtype) @ v, z, self.row_size(outputs, inputs))

    def pick(self, q: Tensor, k: Tensor, v: Tensor, c: Parameters, scale: float) -> Tensor:
        """O_k = Σ_p φ_p(S_kp) v_p: (B, h, N, d) in v's type, S = scale · Q Kᵀ; the tensors of c end in (1, N)."""

        def rows(part: Tensor) -> Tensor:
            scores = (_wide(part) * scale) @ _wide(k).transpose(-2, -1)
            return self.evaluate(scores[..., None, :], c).squeeze(-2).to(v.dtype) @ v

        return by_rows(rows, q, 8 * k.shape[2])

    def draw(self, shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape) * std


class LinearBasis(Basis):
    """φ_pq = Σ_i c_ipq f_i with features f_i shared by all pairs, so that sums over inputs are matrix products."""

    @abstractmethod
    def features(self, x: Tensor) -> Iterator[Tensor]:
        """f_1(x), f_2(x), ..., each like x."""

    def coefficients(self, c: Parameters) -> Tensor:
        """(h, features, outputs, inputs)."""
        return c["c"]

    def evaluate(self, x: Tensor, c: Parameters) -> Tensor:
        coefficients = self.coefficients(c).unbind(1)
        return sum(f * w[:, None] for f, w in zip(self.features(x), coefficients, strict=True))

    def row_size(self, outputs: int, inputs: int) -> int:
        return 8 * inputs

    def total(self, x: Tensor, c: Parameters, mask: Tensor | None = None) -> Tensor:
        result = 0
        for f, w in zip(self.features(x), self.coefficients(c).unbind(1), strict=True):
            result = result + (f if mask is None else f * mask) @ w.transpose(-2, -1).to(f.dtype)
        return result

    def mix(self, z: Tensor, v: Tensor, c: Parameters, key_mask: Tensor | None) -> Tensor:
        """As ``Basis.mix``, in time linear in N: the sum over the keys comes first."""
        if key_mask is not None:
            v = torch.where(key_mask[:, None, :, None], v, 0)
        coefficients = self.coefficients(c).to(v.dtype).transpose(2, 3).flatten(1, 2)  # (h, features·r, N)
        features = torch.cat(list(self.features(_wide(z))), -1).to(v.dtype)  # (B, h, N, features·r)
        return features @ (coefficients @ v)


class Fourier(LinearBasis):
    """φ(x) = Σ_{m=1..G} a_m cos(m x) + b_m sin(m x)."""

    names: ClassVar = {"a": True, "b": True}

    def start(self, shape, std):
        heads, outputs, inputs = shape
        scale = 1.0 if std is None else std / math.sqrt(self.grid)
        return {name: self.draw((heads, self.grid, outputs, inputs), scale) for name in self.names}

    def features(self, x):
        for m in range(1, self.grid + 1):
            yield torch.cos(m * x)
        for m in range(1, self.grid + 1):
            yield torch.sin(m * x)

    def coefficients(self, c):
        return torch.cat([c["a"], c["b"]], 1)

    def pick(self, q, k, v, c, scale):
        # Σ_p a_mp cos(m S_kp) v_p is a sum over keys with coefficients a_mp v_p, others for each image and channel.
        batch, heads = q.shape[:2]
        a, b = ((c[name] * v.transpose(-2, -1)[:, :, None]).flatten(0, 1) for name in self.names)  # (B·h, G, d, N)
        q, k = (t.flatten(0, 1)[None] for t in (q, k))
        return fourier_phi(q, k, a, b, None, scale)[0].unflatten(0, (batch, heads)).to(v.dtype)

    def phi(self, q, k, c, key_mask, scale):
        return fourier_phi(q, k, c["a"], c["b"], key_mask, scale)

    def mix(self, z, v, c, key_mask):
        return fourier_mix(z, v, c["a"], c["b"], key_mask)


class BSpline(LinearBasis):
    """φ(x) = Σ_i c_i B_i(x): G intervals on [−4, 4], splines of degree ``spline_order``; 0 far outside."""

    names: ClassVar = {"c": True}

    def start(self, shape, std):
        heads, outputs, inputs = shape
        scale = 1.0 if std is None else std / math.sqrt(_energy(lambda x: self._splines(x).square().sum(-1)))
        return {"c": self.draw((heads, self.grid + self.spline_order, outputs, inputs), scale)}

    def features(self, x):
        yield from self._splines(x).unbind(-1)

    def row_size(self, outputs, inputs):
        return 4 * (self.grid + self.spline_order) * self.spline_order * inputs

    def _splines(self, x: Tensor) -> Tensor:
        knots = uniform_knots(self.grid, self.spline_order, -SPLINE_RANGE, SPLINE_RANGE)
        return bspline_basis(x, knots.to(x), self.spline_order)


class Rational(Basis):
    """φ(x) = (a_0 + … + a_5 x⁵) / (1 + |b_1 x + … + b_4 x⁴|)."""

    names: ClassVar = {"numerator": True, "denominator": False}

    def start(self, shape, std):
        heads, outputs, inputs = shape
        if std is None:
            return {
                "numerator": self.draw((heads, 6, outputs, inputs), 1),
                "denominator": self.draw((heads, 4, outputs, inputs), 1),
            }
        # 1 + x⁴: no term of the numerator outgrows it by more than x.
        scale = std / math.sqrt(_energy(lambda x: sum((x**i / (1 + x**4)).square() for i in range(6))))
        denominator = torch.zeros(heads, 4, outputs, inputs)
        denominator[:, 3] = 1
        return {"numerator": self.draw((heads, 6, outputs, inputs), scale), "denominator": denominator}

    def evaluate(self, x, c):
        numerator, denominator = (t.unsqueeze(2).unbind(1) for t in (c["numerator"], c["denominator"]))  # (h, 1, ·, ·)
        top = numerator[5]
        for a in numerator[4::-1]:
            top = top * x + a
        bottom = denominator[3]
        for b in denominator[2::-1]:
            bottom = bottom * x + b
        return top / (1 + (bottom * x).abs())


class Wavelet(Basis):
    """φ(x) = w ψ((x − τ)/s); a subclass defines the wavelet ψ."""

    names: ClassVar = {"w": True, "tau": False, "s": False}

    @abstractmethod
    def wave(self, x: Tensor) -> Tensor:
        """ψ(x)."""

    def start(self, shape, std):
        window = self.window(shape[2])
        share = 1.0 if window is None else window.square().mean().item()
        scale = 1.0 if std is None else std / math.sqrt(share * _energy(lambda x: self.wave(x).square()))
        return {"w": self.draw(shape, scale), "tau": torch.zeros(shape), "s": torch.ones(shape)}

    def evaluate(self, x, c):
        w, tau, s = (c[name][:, None] for name in self.names)
        return w * self.wave((x - tau) / s)


class MexicanHat(Wavelet):
    """ψ(x) = 2/(√3 π^¼) (x² − 1) e^{−x²/2}."""

    def wave(self, x):
        return 2 / (math.sqrt(3) * math.pi**0.25) * (x.square() - 1) * torch.exp(-x.square() / 2)


class Morlet(Wavelet):
    """ψ(x) = cos(5x) e^{−x²/2}."""

    def wave(self, x):
        return torch.cos(5 * x) * torch.exp(-x.square() / 2)


class DerivativeOfGaussian(Wavelet):
    """ψ(x) = −d/dx e^{−x²/2} = x e^{−x²/2}."""

    def wave(self, x):
        return x * torch.exp(-x.square() / 2)


class Shannon(Wavelet):
    """ψ(x) = sinc(x/π), with a Hamming window over the inputs."""

    def wave(self, x):
        return torch.sinc(x / math.pi)

    def window(self, inputs):
        return torch.hamming_window(inputs, periodic=False, dtype=torch.float64)


class Meyer(Wavelet):
    """ψ(x) = sin(π|x|) m(ν(|x|)): m(t) = 1 to ½, then cos(½π ν(2t − 1)), 0 from 1; ν(x) = x⁴(35 − 84x + 70x² − 20x³).

    ν is 0 below 0 and 1 above 1, as Meyer defines it: ψ vanishes outside [−1, 1].
    """

    def wave(self, x):
        distance = x.abs()
        t = self._nu(distance)
        m = torch.cos(math.pi / 2 * self._nu(2 * t - 1))  # 1 where t ≤ ½, 0 where t = 1
        return torch.sin(math.pi * distance) * torch.where(t < 1, m, 0)

    @staticmethod
    def _nu(x: Tensor) -> Tensor:
        x = x.clamp(0, 1)
        return x**4 * (35 + x * (-84 + x * (70 - 20 * x)))


class Base(LinearBasis):
    """The base function β: φ(x) = c β(x), of one name among BASE_FUNCTIONS."""

    names: ClassVar = {"c": True}

    def __init__(self, name: str):
        self.name = name

    def start(self, shape, std):
        return {}  # its coefficient is the caller's scale

    def features(self, x):
        yield BASE_FUNCTIONS[self.name](x)


BASES = {
    "fourier": Fourier,
    "rational": Rational,
    "mexican_hat": MexicanHat,
    "morlet": Morlet,
    "dog": DerivativeOfGaussian,
    "meyer": Meyer,
    "shannon": Shannon,
    "bspline": BSpline,
}
BASE_FUNCTIONS = {"zero": torch.zeros_like, "identity": torch.clone, "silu": F.silu, "gelu": F.gelu}


def _energy(square: Callable[[Tensor], Tensor]) -> float:
    """E[square(x)] for x ~ N(0, 1), by the trapezoidal rule."""
    x = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(square(x) * density, x).item()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
