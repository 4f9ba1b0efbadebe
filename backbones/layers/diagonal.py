"""What the modular form of KArAt's operator lacks: functions by which a query picks a key for its own score."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .bases import Basis, Parameters
from .functions import POINTS, Resample, Sizes, measure

DIAGONALS = ("none", "shared", "positionwise")
_RANGE = 4.0  # the start is fitted to scores in [-4, 4]


class Diagonal(nn.Module):
    """ψ_p(S_kp), the weight that a query gives a value for the score of its key: an extension of this project.

    Of the N×N functions of arXiv 2503.10632 the modular form W Φ̂ keeps a factorization of rank r. In it a score moves
    all weights of its row by fixed shares, so that no query can pick one key. The diagonal functions φ_pp can, and they
    have no low rank. ψ stands for them: A_kp = ψ_p(S_kp) + Σ_r W_pr Φ̂_r(S_k).

    It starts as the constant and the functions of the basis that are closest to (1 + s)/N, the first terms of softmax
    around equal scores, for s ~ N(0, 1). At another number of tokens its weights keep their sum.

    Args:
        basis: what the functions are made of, beside a constant.
        heads: h.
        tokens: N.
        positionwise: one function per key; else one per head.
    """

    def __init__(self, basis: Basis, heads: int, tokens: int, positionwise: bool):
        super().__init__()
        self.basis, self.token_axes = basis, (-1,) if positionwise else ()
        if not positionwise:  # the number of tokens that the weights are for, saved with them: nothing else tells it
            self.register_buffer("tokens", torch.tensor(float(tokens)))
        constant, tensors = _closest(basis, tokens)
        keys = tokens if positionwise else 1
        self.constant = nn.Parameter(torch.full((heads, 1, keys), constant))
        for name, value in tensors.items():
            shape = (heads, *value.shape[1:-1], keys)
            self.register_parameter(name, nn.Parameter(value.expand(shape).clone()))

    def token_axis(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(axes of a parameter that are tokens, whether their sum is kept when they are resampled)."""
        return self.token_axes, name == "constant" or self.basis.names.get(name, False)

    @property
    def count(self) -> int:
        """The number of tokens that the weights are for."""
        return self.constant.shape[-1] if self.token_axes else int(self.tokens)

    def coefficients(self, resample: Resample, tokens: int) -> tuple[Tensor, Parameters]:
        """The constant (h, 1, N) and the basis's tensors, which end in (1, N), of N ``tokens``."""

        def at_tokens(name: str) -> Tensor:
            value, keep_sum = getattr(self, name), self.token_axis(name)[1]
            if self.token_axes:
                return resample(value, -1, keep_sum)
            value = value.expand(*value.shape[:-1], tokens)
            return value * (self.tokens / tokens) if keep_sum else value

        return at_tokens("constant"), {name: at_tokens(name) for name in self.basis.names}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, resample: Resample, scale: float) -> Tensor:
        """O (B, h, N, d): O_k = Σ_p ψ_p(S_kp) v_p in memory linear in N; masked keys and values are zero already."""
        constant, own = self.coefficients(resample, k.shape[2])
        mean = constant.to(v.dtype) @ v  # (B, h, 1, d)
        return mean + self.basis.pick(q, k, v, own, scale)

    @torch.no_grad()
    def curve(self, x: Tensor, head: int, key: int) -> Tensor:
        """ψ_p(x) of one function at its native tokens, x (M,) to (M,)."""
        constant, own = self.coefficients(lambda t, *_: t, self.count)
        one = {name: t[head : head + 1, ..., key, None, None] for name, t in own.items()}
        return constant[head, 0, key] + self.basis.evaluate(x.view(1, 1, -1, 1, 1), one).flatten()

    @torch.enable_grad()
    def sizes(self) -> Sizes:
        """Size, slope and gains of a function at the start, whatever it has become."""
        constant, tensors = _closest(self.basis, self.count)
        tensors = {n: t.expand(*t.shape[:-1], POINTS).clone().requires_grad_() for n, t in tensors.items()}
        sizes = measure(lambda x: self.basis.evaluate(x[..., None, :], tensors) + constant, tensors)
        return replace(sizes, gains={"constant": 1.0, **sizes.gains})


def _closest(basis: Basis, tokens: int) -> tuple[float, dict[str, Tensor]]:
    """A constant, and tensors (1, ..., 1, 1) of one function, whose sum is closest to (1 + s)/N for s ~ N(0, 1)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = {name: value.double() for name, value in basis.start((1, 1, 1), 1.0).items()}
    linear = [name for name, keep_sum in basis.names.items() if keep_sum]
    zero = {name: torch.zeros_like(value) if name in linear else value for name, value in start.items()}
    s = torch.linspace(-_RANGE, _RANGE, 2001, dtype=torch.float64)
    terms = [torch.ones_like(s)]
    for name in linear:
        for place in range(zero[name].numel()):
            one = zero[name].clone()
            one.view(-1)[place] = 1
            terms.append(basis.evaluate(s.view(1, 1, -1, 1, 1), {**zero, name: one}).flatten())
    weight = torch.exp(-s.square() / 4)  # square root of the density
    design = torch.stack(terms, 1) * weight[:, None]
    # Terms that a basis has twice, such as a constant of its own, share what they fit: the least solution of all.
    solution = torch.linalg.lstsq(design, ((1 + s) / tokens * weight)[:, None], driver="gelsd").solution[:, 0].float()
    constant, *rest = solution
    tensors, rest = {name: value.float() for name, value in zero.items()}, torch.stack(rest)
    for name in linear:
        tensors[name], rest = rest[: start[name].numel()].view(start[name].shape), rest[start[name].numel() :]
    return constant.item(), tensors
