"""The one description of a backbone, used from Python, recipes, Detectron2 YAML and mmengine configs alike."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .layers.bases import BASE_FUNCTIONS, BASES
from .layers.karat import INITS, PROJECTIONS
from .layers.pointwise import POINTWISE
from .layers.starts import STARTS
from .utils.errors import UserError, check_choice, check_keys


@dataclass(frozen=True)
class AttentionConfig:
    """How tokens mix.

    Args:
        kind: ``softmax``, ``karat`` (arXiv 2503.10632), or a cheap rival of both: ``polynomial`` S³/√N or ``relu``
            relu(S)/N.
        basis: of KArAt's functions: ``fourier``, ``rational``, ``mexican_hat``, ``morlet``, ``dog``, ``meyer``,
            ``shannon`` or ``bspline``.
        base: base function β added to each function: ``zero``, ``identity``, ``silu`` or ``gelu``.
        order: ``w_phi`` W Φ̂(S), ``phi_w`` Φ̂(W S) (linear in N for Fourier and B-splines), ``phi_phi`` Φ̂₂(Φ̂₁(S)), or
            ``full``, one N×N matrix of functions.
        projection: onto the probability simplex: ``none``, ``before`` (the r numbers that W takes, ``w_phi`` only) or
            ``after`` (the row of N attention weights).
        grid: G, harmonics of ``fourier``, intervals of ``bspline``; one number, or one per block.
        rank: r, number of rows of Φ̂; W has as many columns. One number, or one per block; unused by ``full``.
        spline_order: degree of the pieces of ``bspline``.
        mode: ``blockwise`` (every block owns its operators) or ``universal`` (all blocks share one set).
        scales: add the paper's two scale tensors per operator.
        init: ``variance_preserving``, or ``paper`` for literal N(0, 1) coefficients.
        compiled: run the functions of a basis other than ``fourier`` through torch.compile, which takes half a minute
            on a CPU and makes them about twice as fast.
        drop_rate: dropout of attention: KArAt's on the r numbers per query, else on the weights.
        weight_init: of the projections: ``normal``, or ``mimetic`` (arXiv 2305.09828).
        blocks: indices of the blocks that use ``kind``, the others use softmax; None = all.
        heads: indices of the heads that use ``kind``, the others use softmax; None = all.
        rel_pos: decomposed relative position embedding of ViTDet (softmax only, no class token).
    """

    kind: str = "softmax"
    basis: str = "fourier"
    base: str = "zero"
    order: str = "w_phi"
    projection: str = "none"
    grid: int | tuple[int, ...] = 3
    rank: int | tuple[int, ...] = 12
    spline_order: int = 3
    mode: str = "blockwise"
    scales: bool = False
    init: str = "variance_preserving"
    compiled: bool = False
    drop_rate: float = 0.0
    weight_init: str = "normal"
    blocks: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rel_pos: bool = False

    def __post_init__(self):
        check_choice("attention.kind", self.kind, ("softmax", "karat", *POINTWISE))
        check_choice("attention.basis", self.basis, BASES)
        check_choice("attention.base", self.base, BASE_FUNCTIONS)
        check_choice("attention.order", self.order, PROJECTIONS)
        if self.projection not in PROJECTIONS[self.order]:
            allowed = " or ".join(repr(p) for p in PROJECTIONS[self.order])
            raise UserError(
                f"attention.projection is {self.projection!r}; attention.order {self.order!r} allows {allowed}. "
                "'before' needs the order 'w_phi', where W takes what is projected."
            )
        check_choice("attention.mode", self.mode, ("blockwise", "universal"))
        check_choice("attention.init", self.init, INITS)
        check_choice("attention.weight_init", self.weight_init, ("normal", "mimetic"))
        for name in ("grid", "rank"):
            self._normalize_per_block(name)
        _check_positive("attention.spline_order", self.spline_order)
        _check_rate("attention.drop_rate", self.drop_rate)
        _check_bool("attention.scales", self.scales)
        _check_bool("attention.compiled", self.compiled)
        _check_bool("attention.rel_pos", self.rel_pos)
        for name in ("blocks", "heads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _int_tuple(f"attention.{name}", getattr(self, name)))
        if self.rel_pos and self.kind != "softmax" and self.blocks is None:
            raise UserError(
                f"attention.rel_pos is defined for softmax scores only, and every block uses {self.kind!r}. "
                "Set rel_pos=False, or attention.blocks to leave some blocks to softmax."
            )

    def _normalize_per_block(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, int):
            _check_positive(f"attention.{name}", value)
            return
        values = _int_tuple(f"attention.{name}", value)
        for v in values:
            _check_positive(f"attention.{name}", v)
        if self.mode == "universal":
            raise UserError(
                f"attention.{name} is {values}, a value per block; mode 'universal' shares one operator among all "
                "blocks. Give one number, or set mode='blockwise'."
            )
        object.__setattr__(self, name, values)

    def of_block(self, name: str, block: int) -> int:
        """``grid`` or ``rank`` of a block."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[block]


