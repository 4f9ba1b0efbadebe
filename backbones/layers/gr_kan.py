"""GR-KAN feed-forward (KAT, arXiv 2409.10594): learnable group-rational functions where an MLP has a fixed one."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import fuses, group_rational, norm_rational
from .starts import STARTS

_WIDEST_NORM = 4096  # channels of one tile of the kernel that holds whole rows


class GroupRational(nn.Module):
    """F(x) = P(x)/Q(x) per channel: numerator shared by all groups, one denominator per group (released layout).

    Args:
        groups: g, divides the width of the input.
        degrees: (m, n) of numerator and denominator.
        init: function it starts as, a key of STARTS[form]; degrees above (5, 4) get zeros.
        form: denominator, see ``group_rational``.
    """

    def __init__(self, groups: int, degrees: tuple[int, int], init: str, form: str = "sum_abs"):
        super().__init__()
        self.form = form
        numerator, denominator = start_coefficients(init, form, degrees)
        self.weight_numerator = nn.Parameter(numerator)
        self.weight_denominator = nn.Parameter(denominator.repeat(groups, 1))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """F(x + bias) for x (..., C) and bias (C,)."""
        return group_rational(x, self.weight_numerator, self.weight_denominator, self.form, bias)

    def after_norm(self, x: Tensor, norm: nn.Module) -> Tensor:
        """F(norm(x)), in one kernel for a LayerNorm over the channels where there is one."""
        if not (fuses(x) and _is_plain(norm, nn.LayerNorm) and norm.bias is not None and x.shape[-1] <= _WIDEST_NORM):
            return self(norm(x))
        numerator, denominator = self.weight_numerator, self.weight_denominator
        return norm_rational(x, norm.weight, norm.bias, numerator, denominator, self.form, norm.eps)


class GRKAN(nn.Module):
    """F1 → dropout → fc1 → F2 → dropout → fc2 on (..., dim). F1 starts as the identity, F2 as ``init``.

    Args:
        weight_init: ``variance_preserving`` draws the weights from N(0, α/d_in), α = Var[x]/E[f(x)²] of the start f,
            ``released`` from N(0, 0.02²).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        groups: int,
        degrees: tuple[int, int],
        init: str,
        weight_init: str,
        form: str = "sum_abs",
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.act1 = GroupRational(groups, degrees, "identity", form)
        self.drop1 = nn.Dropout(drop_rate)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act2 = GroupRational(groups, degrees, init, form)
        self.drop2 = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(hidden_dim, dim)
        for layer, start in ((self.fc1, "identity"), (self.fc2, init)):
            std = 0.02 if weight_init == "released" else math.sqrt(STARTS[form][start].gain / layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(..., dim) to (..., dim); ``norm`` is the normalization before the feed-forward, for F1 to run with it."""
        x = self.drop1(self.act1(x) if norm is None else self.act1.after_norm(x, norm))
        if fuses(x) and _is_plain(self.fc1, nn.Linear):
            x = self.act2(F.linear(x, self.fc1.weight), self.fc1.bias)
        else:
            x = self.act2(self.fc1(x))
        return self.fc2(self.drop2(x))


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Whether the module is what it was built as, and nothing watches its output: only then may a kernel replace it."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def start_coefficients(name: str, form: str, degrees: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(1, m+1) and (1, n): the start ``name`` for a denominator, with zeros for degrees above the start's."""
    start = STARTS[form][name]
    pairs = zip((start.numerator, start.denominator), (degrees[0] + 1, degrees[1]), strict=True)
    numerator, denominator = (torch.tensor([[*values, *[0.0] * (size - len(values))]]) for values, size in pairs)
    return numerator, denominator
