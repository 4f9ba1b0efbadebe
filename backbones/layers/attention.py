"""Multi-head attention: the projections that every kind shares, and the softmax."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resample import Grid


class Attention(nn.Module):
    """Softmax attention; subclasses replace ``mix``. State-dict keys are timm's (``qkv``, ``proj``).

    Args:
        dim: C.
        num_heads: h.
        qkv_bias: queries, keys and values have a bias.
        drop_rate: dropout after the projection.
        attn_drop_rate: dropout of attention weights.
        rel_pos: native (rows, columns) of a decomposed relative position embedding (ViTDet, arXiv 2203.16527), which
            joins the scores of the softmax; other sizes interpolate it linearly. None = without.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        rel_pos: Grid | None = None,
    ):
        super().__init__()
        self.num_heads, self.attn_drop_rate = num_heads, attn_drop_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.has_rel_pos = rel_pos is not None
        if rel_pos is not None:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads)) for size in rel_pos
            )

    def forward(self, x: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None = None, shared=None) -> Tensor:
        """Mixes (B, N, C), where N = ``prefix`` + rows·columns of ``grid``.

        Args:
            key_mask: (B, N) bool, True = real token.
            shared: operator shared by all blocks, for universal KArAt.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d)
        mixed = self.mix(*qkv.unbind(0), grid, prefix, key_mask, shared)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None, shared) -> Tensor:
        """(B, h, N, d) from queries, keys and values of that shape."""
        return self.softmax(q, k, v, grid, key_mask)

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, key_mask: Tensor | None) -> Tensor:
        """(B, h, N, d) of any h heads."""
        mask = None if key_mask is None else key_mask[:, None, None, :]
        if self.has_rel_pos:
            bias = self._position_bias(q, grid)
            mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        drop_rate = self.attn_drop_rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate)

    def _position_bias(self, q: Tensor, grid: Grid) -> Tensor:
        """(B, h, N, N), what relative positions add to the scores."""
        q_map = q.unflatten(2, grid)  # (B, h, H, W, d)
        bias_h = torch.einsum("bnhwd,hkd->bnhwk", q_map, _relative(self.rel_pos_h, grid[0]))
        bias_w = torch.einsum("bnhwd,wkd->bnhwk", q_map, _relative(self.rel_pos_w, grid[1]))
        return (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4).flatten(2, 3)

    def freeze_scores(self) -> None:
        """Keeps all that weighs the tokens as it starts; values and projection are trained."""
        self.qkv = FrozenScoresLinear(self.qkv)
        if self.has_rel_pos:
            self.rel_pos_h.requires_grad_(False)
            self.rel_pos_w.requires_grad_(False)


class FrozenScoresLinear(nn.Module):
    """A projection to queries, keys and values, (..., C) to (..., 3C), of which only the values are trained.

    Args:
        qkv: the linear layer whose place it takes.
    """

    def __init__(self, qkv: nn.Linear):
        super().__init__()
        dim, bias = qkv.in_features, qkv.bias is not None
        self.qk = nn.Linear(dim, 2 * dim, bias).requires_grad_(False)
        self.v = nn.Linear(dim, dim, bias)
        self.load_state_dict(split_fused(qkv.state_dict()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.qk(x), self.v(x)], -1)


def split_fused(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """``weight`` and ``bias`` of one projection to queries, keys and values as those of a FrozenScoresLinear."""
    parts = {}
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state:
            queries, keys, values = state[f"{prefix}{name}"].chunk(3)
            parts |= {f"{prefix}qk.{name}": torch.cat([queries, keys]), f"{prefix}v.{name}": values}
    return parts


@torch.no_grad()
def mimetic_start(attention: Attention) -> None:
    """Starts the projections as trained ones look (Trockman and Kolter, arXiv 2305.09828).

    Per head W_q W_kᵀ is the best approximation of rank d of 0.7 Z + 0.7 I, and W_v W_proj = 0.4 Z − 0.4 I, where W maps
    row vectors and Z has entries from N(0, 1/C); biases become 0.
    """
    dim = attention.proj.in_features
    head_dim = dim // attention.num_heads
    qkv = attention.qkv
    layers = (qkv.qk, qkv.v) if isinstance(qkv, FrozenScoresLinear) else (qkv,)
    queries, keys, values = (w for layer in layers for w in layer.weight.split(dim))  # rows are outputs: Wᵀ
    for rows in torch.arange(dim, device=queries.device).split(head_dim):
        left, right = _square_root_factors(0.7, 0.7, queries)
        queries[rows], keys[rows] = left[:, :head_dim].T, right[:head_dim]
    left, right = _square_root_factors(0.4, -0.4, values)
    values.copy_(left.T)
    attention.proj.weight.copy_(right.T)
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(attention.proj.bias)


def _square_root_factors(noise: float, identity: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """L, R with LR = noise·Z + identity·I from its singular value decomposition, the largest values first."""
    dim = len(like)
    product = noise * torch.randn_like(like) / dim**0.5 + identity * torch.eye(dim, device=like.device)
    u, s, vh = torch.linalg.svd(product)
    return u * s.sqrt(), s.sqrt()[:, None] * vh


def _relative(embedding: Tensor, size: int) -> Tensor:
    """(size, size, d): row i, column j holds the embedding of the offset i − j."""
    if embedding.shape[0] != 2 * size - 1:
        embedding = F.interpolate(embedding.T[None], size=2 * size - 1, mode="linear")[0].T
    position = torch.arange(size, device=embedding.device)
    return embedding[position[:, None] - position[None, :] + size - 1]