@dataclass(frozen=True)
class FfnConfig:
    """How channels mix.

    Args:
        kind: ``mlp`` (GELU), ``grkan`` (arXiv 2409.10594) or ``kan`` (B-splines, arXiv 2404.19756).
        ratio: hidden width over ``embed_dim``.
        groups: number of channel groups that share one denominator.
        degrees: (m, n), degrees of the numerator and of the denominator.
        init: function that the second activation starts as: ``identity``, ``swish``, ``gelu``, ``relu``,
            ``leaky_relu`` (slope 0.01), ``tanh`` or ``sigmoid``; all but the first need degrees of at least (5, 4).
        weight_init: ``variance_preserving``, or ``released`` for the N(0, 0.02) of the published runs.
        denominator: ``sum_abs`` for 1+Σ|b_i||x|ⁱ, ``abs_sum`` for 1+|Σ b_i xⁱ|.
        grid: intervals of a spline on [-1, 1] (``kan`` only).
        order: degree of a spline's pieces (``kan`` only).
    """

    kind: str = "mlp"
    ratio: float = 4.0
    groups: int = 8
    degrees: tuple[int, int] = (5, 4)
    init: str = "swish"
    weight_init: str = "variance_preserving"
    denominator: str = "sum_abs"
    grid: int = 5
    order: int = 3

    def __post_init__(self):
        check_choice("ffn.kind", self.kind, ("mlp", "grkan", "kan"))
        check_choice("ffn.init", self.init, STARTS["sum_abs"])
        check_choice("ffn.weight_init", self.weight_init, ("variance_preserving", "released"))
        check_choice("ffn.denominator", self.denominator, ("sum_abs", "abs_sum"))
        for name in ("groups", "grid", "order"):
            _check_positive(f"ffn.{name}", getattr(self, name))
        object.__setattr__(self, "degrees", _int_tuple("ffn.degrees", self.degrees))
        if len(self.degrees) != 2 or min(self.degrees) < 1:
            raise UserError(f"ffn.degrees is {self.degrees}; it must be two degrees of at least 1, such as (5, 4).")
        if self.init != "identity" and (self.degrees[0] < 5 or self.degrees[1] < 4):
            raise UserError(
                f"ffn.init {self.init!r} needs ffn.degrees of at least (5, 4), got {self.degrees}. Raise them, or set "
                "ffn.init to 'identity', which every degree holds."
            )
        if not isinstance(self.ratio, int | float) or self.ratio <= 0:
            raise UserError(f"ffn.ratio is {self.ratio!r}; it must be a positive number, such as 4.0.")


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
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"):
            _check_positive(name, getattr(self, name))
        for name in (
            "class_token",
            "qkv_bias",
            "final_norm",
            "mask_window_padding",
            "grad_checkpointing",
            "pos_embed_antialias",
        ):
            _check_bool(name, getattr(self, name))
        for name in ("num_classes", "window_size", "gpsa_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{name} is {value!r}; it must be an integer of at least 0.")
        for name in ("drop_path", "drop_rate", "weights_min_match"):
            _check_rate(name, getattr(self, name))
        self._check_sizes()
        self._check_indices()

    def _normalize(self) -> None:
        size = self.img_size
        if isinstance(size, int):
            size = (size, size)
        size = _int_tuple("img_size", size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"img_size is {self.img_size!r}; it must be a positive integer or (height, width).")
        object.__setattr__(self, "img_size", size)
        for name, kind in (("attention", AttentionConfig), ("ffn", FfnConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                check_keys(name, value, [f.name for f in fields(kind)])
                object.__setattr__(self, name, kind(**value))
            elif not isinstance(value, kind):
                raise UserError(f"{name} is {value!r}; it must be a dict of {kind.__name__}'s fields.")
        if self.stage_depths is not None:
            object.__setattr__(self, "stage_depths", _int_tuple("stage_depths", self.stage_depths))
            object.__setattr__(self, "depth", sum(self.stage_depths))
        if self.out_indices is None:
            object.__setattr__(self, "out_indices", (self.num_outputs - 1,))
        for name in ("out_indices", "global_blocks"):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))

    def _check_sizes(self) -> None:
        check_patch_multiple(self.img_size, self.patch_size, "img_size")
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
            if self.is_karat(block) and attention.order != "full" and rank > tokens:
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


def _int_tuple(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise UserError(f"{name} is {value!r}; it must be a list of integers.")
    values = tuple(value)
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise UserError(f"{name} is {value!r}; it must be a list of integers.")
    return values


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a positive integer.")


def _check_rate(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; it must be between 0 and 1.")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be true or false.")
