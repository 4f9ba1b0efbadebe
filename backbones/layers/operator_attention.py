"""Attention whose scores pass an operator, in place of the softmax or beside it."""

import torch
from torch import Tensor, nn

from .attention import Attention
from .resample import Grid

BLENDS = ("replace", "add")


class OperatorAttention(Attention):
    """Attention whose scores pass an operator of its own, or one shared by all blocks.

    Args:
        operator: a KArAtOperator or PointwiseOperator; None when ``forward`` is given a shared one.
        heads: indices of the heads that the operator serves, the others use softmax; None = all.
        blend: ``replace``, the operator in place of the softmax (arXiv 2503.10632), or ``add``, softmax + g · operator
            with a gate g per served head that starts at 0: the layer starts as softmax attention, bit for bit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        operator: nn.Module | None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        heads: tuple[int, ...] | None = None,
        blend: str = "replace",
        rel_pos: Grid | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, drop_rate, attn_drop_rate, rel_pos)
        self.operator = operator
        self.heads = heads
        self.gate = nn.Parameter(torch.zeros(num_heads if heads is None else len(heads))) if blend == "add" else None
        if heads is not None:
            self.others = tuple(i for i in range(num_heads) if i not in heads)
            order = torch.tensor([*heads, *self.others])
            self.register_buffer("head_order", order.argsort(), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None, shared) -> Tensor:
        operator = shared if self.operator is None else self.operator
        served = (q, k, v) if self.heads is None else tuple(t[:, list(self.heads)] for t in (q, k, v))
        mixed = operator(*served, grid, prefix, key_mask)
        if self.gate is not None:
            softmax = self.softmax(q, k, v, grid, key_mask)
            mixed = gated(self.gate, mixed, softmax.dtype)
            return softmax + (mixed if self.heads is None else self._placed(mixed, torch.zeros_like))
        if self.heads is None:
            return mixed
        others = self.softmax(*(t[:, list(self.others)] for t in (q, k, v)), grid, key_mask)
        return self._placed(mixed, lambda _: others.to(mixed.dtype))

    def _placed(self, mixed: Tensor, others) -> Tensor:
        """The served heads' output at their place among the others'."""
        return torch.cat([mixed, others(mixed[:, :1].expand(-1, len(self.others), -1, -1))], 1)[:, self.head_order]


def gated(gate: Tensor, mixed: Tensor, dtype: torch.dtype) -> Tensor:
    """gate (h,) times an operator's output (B, h, N, d), in ``dtype``."""
    return (gate.view(-1, 1, 1).to(mixed.dtype) * mixed).to(dtype)
