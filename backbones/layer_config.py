"""The two choices inside a block, attention and feed-forward, as a user describes them."""

from dataclasses import dataclass

from .layers.bases import BASE_FUNCTIONS, BASES
from .layers.diagonal import DIAGONALS
from .layers.karat import INITS, PROJECTIONS
from .layers.operator_attention import BLENDS
from .layers.pointwise import CONTROLS, POINTWISE
from .layers.starts import STARTS
from .utils.errors import UserError, check_choice, shown
from .utils.values import check_bool, check_positive, check_rate, int_tuple

MOST_FUNCTIONS = 4096  # harmonics, intervals, rows of an operator
MOST_ORDER = 32  # degree of a spline or polynomial
MOST_RATIO = 64


@dataclass(frozen=True)
class AttentionConfig:
    """How tokens mix.

    Args:
        kind: ``softmax``, ``karat`` (arXiv 2503.10632), a cheap rival of both, ``polynomial`` S³/√N or ``relu``
            relu(S)/N, or a control: ``uniform``, the mean over tokens, or ``none``, no token sees another.
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
        blend: what becomes of the softmax where ``kind`` is another: ``replace``, or ``add``, softmax + gate · operator
            with a learnable gate per head that starts at 0, so that the network starts as the softmax network.
        diagonal: KArAt with functions ψ of single scores beside its modular form, ψ_p(S_kp) + Σ_r W_pr Φ̂_r(S_k), by
            which a query can pick a key (an extension of this project): ``none``, ``shared``, one ψ per head, or
            ``positionwise``, one per key.
        rel_pos: decomposed relative position embedding of ViTDet, on the scores of the softmax (no class token).
        frozen: a control: what weighs the tokens stays as it started, KArAt's operators, else queries and keys.
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
    blend: str = "replace"
    diagonal: str = "none"
    rel_pos: bool = False
    frozen: bool = False

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
        check_choice("attention.blend", self.blend, BLENDS)
        check_choice("attention.diagonal", self.diagonal, DIAGONALS)
        if self.blend == "add" and self.kind == "softmax":
            raise UserError(
                "attention.blend is 'add', and attention.kind 'softmax' has nothing to add to itself. Set "
                "attention.kind, as 'karat', or blend='replace'."
            )
        if self.diagonal != "none" and (self.kind != "karat" or self.projection == "after"):
            raise UserError(
                f"attention.diagonal is {self.diagonal!r}; it needs attention.kind 'karat' and the projection 'none' "
                f"or 'before', got {self.kind!r} and {self.projection!r}. Set diagonal='none', or change those."
            )
        check_choice("attention.mode", self.mode, ("blockwise", "universal"))
        check_choice("attention.init", self.init, INITS)
        check_choice("attention.weight_init", self.weight_init, ("normal", "mimetic"))
        for name in ("grid", "rank"):
            self._normalize_per_block(name)
        check_positive("attention.spline_order", self.spline_order, MOST_ORDER)
        check_rate("attention.drop_rate", self.drop_rate)
        check_bool("attention.scales", self.scales)
        check_bool("attention.compiled", self.compiled)
        check_bool("attention.rel_pos", self.rel_pos)
        check_bool("attention.frozen", self.frozen)
        if self.frozen and self.kind in CONTROLS:
            raise UserError(
                f"attention.frozen is True, and attention.kind {self.kind!r} weighs tokens by nothing that could be "
                "trained. Set frozen=False, or another kind."
            )
        for name in ("blocks", "heads"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int_tuple(f"attention.{name}", getattr(self, name)))
        if self.rel_pos and self.kind != "softmax" and self.blocks is None and self.blend == "replace":
            raise UserError(
                f"attention.rel_pos is defined for softmax scores only, and every block uses {self.kind!r}. "
                "Set rel_pos=False, attention.blocks to leave some blocks to softmax, or attention.blend='add'."
            )

    def _normalize_per_block(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, int):
            check_positive(f"attention.{name}", value, MOST_FUNCTIONS)
            return
        values = int_tuple(f"attention.{name}", value, MOST_FUNCTIONS)
        for v in values:
            check_positive(f"attention.{name}", v, MOST_FUNCTIONS)
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
        kind: ``mlp`` (GELU), ``grkan`` (arXiv 2409.10594), ``kan`` (B-splines, arXiv 2404.19756), or a control:
            ``linear``, an MLP without its activation.
        ratio: hidden width over ``embed_dim``.
        groups: number of channel groups that share one denominator.
        degrees: (m, n), degrees of the numerator and of the denominator.
        init: function that the second activation starts as: ``identity``, ``swish``, ``gelu``, ``relu``,
            ``leaky_relu`` (slope 0.01), ``tanh`` or ``sigmoid``; all but the first need degrees of at least (5, 4).
        weight_init: ``variance_preserving``, or ``released`` for the N(0, 0.02) of the published runs.
        denominator: ``sum_abs`` for 1+Σ|b_i||x|ⁱ, ``abs_sum`` for 1+|Σ b_i xⁱ|.
        grid: intervals of a spline on [-1, 1] (``kan`` only).
        order: degree of a spline's pieces (``kan`` only).
        frozen: a control: the rationals' coefficients stay as they started (``grkan`` only).
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
    frozen: bool = False

    def __post_init__(self):
        check_choice("ffn.kind", self.kind, ("mlp", "grkan", "kan", "linear"))
        check_choice("ffn.init", self.init, STARTS["sum_abs"])
        check_choice("ffn.weight_init", self.weight_init, ("variance_preserving", "released"))
        check_choice("ffn.denominator", self.denominator, ("sum_abs", "abs_sum"))
        for name, largest in (("groups", 2**14), ("grid", MOST_FUNCTIONS), ("order", MOST_ORDER)):
            check_positive(f"ffn.{name}", getattr(self, name), largest)
        check_bool("ffn.frozen", self.frozen)
        if self.frozen and self.kind != "grkan":
            raise UserError(
                f"ffn.frozen is True, and ffn.kind {self.kind!r} has no rationals. It needs ffn.kind 'grkan'."
            )
        object.__setattr__(self, "degrees", int_tuple("ffn.degrees", self.degrees, MOST_ORDER))
        if len(self.degrees) != 2 or min(self.degrees) < 1:
            raise UserError(f"ffn.degrees is {self.degrees}; it must be two degrees of at least 1, such as (5, 4).")
        if self.init != "identity" and (self.degrees[0] < 5 or self.degrees[1] < 4):
            raise UserError(
                f"ffn.init {self.init!r} needs ffn.degrees of at least (5, 4), got {self.degrees}. Raise them, or set "
                "ffn.init to 'identity', which every degree holds."
            )
        if not isinstance(self.ratio, int | float) or isinstance(self.ratio, bool) or not 0 < self.ratio <= MOST_RATIO:
            raise UserError(f"ffn.ratio is {shown(self.ratio)}; it must be a number above 0, at most {MOST_RATIO}.")
