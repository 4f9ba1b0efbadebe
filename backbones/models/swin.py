"""timm's Swin Transformer (arXiv 2103.14030) whose window attention and feed-forward are chosen by the config.

State-dict keys and, at 224 pixels, outputs are timm's. At any other size windows keep their size, blocks shift wherever
the map exceeds a window, and padded tokens get no attention.
"""

import re

import timm.models.swin_transformer as timm_swin
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import BackboneConfig, check_patch_multiple
from ..layers.attention import FrozenScoresLinear, mimetic_start
from ..layers.karat import KArAtOperator
from ..layers.operator_attention import gated
from ..layers.windows import window_partition, window_unpartition
from . import parts


class WindowAttention(timm_swin.WindowAttention):
    """Window attention whose scores, Q Kᵀ/√d and the relative position bias, pass a softmax or an operator.

    A bias that is a matrix per head joins the scores exactly as N more channels: one per query in q, the bias's column
    in k. So no operator needs to know of it.
    """

    def __init__(self, config: BackboneConfig, index: int, dim: int, num_heads: int):
        rates = {"attn_drop": config.attention.drop_rate, "proj_drop": config.drop_rate}
        super().__init__(dim, num_heads, window_size=config.window_size, qkv_bias=config.qkv_bias, **rates)
        softmax = config.attention_kind(index) == "softmax"
        self.operator = None if softmax else parts.make_operator(config, index, num_heads)
        adds = not softmax and config.attention.blend == "add"
        self.gate = nn.Parameter(torch.zeros(num_heads)) if adds else None
        if config.freezes_scores(index):
            self.qkv = FrozenScoresLinear(self.qkv)
            self.relative_position_bias_table.requires_grad_(False)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Mixes windows (B·n, N, C); ``key_mask`` (B·n, N) bool, True = real token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self._get_rel_pos_bias().to(q.dtype)  # (1, h, queries, keys)
        if self.operator is None:
            mixed = self._softmax(q, k, v, bias, key_mask)
        elif self.gate is None:
            mixed = self._operate(q, k, v, bias, key_mask)
        else:
            softmax = self._softmax(q, k, v, bias, key_mask)
            mixed = softmax + gated(self.gate, self._operate(q, k, v, bias, key_mask), softmax.dtype)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2).to(x.dtype)))

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is not None:
            bias = bias.masked_fill(~key_mask[:, None, None], -torch.inf)
        drop_rate = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop_rate)

    def _operate(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor | None) -> Tensor:
        query = torch.eye(self.window_area, dtype=q.dtype, device=q.device) / self.scale
        q = torch.cat([q, query.expand(*q.shape[:2], -1, -1)], -1)
        k = torch.cat([k, bias.transpose(-2, -1).expand(len(k), -1, -1, -1)], -1)
        return self.operator(q, k, v, self.window_size, 0, key_mask, self.scale)


class SwinBlock(timm_swin.SwinTransformerBlock):
    """timm's block with the attention and feed-forward of the config, and windows without a cyclic shift."""

    def __init__(self, config: BackboneConfig, index: int, dim: int, num_heads: int, shifted: bool, drop_path: float):
        size = config.window_size
        super().__init__(dim, (size, size), num_heads, None, size, dynamic_mask=True, drop_path=drop_path)
        self.shift = size // 2 if shifted else 0
        self.attn = WindowAttention(config, index, dim, num_heads)
        self.mlp = parts.make_feed_forward(config, dim)
        parts.start_linear(self)
        if config.attention.weight_init == "mimetic":
            mimetic_start(self.attn)

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size = self.window_size[0]
        offset = size - self.shift if self.shift and min(height, width) > size else 0
        windows, real = window_partition(x, size, offset)
        return window_unpartition(self.attn(windows, real), size, height, width, offset)


class SwinTransformer(timm_swin.SwinTransformer):
    """A Swin Transformer that runs at any size divisible by the patch."""

    def __init__(self, config: BackboneConfig):
        stages = range(len(config.stage_depths))
        heads, widths = ([n * 2**s for s in stages] for n in (config.num_heads, config.embed_dim))
        super().__init__(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            num_classes=config.num_classes,
            embed_dim=config.embed_dim,
            depths=config.stage_depths,
            num_heads=heads,
            window_size=config.window_size,
            strict_img_size=False,
            drop_path_rate=config.drop_path,
        )
        self.config, self.depth, self.patch_size = config, config.depth, config.patch_size
        self.out_indices = config.out_indices
        self.widths, self.strides = config.widths, config.strides
        index = 0
        for stage, width, num_heads in zip(self.layers, widths, heads, strict=True):
            for place, block in enumerate(stage.blocks):
                rate = getattr(block.drop_path1, "drop_prob", 0.0)
                stage.blocks[place] = SwinBlock(config, index, width, num_heads, place % 2 == 1, rate)
                index += 1
        if not config.final_norm:  # dense tasks: a norm per map, as published detectors and segmentors have
            self.norm = nn.Identity()
            self.out_norms = nn.ModuleDict({str(s): nn.LayerNorm(widths[s]) for s in config.out_indices})
        self.set_grad_checkpointing(config.grad_checkpointing)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalized tokens (B, rows, columns, C)."""
        check_patch_multiple(tuple(x.shape[-2:]), self.patch_size, "input")
        return super().forward_features(x)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to maps (B, C·2ˢ, H/(p·2ˢ), W/(p·2ˢ)), one per stage s in out_indices.

        Raises:
            ValueError: when H or W is not a multiple of the patch size.
        """
        check_patch_multiple(tuple(x.shape[-2:]), self.patch_size, "input")
        x = self.patch_embed(x)
        maps = {}
        for index, stage in enumerate(self.layers[: max(self.out_indices) + 1]):
            x = stage(x)
            if index in self.out_indices:
                normal = x if self.config.final_norm else self.out_norms[str(index)](x)
                maps[index] = normal.permute(0, 3, 1, 2).contiguous()
        return [maps[index] for index in self.out_indices]

    def operators(self) -> dict[str, KArAtOperator]:
        """KArAt's operators by their name in the state dict."""
        return parts.operators(self)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for the embedding, depth + 1 for what follows."""
        if name.startswith("patch_embed"):
            return 0
        place = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)\.)?", name)
        if not place:
            return self.depth + 1
        return sum(self.config.stage_depths[: int(place.group(1))]) + int(place.group(2) or 0) + 1

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no optimizer should decay: relative position biases, rational coefficients."""
        return super().no_weight_decay() | set(parts.undecayed(self))
