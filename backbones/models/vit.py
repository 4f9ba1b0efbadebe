"""The one ViT trunk: patches, blocks of (attention, feed-forward), a classifier or maps for dense tasks.

State-dict keys are timm's, so ViT, DeiT, AugReg and MAE weights load without a table; windows, relative positions and
block numbering follow Detectron2's ViT (arXiv 2203.16527).
"""

import re
from collections import deque
from collections.abc import Iterator
from functools import partial

import torch
from timm.layers import DropPath, resample_abs_pos_embed
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import BackboneConfig, check_patch_multiple
from ..layers.attention import Attention, mimetic_start
from ..layers.gpsa import GatedAttention
from ..layers.gr_kan import GRKAN
from ..layers.karat import KArAtOperator
from ..layers.resample import Grid
from ..layers.windows import window_partition, window_unpartition
from . import parts

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + feed-forward(norm2(x))."""

    def __init__(self, config: BackboneConfig, index: int):
        super().__init__()
        dim = config.embed_dim
        rate = config.drop_path * index / max(1, config.depth - 1)
        self.window_size = config.window_size if config.is_windowed(index) else 0
        self.mask_padding = config.mask_window_padding
        self.norm1 = LayerNorm(dim)
        self.attn = parts.make_attention(config, index)
        self.norm2 = LayerNorm(dim)
        self.mlp = parts.make_feed_forward(config, dim)
        self.drop_path = DropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor, grid: Grid, prefix: int, shared: KArAtOperator | None = None) -> Tensor:
        """(B, N, C) to the same shape, N = prefix + rows·columns of ``grid``."""
        x = x + self.drop_path(self._attend(self.norm1(x), grid, prefix, shared))
        fused = isinstance(self.mlp, GRKAN)  # takes the normalization along, see its forward
        return x + self.drop_path(self.mlp(x, self.norm2) if fused else self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, grid: Grid, prefix: int, shared: KArAtOperator | None) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(x, grid, prefix, shared=shared)
        windows, real = window_partition(x.unflatten(1, grid), size)
        mixed = self.attn(windows, (size, size), 0, real if self.mask_padding else None, shared)
        return window_unpartition(mixed, size, *grid).flatten(1, 2)


class VisionTransformer(nn.Module):
    """A ViT whose attention and feed-forward are chosen by the config; runs at any size divisible by the patch."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.embed_dim = self.num_features = config.embed_dim
        self.depth, self.patch_size, self.out_indices = config.depth, config.patch_size, config.out_indices
        self.widths, self.strides = config.widths, config.strides
        self.num_classes = config.num_classes
        self.num_prefix_tokens = int(config.class_token)
        self.grad_checkpointing = config.grad_checkpointing
        rows, columns = config.grid_size

        self.patch_embed = PatchEmbed(
            config.img_size,
            config.patch_size,
            config.in_chans,
            self.embed_dim,
            dynamic_img_pad=False,
            strict_img_size=False,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.prefix(0) + rows * columns, self.embed_dim))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.operator = parts.make_shared_operator(config)
        self.norm = LayerNorm(self.embed_dim) if config.final_norm else nn.Identity()
        self.head = nn.Linear(self.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        """ViT's start; GR-KAN's and KArAt's own tensors keep theirs."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        parts.start_linear(self)
        for block in self.blocks:
            if isinstance(block.attn, GatedAttention):
                block.attn.local_init()
            elif self.config.attention.weight_init == "mimetic" and isinstance(block.attn, Attention):
                mimetic_start(block.attn)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes), or features (B, C) when num_classes is 0."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to normalized tokens (B, N, C), the class token first when there is one."""
        _, tokens, _ = deque(self._walk(x), maxlen=1).pop()
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits, or pooled features (B, C) with ``pre_logits``."""
        pooled = x[:, 0] if self.num_prefix_tokens else x.mean(1)
        return pooled if pre_logits else self.head(pooled)

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to maps (B, C, H/p, W/p), one per out_indices, before the final norm.

        Raises:
            ValueError: when H or W is not a multiple of the patch size.
        """
        maps = {}
        for index, tokens, grid in self._walk(x):
            if index in self.out_indices:
                patches = tokens[:, self.config.prefix(index) :]
                maps[index] = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            if index == max(self.out_indices):
                break
        return [maps[index] for index in self.out_indices]

    def _walk(self, x: Tensor) -> Iterator[tuple[int, Tensor, Grid]]:
        """(index, tokens after that block, grid of the patches) for each block."""
        tokens, grid = self._embed(x)
        for index, block in enumerate(self.blocks):
            prefix = self.config.prefix(index)
            if tokens.shape[1] < prefix + grid[0] * grid[1]:  # ConViT's class token joins after the local blocks
                tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, grid, prefix, self.operator, use_reentrant=False)
            else:
                tokens = block(tokens, grid, prefix, self.operator)
            yield index, tokens, grid

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        height, width = x.shape[-2:]
        check_patch_multiple((height, width), self.patch_size, "input")
        grid = (height // self.patch_size, width // self.patch_size)
        tokens = self.patch_embed(x)
        prefix = self.config.prefix(0)
        if prefix:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        pos_embed = self.pos_embed
        if grid != self.config.grid_size:
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                list(grid),
                list(self.config.grid_size),
                prefix,
                antialias=self.config.pos_embed_antialias,
            )
        return tokens + pos_embed, grid

    def operators(self) -> dict[str, KArAtOperator]:
        """KArAt's operators by their name in the state dict."""
        return parts.operators(self)

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 for the embedding, depth + 1 for what follows."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        block = re.match(r"blocks\.(\d+)\.", name)
        return int(block.group(1)) + 1 if block else self.depth + 1

    # The methods below are timm's interface, which its loaders, optimizers and scripts call.

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that no optimizer should decay: embeddings and rational coefficients."""
        names = {name for name in ("pos_embed", "cls_token") if getattr(self, name) is not None}
        return names | set(parts.undecayed(self))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups by depth."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a new one; 0 = none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
