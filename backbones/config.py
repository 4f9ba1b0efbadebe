"""The one description of a backbone, used from Python, recipes, Detectron2 YAML and mmengine configs alike."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .layer_config import AttentionConfig, FfnConfig
from .layers.karat import check_full
from .utils.errors import UserError, check_keys, check_name, shown
from .utils.values import MOST, check_bool, check_positive, check_rate, int_tuple

_LARGEST = {
    **{"img_size": 2**16, "patch_size": 1024, "in_chans": 1024, "embed_dim": 2**14, "depth": MOST, "num_heads": 1024},
    **{"num_classes": 10**6, "window_size": 1024, "gpsa_blocks": MOST, "stages": 8, "tokens": 2**20},
}


@dataclass(frozen=True)
class BackboneConfig:
    """A ViT with KArAt or softmax attention and GR-KAN or MLP feed-forwards.

    Args:
        arch: name of the preset this came from.
        img_size: native input size in pixels, int or (height, width): size of position embedding and operators.
            Other sizes are resampled when the network runs.
        patch_size: side of a patch in pixels.
        in_chans: input channels.
        embed_dim: C, width.
        depth: number of blocks.
        num_heads: attention heads.
        qkv_bias: queries, keys and values have a bias.
        gpsa_blocks: number of leading blocks with gated positional self-attention (ConViT, arXiv 2103.10697); the class
            token joins after them.
        stage_depths: blocks of each stage of a Swin Transformer (arXiv 2103.14030), whose width and heads double from
            stage to stage; None = a ViT. ``depth`` is their sum and ``out_indices`` counts stages.
        num_classes: outputs of the classifier; 0 = pooled features.
        class_token: prepend a class token; without it features are averaged.
        final_norm: LayerNorm after the last block. Dense tasks set False: maps never pass it.
        attention, ffn: see AttentionConfig and FfnConfig; dicts are accepted.
        window_size: side in patches of windowed attention; 0 = global everywhere.
        global_blocks: indices of the blocks without windows.
        mask_window_padding: padded window tokens get no attention (False: as Detectron2's ViT).
        out_indices: blocks whose outputs ``forward_maps`` returns; None = the last.
        drop_path: stochastic depth rate of the last block, rising linearly from 0.
        drop_rate: dropout after the projections.
        grad_checkpointing: recompute block activations in the backward pass.
        pos_embed_antialias: antialias when resampling the position embedding (timm: True; Detectron2: False).
        weights: file (safetensors or .pth) or timm model name to start from.
        weights_min_match: least share of the backbone's parameters that ``weights`` must fill.
    """

    arch: str = "vit_tiny_patch16_224"
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    qkv_bias: bool = True
    gpsa_blocks: int = 0
    stage_depths: tuple[int, ...] | None = None
    num_classes: int = 1000
    class_token: bool = True
    final_norm: bool = True
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    ffn: FfnConfig = field(default_factory=FfnConfig)
    window_size: int = 0
    global_blocks: tuple[int, ...] = ()
    mask_window_padding: bool = True
    out_indices: tuple[int, ...] | None = None
    drop_path: float = 0.0
    drop_rate: float = 0.0
    grad_checkpointing: bool = False
    pos_embed_antialias: bool = True
    weights: str | None = None
    weights_min_match: float = 0.9

    def __post_init__(self):
        self._normalize()
        for name in ("patch_size", "in_chans", "embed_dim", "num_heads"):
            check_positive(name, getattr(self, name), _LARGEST[name])
        for name in (
            "class_token",
            "qkv_bias",
            "final_norm",
            "mask_window_padding",
            "grad_checkpointing",
            "pos_embed_antialias",
        ):
            check_bool(name, getattr(self, name))
        for name in ("num_classes", "window_size", "gpsa_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{name} is {shown(value)}; it must be an integer of at least 0.")
            if value > _LARGEST[name]:
                raise UserError(f"{name} is {shown(value)}; it may be at most {_LARGEST[name]}.")
        for name in ("drop_path", "drop_rate", "weights_min_match"):
            check_rate(name, getattr(self, name))
        for name in ("arch", "weights"):
            if getattr(self, name) is not None:
                check_name(name, getattr(self, name), 4096)
        self._check_sizes()
        self._check_indices()

    def _normalize(self) -> None:
        size = self.img_size
        if isinstance(size, int):
            size = (size, size)
        size = int_tuple("img_size", size, _LARGEST["img_size"])
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"img_size is {shown(self.img_size)}; it must be a positive integer or (height, width).")
        object.__setattr__(self, "img_size", size)
        for name, kind in (("attention", AttentionConfig), ("ffn", FfnConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                check_keys(name, value, [f.name for f in fields(kind)])
                object.__setattr__(self, name, kind(**value))
            elif not isinstance(value, kind):
                raise UserError(f"{name} is {shown(value)}; it must be a dict of {kind.__name__}'s fields.")
        if self.stage_depths is not None:
            object.__setattr__(self, "stage_depths", int_tuple("stage_depths", self.stage_depths))
            object.__setattr__(self, "depth", sum(self.stage_depths))
            if len(self.stage_depths) > _LARGEST["stages"]:
                raise UserError(f"stage_depths has {len(self.stage_depths)} stages; it may have {_LARGEST['stages']}.")
        check_positive("depth", self.depth, _LARGEST["depth"])
        if self.out_indices is None:
            object.__setattr__(self, "out_indices", (self.num_outputs - 1,))
        for name in ("out_indices", "global_blocks"):
            object.__setattr__(self, name, int_tuple(name, getattr(self, name)))

    def _check_sizes(self) -> None:
        check_patch_multiple(self.img_size, self.patch_size, "img_size")
        tokens, largest = math.prod(self.grid_size), _LARGEST["tokens"]
        if tokens > largest:
            raise UserError(
                f"img_size {self.img_size} has {tokens} patches of {self.patch_size}; at most {largest} fit."
            )
        if self.hidden_dim < 1:
            raise UserError(f"ffn.ratio {self.ffn.ratio} leaves no channel of {self.embed_dim}. Raise it.")
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}.")
        if self.ffn.kind == "grkan":
            for width in (self.embed_dim, self.hidden_dim):
                if width % self.ffn.groups:
                    raise UserError(f"width {width} is not divisible by ffn.groups {self.ffn.groups}.")
        if self.stage_depths is not None:
            self._check_swin()
        if self.gpsa_blocks >= self.depth:
            raise UserError(
                f"gpsa_blocks is {self.gpsa_blocks}; it must be below the {self.depth} blocks of the backbone: in the "
                "last all tokens see each other."
            )
        if self.class_token and self.window_size:
            raise UserError(f"window_size {self.window_size} has no place for a class token. Set class_token=False.")
        users = [self.attention_kind(block) for block in range(self.depth) if self.prefix(block)]
        if users and self.attention.heads is None and all(kind == "none" for kind in users):
            raise UserError(
                "attention.kind 'none' leaves the class token without a sight of the image. Set class_token=False, "
                "which averages the tokens, or attention.blocks to leave some blocks to softmax."
            )
        if self.class_token and self.attention.rel_pos:
            raise UserError("attention.rel_pos is not defined for a class token. Set class_token=False.")
        self._check_karat()

    def _check_swin(self) -> None:
        if not self.stage_depths or min(self.stage_depths) < 1:
            raise UserError(
                f"stage_depths is {self.stage_depths}; it must be the blocks of each stage, as (2, 2, 6, 2)."
            )
        if not self.window_size:
            raise UserError("window_size is 0; a Swin Transformer needs windows, of 7 for example.")
        for name, given, allowed in (
            ("class_token", self.class_token, False),
            ("gpsa_blocks", self.gpsa_blocks, 0),
            ("global_blocks", self.global_blocks, ()),
            ("attention.rel_pos", self.attention.rel_pos, False),
            ("attention.mode", self.attention.mode, "blockwise"),
            ("attention.heads", self.attention.heads, None),
        ):
            if given != allowed:
                raise UserError(
                    f"{name} is {given!r}; a Swin Transformer allows {allowed!r} only: it has windows everywhere, a "
                    "relative position bias of its own, and other heads in each stage."
                )

    def _check_karat(self) -> None:
        attention = self.attention
        for name in ("grid", "rank"):
            value = getattr(attention, name)
            if not isinstance(value, int) and len(value) != self.depth:
                raise UserError(f"attention.{name} has {len(value)} values; the backbone has {self.depth} blocks.")
        for block in range(self.depth):
            rows, columns = self.token_grid(block)
            rank, tokens = attention.of_block("rank", block), rows * columns + self.prefix(block)
            if self.is_karat(block) and attention.order == "full":
                check_full(tokens, f"block {block}")
            elif self.is_karat(block) and rank > tokens:
                raise UserError(
                    f"attention.rank {rank} exceeds the {tokens} tokens of a map or window in block {block}. "
                    f"Use at most {tokens}."
                )
        if attention.heads is not None and attention.kind != "softmax":
            for head in attention.heads:
                if not 0 <= head < self.num_heads:
                    raise UserError(f"attention.heads holds {head}; there are heads 0 to {self.num_heads - 1}.")
            if len(set(attention.heads)) != len(attention.heads) or not attention.heads:
                raise UserError(f"attention.heads is {attention.heads}; name each head once, or None for all.")

    def _check_indices(self) -> None:
        part = "blocks" if self.stage_depths is None else "stages"
        for name, indices, what, count in (
            ("out_indices", self.out_indices, part, self.num_outputs),
            ("global_blocks", self.global_blocks, "blocks", self.depth),
            ("attention.blocks", self.attention.blocks or (), "blocks", self.depth),
        ):
            for index in indices:
                if not 0 <= index < count:
                    raise UserError(f"{name} holds {index}; the backbone has {what} 0 to {count - 1}.")
        local = [index for index in self.attention.blocks or () if index < self.gpsa_blocks]
        if local:
            raise UserError(
                f"attention.blocks holds {local[0]}; blocks 0 to {self.gpsa_blocks - 1} have ConViT's local attention."
            )
        if not self.out_indices:
            raise UserError("out_indices is empty; give the index of at least one block, or None for the last.")

    @property
    def num_outputs(self) -> int:
        """How many maps ``out_indices`` chooses from: blocks, or a Swin Transformer's stages."""
        return self.depth if self.stage_depths is None else len(self.stage_depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map in ``out_indices``."""
        return tuple(self.embed_dim * self._scale(index) for index in self.out_indices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per side of a cell of each map in ``out_indices``."""
        return tuple(self.patch_size * self._scale(index) for index in self.out_indices)

    def _scale(self, index: int) -> int:
        return 1 if self.stage_depths is None else 2**index

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return int(self.embed_dim * self.ffn.ratio)

    @property
    def least_parameters(self) -> int:
        """Fewer parameters than any backbone of this config has: those of the projections of its blocks."""
        depths = self.stage_depths or (self.depth,)
        return sum(depth * (self.embed_dim * self._scale(stage)) ** 2 for stage, depth in enumerate(depths))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches per column and row of a native-size image."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def is_windowed(self, block: int) -> bool:
        return self.window_size > 0 and block not in self.global_blocks

    def prefix(self, block: int) -> int:
        """Number of class tokens in a block: none in ConViT's local blocks, after which the class token joins."""
        return int(self.class_token and block >= self.gpsa_blocks)

    def attention_kind(self, block: int) -> str:
        """``gpsa`` in ConViT's local blocks, ``attention.kind`` where it applies, else ``softmax``."""
        attention = self.attention
        if block < self.gpsa_blocks:
            return "gpsa"
        return attention.kind if attention.blocks is None or block in attention.blocks else "softmax"

    def freezes_scores(self, block: int) -> bool:
        """Whether queries and keys of a block are never trained; a frozen KArAt freezes its operators instead."""
        attention = self.attention
        if not attention.frozen or attention.kind == "karat":
            return False
        return self.attention_kind(block) == attention.kind or attention.kind == "softmax"

    def is_karat(self, block: int) -> bool:
        return self.attention_kind(block) == "karat"

    def token_grid(self, block: int) -> tuple[int, int]:
        """Rows and columns of patches that attend to each other in ``block`` at native size."""
        return (self.window_size, self.window_size) if self.is_windowed(block) else self.grid_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BackboneConfig":
        """Builds a config; raises UserError for an unknown key, naming the nearest valid one."""
        if not isinstance(values, Mapping):
            raise UserError(f"the backbone config is {shown(values)}; it must hold keys, such as arch.")
        check_keys("the backbone config", values, [f.name for f in fields(cls)])
        return cls(**values)

    def merged(self, overrides: Mapping[str, Any]) -> "BackboneConfig":
        """This config with some values replaced; ``attention`` and ``ffn`` dicts are merged key by key."""
        check_keys("the backbone config", overrides, [f.name for f in fields(self)])
        overrides = dict(overrides)
        for name in ("attention", "ffn"):
            if isinstance(overrides.get(name), Mapping):
                check_keys(name, overrides[name], [f.name for f in fields(getattr(self, name))])
                overrides[name] = replace(getattr(self, name), **overrides[name])
        if {"depth", "stage_depths"} & overrides.keys() and "out_indices" not in overrides:
            overrides["out_indices"] = None
        return replace(self, **overrides)


def check_patch_multiple(size: tuple[int, int], patch_size: int, what: str) -> None:
    """Raises UserError naming the nearest valid sizes unless height and width are multiples of the patch."""
    for side in size:
        if side % patch_size or side == 0:
            low = side // patch_size * patch_size
            near = f"{low} or {low + patch_size}" if low else f"{patch_size}"
            raise UserError(
                f"{what} {size[0]}x{size[1]} is not divisible by the patch size {patch_size}; use {near} for {side}."
            )
