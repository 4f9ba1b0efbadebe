"""GR-KAN feed-forward (KAT, arXiv 2409.10594): learnable group-rational functions where an MLP has a fixed one."""

import math

import torch
from torch import Tensor, nn

from ..ops import group_rational

# Starting coefficients a_0..a_5 / b_1..b_4, from the released code of arXiv 2409.10594; swish is within 1e-4 of
# x·sigmoid(x) on [-3, 3] with the denominator 1 + Σ|b_j||x|ʲ.
STARTS = {
    "identity": ((0.0, 1.0), ()),
    "swish": (
        (
            3.054879741161051e-07,
            0.5000007853744493,
            0.24999783422824703,
            0.05326628273219478,
            0.005803034571292244,
            0.0002751961022402342,
        ),
        (-4.111554955950634e-06, 0.10652899335007572, -1.2690007399796238e-06, 0.0005502331264140556),
    ),
}
# α = Var[x] / E[F(x)²] for x ~ N(0, 1): the gain that keeps the variance through F and the next linear layer.
GAINS = {"identity": 1.0, "swish": 2.8178}


class GroupRational(nn.Module):
    """F(x) = P(x)/Q(x) per channel: numerator shared by all groups, one denominator per group (released layout).

    Args:
        groups: g, divides the width of the input.
        degrees: (m, n) of numerator and denominator.
        init: function it starts as, a key of STARTS.
        form: denominator, see ``group_rational``.
    """

    def __init__(self, groups: int, degrees: tuple[int, int], init: str, form: str = "sum_abs"):
        super().__init__()
        self.form = form
        a, b = STARTS[init]
        self.weight_numerator = nn.Parameter(_padded(a, degrees[0] + 1)[None])
        self.weight_denominator = nn.Parameter(_padded(b, degrees[1]).repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        return group_rational(x, self.weight_numerator, self.weight_denominator, self.form)


class GRKAN(nn.Module):
    """F1 → dropout → fc1 → F2 → dropout → fc2 on (..., dim). F1 starts as the identity, F2 as ``init``.

    Args:
        weight_init: ``variance_preserving`` draws the weights from N(0, α/d_in), ``released`` from N(0, 0.02²).
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
            std = 0.02 if weight_init == "released" else math.sqrt(GAINS[start] / layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.drop1(self.act1(x)))
        return self.fc2(self.drop2(self.act2(x)))


def _padded(values: tuple[float, ...], length: int) -> Tensor:
    return torch.tensor([*values, *[0.0] * (length - len(values))])
