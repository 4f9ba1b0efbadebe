"""Attention whose weights are a fixed function of single scores, or of none: KArAt's cheap rivals, and its controls."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.rows import by_rows
from .resample import Grid

# What a network learns without looking at scores: a comparison that these win does not measure attention.
CONTROLS = ("uniform", "none")
POINTWISE = ("polynomial", "relu", *CONTROLS)


class PointwiseOperator(nn.Module):
    """O = f(S) V of n real keys: ``polynomial`` S³/√n (arXiv 2410.18613), ``relu`` relu(S)/n (arXiv 2309.08586).

    Two controls ignore the scores: ``uniform`` gives every query the mean of the real values, 1/n each, and ``none``
    its own value, so that no token sees another.

    Args:
        kind: one of POINTWISE.
        drop_rate: dropout of the weights.
    """

    def __init__(self, kind: str, drop_rate: float = 0.0):
        super().__init__()
        self.kind, self.drop_rate = kind, drop_rate

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        prefix: int,
        key_mask: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        """(B, h, N, d), in memory that does not grow with N²; arguments as in ``KArAtOperator.forward``."""
        if self.kind in CONTROLS:
            return self._without_scores(q, k, v, key_mask)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        count = torch.tensor(float(k.shape[2]), device=k.device)
        if key_mask is not None:
            k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))
            count = key_mask.sum(1).clamp(min=1).view(-1, 1, 1, 1).float()
        drop_rate = self.drop_rate if self.training else 0.0

        def rows(part: Tensor) -> Tensor:
            scores = (part * scale) @ k.transpose(-2, -1)
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            weights = scores**3 / count.sqrt() if self.kind == "polynomial" else F.relu(scores) / count
            return F.dropout(weights.to(v.dtype), drop_rate) @ v

        return by_rows(rows, q, 4 * k.shape[2], random=drop_rate > 0)

    def _without_scores(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.kind == "uniform":
            real = (
                torch.ones_like(v[:, :1, :, :1], dtype=torch.bool) if key_mask is None else key_mask[:, None, :, None]
            )
            total = torch.where(real, v, 0).sum(2, keepdim=True)
            v = (total / real.sum(2, keepdim=True).clamp(min=1)).to(v.dtype).expand_as(v)
        v = F.dropout(v, self.drop_rate, self.training)
        # Zero, so that queries, keys and what adds to their scores have a gradient to reduce.
        return v + 0.0 * (q[:, :, :1].sum(-1, keepdim=True) * k[:, :, :1].sum(-1, keepdim=True)).to(v.dtype)
