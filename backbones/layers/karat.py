"""Kolmogorov-Arnold attention (KArAt, arXiv 2503.10632): softmax replaced by learnable functions of the scores."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.rows import by_rows
from ..utils.errors import UserError, check_choice
from .bases import BASE_FUNCTIONS, BASES
from .diagonal import DIAGONALS, Diagonal
from .functions import Functions, Resample
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
FULL_TOKENS = 1024  # at most in the order "full": its functions and weights grow with N², 24 MiB per head at G = 3


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
        diagonal: functions ψ beside Φ̂, see ``diagonal.Diagonal``: ``none``, ``shared`` or ``positionwise``.

    Raises:
        ValueError: for an unknown name, a diagonal with the projection ``after``, and a rank above the number of
            tokens.
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
        diagonal: str = "none",
    ):
        super().__init__()
        check_choice("basis", basis, BASES)
        check_choice("order", order, ORDERS)
        check_choice("base", base, BASE_FUNCTIONS)
        check_choice("init", init, INITS)
        check_choice(f"projection for order {order!r}", projection, PROJECTIONS[order])
        check_choice("diagonal", diagonal, DIAGONALS)
        if diagonal != "none" and projection == "after":
            raise UserError(f"diagonal is {diagonal!r}; with the projection 'after' it must be 'none'.")
        n = grid[0] * grid[1] + prefix
        if order == "full":
            check_full(n)
        elif rank > n:
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
                bound = 1 / math.sqrt(shape[2])
                self.w_std = bound / math.sqrt(3)
                nn.init.uniform_(self.w, -bound, bound)
            else:
                self.w_std = 1 / math.sqrt(n * rank if order == "w_phi" else n)
                nn.init.normal_(self.w, std=self.w_std)
        self.psi = None if diagonal == "none" else Diagonal(made, num_heads, n, diagonal == "positionwise")

    def token_axis(self, name: str) -> tuple[tuple[int, ...], bool]:
        """(token axes, whether their sum is kept) of the parameter ``name`` of the state dict."""
        module, _, leaf = name.rpartition(".")
        if module:
            return self.get_submodule(module).token_axis(leaf)
        return (-2,) if self.order == "w_phi" else (-1,), True

    def sensitivities(self) -> dict[str, float]:
        """How far a step can move the output, by name of the tensor that is moved.

        All numbers of a tensor move by 1, which is Adam's step at a learning rate of 1, with the signs that agree best:
        the result is the change of the output over its size at the start, for scores from N(0, 1) and values whose mean
        is as large as their spread. With σ the size of φ, σ' that of its slope and g the sum of |∂φ/∂θ|
        (``Functions.sizes``), N tokens and rank r: √(rN) g/σ for tensors of Φ̂ in the orders ``w_phi`` and ``phi_w``
        and of Φ̂₂, √(rN)/σ_W for W of ``w_phi``, √r N σ'/σ for W of ``phi_w``, √r N g σ'₂/σ₂ for Φ̂₁, N g/σ in
        ``full`` and N g for ψ. With the start ``variance_preserving`` that is about G √r N for a and b of ``w_phi``,
        and r N for its W.
        """
        n, rank = self.grid[0] * self.grid[1] + self.prefix, self.rank
        phi = self.phi.sizes()
        if self.order == "full":
            factor = n / phi.value
        elif self.order == "phi_phi":
            phi2 = self.phi2.sizes()
            factor = math.sqrt(rank) * n * phi2.slope / phi2.value
        else:
            factor = math.sqrt(rank * n) / phi.value
        result = {f"phi.{name}": factor * gain for name, gain in phi.gains.items()}
        if self.order == "phi_phi":
            result |= {f"phi2.{name}": math.sqrt(rank * n) * gain / phi2.value for name, gain in phi2.gains.items()}
        elif self.order == "w_phi":
            result["w"] = math.sqrt(rank * n) / self.w_std
        elif self.order == "phi_w":
            result["w"] = math.sqrt(rank) * n * phi.slope / phi.value
        if self.psi is not None:
            result |= {f"psi.{name}": self.psi.count * gain for name, gain in self.psi.sizes().gains.items()}
        return result

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

        if self.order == "full":
            check_full(q.shape[2])

        def resample(t: Tensor, axis: int, keep_sum: bool) -> Tensor:
            if (grid, prefix) == (self.grid, self.prefix):
                return t
            moved = resample_tokens(t.transpose(axis, -1), self.grid, grid, self.prefix, prefix, keep_sum)
            return moved.transpose(axis, -1)

        # Scores and functions in float32, whatever autocast says; products with values in the values' type.
        with torch.autocast(q.device.type, enabled=False):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            if key_mask is not None:
                k, v = (torch.where(key_mask[:, None, :, None], t, 0) for t in (k, v))
            mixed = self._mix(q, k, v, resample, key_mask, scale)
            return mixed if self.psi is None else mixed + self.psi(q, k, v, resample, scale)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, resample: Resample, key_mask: Tensor | None, scale: float
    ) -> Tensor:
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


def check_full(tokens: int, where: str = "") -> None:
    """Raises UserError when the order ``full`` would hold more than FULL_TOKENS² functions per head."""
    if tokens > FULL_TOKENS:
        raise UserError(
            f"order 'full' has N×N functions per head, and {where or 'an operator'} has {tokens} tokens; at most "
            f"{FULL_TOKENS} fit into memory. Use a smaller image or window, or attention.order 'w_phi' or 'phi_w'."
        )
