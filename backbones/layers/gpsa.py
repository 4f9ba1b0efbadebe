"""Gated positional self-attention (ConViT, arXiv 2103.10697), timm's, at any grid and without its N×N matrices."""

import torch
from timm.models.convit import GPSA
from torch import Tensor
from torch.nn import functional as F

from .resample import Grid


class GatedAttention(GPSA):
    """timm's GPSA: (1 − σ) softmax(Q Kᵀ/√d) V + σ softmax(positions) V, σ = sigmoid of a learnable gate per head.

    The positional score u·(Δx, Δy, Δx² + Δy²) is a sum of a term in x and one in y, so that its softmax is an outer
    product: rows and columns are mixed one after the other. Both parts are normalized, so timm's last division is by 1.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, drop_rate: float = 0.0, attn_drop_rate: float = 0.0):
        super().__init__(dim, num_heads, qkv_bias, attn_drop_rate, drop_rate)

    def forward(self, x: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None = None, shared=None) -> Tensor:
        """Mixes (B, N, C) of a grid without class token.

        Args:
            key_mask: (B, N) bool, True = real token; real tokens form a rectangle, as in a padded window. Dropout acts
                on the softmax of scores.
        """
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
        mask = None if key_mask is None else key_mask[:, None, None]
        drop_rate = self.attn_drop.p if self.training else 0.0
        by_content = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate)

        real = None if key_mask is None else key_mask.unflatten(1, grid)  # (B, rows, columns)
        along_rows = self._positions(grid[0], 1, None if real is None else real.any(2)).to(v.dtype)
        along_columns = self._positions(grid[1], 0, None if real is None else real.any(1)).to(v.dtype)
        by_position = torch.einsum("bhij,bhjxd->bhixd", along_rows, v.unflatten(2, grid))
        by_position = torch.einsum("bhxy,bhiyd->bhixd", along_columns, by_position).flatten(2, 3)

        gate = torch.sigmoid(self.gating_param).view(-1, 1, 1)
        mixed = (1 - gate) * by_content + gate * by_position
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2).to(x.dtype)))

    def freeze_scores(self) -> None:
        """Keeps all that weighs the tokens as it starts, positions and gates too; values and projection are trained."""
        for part in (self.qk, self.pos_proj, self.gating_param):
            part.requires_grad_(False)

    def _positions(self, size: int, channel: int, real: Tensor | None) -> Tensor:
        """(B or 1, h, size, size): softmax over one axis of its term of the positional score."""
        position = torch.arange(size, device=self.pos_proj.weight.device, dtype=torch.float32)
        offset = position - position[:, None]
        linear, square = (self.pos_proj.weight[:, c, None, None].float() for c in (channel, 2))
        # The bias changes no softmax; it is here so that it has a gradient (zero) to reduce.
        bias = self.pos_proj.bias[:, None, None].float()
        scores = (linear * offset + square * offset.square() + bias)[None]
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        return scores.softmax(-1)
