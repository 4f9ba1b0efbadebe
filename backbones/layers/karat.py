"""Kolmogorov-Arnold attention (KArAt, arXiv 2503.10632): softmax replaced by learnable functions of the scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.errors import UserError, check_choice
from ..utils.rows import by_rows
from .attention import Attention
from .bases import BASE_FUNCTIONS, BASES, Base, Basis, Parameters
from .resample import Grid, resample_tokens
from .simplex import project_simplex

# What may follow Φ̂: "before" projects the r numbers that W takes, "after" the row of N attention weights.
PROJECTIONS = {
    "w_phi": ("none", "before", "after"),
    "phi_w": ("none", "after"),
    "phi_phi": ("none", "after"),
    "full": ("none", "after"),
}
ORDERS = tuple(PROJECTIONS)
INITS = ("variance_preserving", "paper")
Resample = Callable[[Tensor, int, bool], Tensor]  # (tensor, token axis, keep the sum) to the tensor for other tokens


class Functions(nn.Module):
    """A matrix of (outputs × inputs) learnable functions per head, φ = scale_base · β + scale_basis · Σ of the basis.

    Args:
        basis: what the functions are made of.
        shape: (heads, outputs, inputs).
        token_axes: which of the two last axes are tokens, among −2 (outputs) and −1 (inputs).
        std: of φ(x) for x ~ N(0, 1) at the start; None = the paper's literal start.
        base: name of the base function β.
        scales: make scale_base and scale_basis learnable, per function; else they are constants.
    """

    def __init__(
        self,
        basis: Basis,
        shape: tuple[int, int, int],
        token_axes: tuple[int, ...],
        std: float | None,
        base: str = "zero",
        scales: bool = False,
    ):
        super().__init__()
        self.basis, self.token_axes, self.shape = basis, token_axes, shape
        self.base = None if base == "zero" else Base(base)
        self.base_factor = 1.0 if std is None else std
        for name, value in basis.start(shape, std).items():
            self.register_parameter(name, nn.Parameter(value))
        self.scales = scales
        if scales:
            self.scale_base = nn.Parameter(torch.ones(shape))
            self.scale_basis = nn.Parameter(torch.ones(shape))

    def token_axis(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(axes of a parameter that are tokens, whether their sum is kept when they are resampled)."""
        return self.token_axes, self.basis.names.get(name, False)

    def coefficients(self, resample: Resample) -> tuple[Parameters, Parameters | None]:
        """The basis's tensors with scale and window folded in, and the base function's, at other tokens."""
        own, window = {}, self.basis.window(self.shape[2])
        for name, keep_sum in self.basis.names.items():
            value = getattr(self, name)
            if keep_sum and self.scales:
                scale = self.scale_basis if value.dim() == 3 else self.scale_basis[:, None]
                if self.base is None:  # its scale enters with weight 0, so that it has a gradient (zero) to reduce
                    scale = scale + 0.0 * (self.scale_base if value.dim() == 3 else self.scale_base[:, None])
                value = value * scale
            if keep_sum and window is not None:
                value = value * window.to(value)
            own[name] = self._resampled(value, resample, keep_sum)
        if self.base is None:
            return own, None
        like = next(self.parameters())
        base = self.scale_base if self.scales else like.new_ones(self.shape)
        return own, {"c": self._resampled(base * self.base_factor, resample, True)[:, None]}

    @torch.no_grad()
    def curve(self, x: Tensor, head: int, output: int, input: int) -> Tensor:
        """φ_pq(x) of one function at its native tokens, x (M,) to (M,)."""
        total = torch.zeros_like(x)
        for basis, c in zip((self.basis, self.base), self.coefficients(lambda t, *_: t), strict=True):
            if c is not None:
                one = {name: t[head : head + 1, ..., output, input, None, None] for name, t in c.items()}
                total += basis.evaluate(x.view(1, 1, -1, 1, 1), one).flatten()
        return total

    def _resampled(self, value: Tensor, resample: Resample, keep_sum: bool) -> Tensor:
        for axis in self.token_axes:
            value = resample(value, axis, keep_sum)
        return value

    def phi(self, q: Tensor, k: Tensor, resample: Resample, key_mask: Tensor | None, scale: float) -> Tensor:
        """H (B, h, N, outputs): H_kp = Σ_q φ_pq(S_kq), S = scale · Q Kᵀ; inputs are the keys."""
        own, base = self.coefficients(resample)
        h = self.basis.phi(q, k, own, key_mask, scale)
        return h if base is None else h + self.base.phi(q, k, base, key_mask, scale)

    def mix(self, z: Tensor, v: Tensor, resample: Resample, key_mask: Tensor | None) -> Tensor:
        """O (B, h, N, d): O_k = Σ_p v_p Σ_r φ_pr(z_kr); outputs are the keys."""
        own, base = self.coefficients(resample)
        out = self.basis.mix(z, v, own, key_mask)
        return out if base is None else out + self.base.mix(z, v, base, key_mask)

    def weights(self, resample: Resample) -> tuple[Callable[[Tensor], Tensor], int]:
        """The function z (B, h, m, r) to Σ_r φ_pr(z_kr) (B, h, m, outputs), and the numbers it makes per query."""
        own, base = self.coefficients(resample)
        size = self.basis.row_size(*self.shape[1:])

        def function(z: Tensor) -> Tensor:
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            total = self.basis.total(z, own)
            return total if base is None else total + self.base.total(z, base)

        return function, size


class KArAtOperator(nn.Module):
    """h operators on rows of scores, over a grid of tokens, and their product with the values.

    Orders, per row of scores S_k: ``w_phi`` W Φ̂(S_k), Φ̂ of r×N functions and W of N×r; ``phi_w`` Φ̂(W S_k), Φ̂ of N×r
    functions and W of r×N, linear in N with a Fourier or B-spline basis; ``phi_phi`` Φ̂₂(Φ̂₁(S_k)); ``full`` Φ(S_k) of
    N×N functions, which holds its N×N weights.

    Args:
        num_heads: h.
        grid: native (rows, columns) of tokens; any other is resampled.
        prefix: number of class tokens, which keep rows and columns of their own.
        basis: name of a basis in ``bases.BASES``.
        harmonics: G, of the bases that have it.
        rank: r; unused by ``full``.
        order, base, scales, projection: see AttentionConfig.
        drop_rate: dropout on the r numbers per query (``full``: on the weights).
        spline_order: degree of B-splines.
        init: ``variance_preserving`` starts functions and W so that the output keeps the values' variance; ``paper``
            draws literal N(0, 1) coefficients and leaves W at PyTorch's linear start.
        compiled: see AttentionConfig.

    Raises:
        ValueError: for an unknown name, and for a rank above the number of tokens.
    """

    def __init__(
        self,
        num_heads: int,
        grid: Grid,
        prefix: int,
        basis: str = "fourier",
        harmonics: int = 3,
        rank: int = 12,
        order: str = "w_phi",
        base: str = "zero",
        scales: bool = False,
        projection: str = "none",
        drop_rate: float = 0.0,
        spline_order: int = 3,
        init: str = "variance_preserving",
        compiled: bool = False,
    ):
        super().__init__()
        check_choice("basis", basis, BASES)
        check_choice("order", order, ORDERS)
        check_choice("base", base, BASE_FUNCTIONS)
        check_choice("init", init, INITS)
        check_choice(f"projection for order {order!r}", projection, PROJECTIONS[order])
        n = grid[0] * grid[1] + prefix
        if order != "full" and rank > n:
            raise UserError(f"rank is {rank}; it must be at most {n}, the number of tokens.")
        self.grid, self.prefix, self.order, self.projection, self.drop_rate = grid, prefix, order, projection, drop_rate
        self.rank, self.harmonics = rank, harmonics
        made, literal = BASES[basis](harmonics, spline_order, compiled), init == "paper"

        def functions(outputs: int, inputs: int, axes: tuple[int, ...]) -> Functions:
            std = 1 / math.sqrt(inputs * (n if -2 in axes else 1))
            return Functions(made, (num_heads, outputs, inputs), axes, None if literal else std, base, scales)

        if order == "full":
            self.phi = functions(n, n, (-2, -1))
        else:
            self.phi = functions(n, rank, (-2,)) if order == "phi_w" else functions(rank, n, (-1,))
        if order == "phi_phi":
            self.phi2 = functions(n, rank, (-2,))
        if order in ("w_phi", "phi_w"):
            shape = (num_heads, n, rank) if order == "w_phi" else (num_heads, rank, n)
            self.w = nn.Parameter(torch.empty(shape))
            if literal:
                nn.init.uniform_(self.w, -1 / math.sqrt(shape[2]), 1 / math.sqrt(shape[2]))
            else:
                nn.init.normal_(self.w, std=1 / math.sqrt(n * rank if order == "w_phi" else n))

    def token_axis(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(token axes, whether their sum is kept) of the parameter ``name`` of the state dict."""
        module, _, leaf = name.rpartition(".")
        if module:
            return self.get_submodule(module).token_axis(leaf)
        return (-2,) if self.order == "w_phi" else (-1,), True

    def macs(self, tokens: int) -> int:
        """(3G+1)·N²·r·h, the multiply-accumulates of the materialising form of arXiv 2503.10632 for one image."""
        return (3 * self.harmonics + 1) * tokens**2 * self.rank * self.phi.shape[0]

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
        """Mixes the values of N = ``prefix`` + rows·columns tokens of ``grid``.

        Args:
            q, k: (B, h, N, d).
            v: (B, h, N, d').
            key_mask: (B, N) bool, True = real token. It acts after Φ: a masked key adds nothing and gets no weight.
            scale: factor of the scores; None = 1/√d.

        Returns:
            (B, h, N, d').

        Raises:
            ValueError: when N is another number.
        """
        if q.shape[2] != grid[0] * grid[1] + prefix:
            raise UserError(
                f"{q.shape[2]} tokens are not {prefix} class tokens and a grid of {grid[0]}x{grid[1]}; "
                "give the grid that the tokens come from."
            )

        def resample(t: Tensor, axis: int, keep_sum: bool) -> Tensor:
            if (grid, prefix) == (self.grid, self.prefix):
                return t
            moved = resample_tokens(t.transpose(axis, -1), self.grid, grid, self.prefix, prefix, keep_sum)
            return moved.transpose(axis, -1)

        # Scores and functions in float32, whatever autocast says; products with values in the values' type.
        with torch.autocast(q.device.type, enabled=False):
            return self._mix(q, k, v, resample, key_mask, q.shape[-1] ** -0.5 if scale is None else scale)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, resample: Resample, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        if key_mask is not None:
            k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))
        if self.order == "full":
            return self._project(self._drop(self.phi.phi(q, k, resample, key_mask, scale)), key_mask, v.dtype) @ v
        if self.order == "phi_w":
            w = (resample(self.w, -1, True) * scale).to(q.dtype)
            z = self._drop(q @ (w @ k).transpose(-2, -1))
            return self._functions_of(z, v, self.phi, resample, key_mask)
        h = self.phi.phi(q, k, resample, key_mask, scale)
        if self.order == "phi_phi":
            return self._functions_of(self._drop(h), v, self.phi2, resample, key_mask)
        w = resample(self.w, -2, True).to(v.dtype)
        h = self._drop(project_simplex(h) if self.projection == "before" else h)
        if self.projection != "after":
            return h @ (w.transpose(-2, -1) @ v)
        return by_rows(lambda part: self._project(part @ w.transpose(-2, -1), key_mask, v.dtype) @ v, h, 4 * v.shape[2])

    def _functions_of(
        self, z: Tensor, v: Tensor, functions: Functions, resample: Resample, key_mask: Tensor | None
    ) -> Tensor:
        if self.projection != "after":
            return functions.mix(z, v, resample, key_mask)
        weights, size = functions.weights(resample)
        return by_rows(lambda part: self._project(weights(part), key_mask, v.dtype) @ v, z, size + 4 * v.shape[2])

    def _drop(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.drop_rate, self.training)

    def _project(self, weights: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.projection == "after":
            weights = project_simplex(weights, None if key_mask is None else key_mask[:, None, None])
        return weights.to(dtype)


class OperatorAttention(Attention):
    """Attention whose scores pass an operator of its own, or one shared by all blocks, instead of the softmax.

    Args:
        operator: a KArAtOperator or PointwiseOperator; None when ``forward`` is given a shared one.
        heads: indices of the heads that the operator serves, the others use softmax; None = all.
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
    ):
        super().__init__(dim, num_heads, qkv_bias, drop_rate, attn_drop_rate)
        self.operator = operator
        self.heads = heads
        if heads is not None:
            self.others = tuple(i for i in range(num_heads) if i not in heads)
            order = torch.tensor([*heads, *self.others])
            self.register_buffer("head_order", order.argsort(), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, prefix: int, key_mask: Tensor | None, shared) -> Tensor:
        operator = shared if self.operator is None else self.operator
        if self.heads is None:
            return operator(q, k, v, grid, prefix, key_mask)
        mixed = operator(*(t[:, list(self.heads)] for t in (q, k, v)), grid, prefix, key_mask)
        softmax = super().mix(*(t[:, list(self.others)] for t in (q, k, v)), grid, prefix, key_mask, shared)
        return torch.cat([mixed, softmax.to(mixed.dtype)], 1)[:, self.head_order]
