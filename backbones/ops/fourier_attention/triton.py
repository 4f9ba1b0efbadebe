"""GPU kernels of H = Φ̂(S), S = scale · Q Kᵀ:  H_kr = Σ_q [key q is real] Σ_m a_mrq cos(m S_kq) + b_mrq sin(m S_kq).

The Fourier attention of arXiv 2503.10632 before its product with W and V. Scores and harmonics live in registers only:
one sine and cosine per score, further harmonics by angle addition, every sum over tokens a product on tensor cores with
operands of q's type and float32 accumulators. The backward pass recomputes them, once by queries (dq) and once by keys
(dk, da, db):  dS = Σ_m m (cos_m ⊙ (dH b_m) − sin_m ⊙ (dH a_m)),  da_m = dHᵀ cos_m,  db_m = dHᵀ sin_m.  A program keeps
da and db over all its images and writes one partial sum, which are added in a fixed order: no atomics, equal bits in
every run. Tile sizes follow from the shapes alone.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _cos_sin(x):
    """(cos x, sin x), within 1.5e-7 for |x| up to 1e4, bounded for any finite x, NaN for infinite x.

    x = r + nπ with |r| <= π/2. The first 12 bits of π, whose product with n < 4096 is exact even where nothing is fused
    (the interpreter: 2e-7 there), and the next 24. Minimax polynomials, sine within 4.9e-9, cosine within 4.4e-10.
    """
    shifted = tl.fma(x, 0.31830988618, 12582912.0)  # 1.5 · 2²³: rounds x/π to the integer n, parity in the lowest bit
    n = shifted - 12582912.0
    r = tl.fma(n, -3.1416015625, x)
    r = tl.fma(n, 8.908910206761537e-06, r)
    r = tl.clamp(r, -2.0, 2.0, propagate_nan=tl.PropagateNan.ALL)
    y = r * r
    sin = tl.fma(y, 2.59882268e-06, -0.000198060283)
    sin = tl.fma(y, sin, 0.00833300874)
    sin = tl.fma(y, sin, -0.166666567)
    sin = tl.fma(r * y, sin, r)
    cos = tl.fma(y, -2.62090197e-07, 2.47701792e-05)
    cos = tl.fma(y, cos, -0.00138885854)
    cos = tl.fma(y, cos, 0.0416666567)
    cos = tl.fma(y, cos, -0.5)
    cos = tl.fma(y, cos, 1.0)
    sign = shifted.to(tl.int32, bitcast=True) << 31
    cos = (cos.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    sin = (sin.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return cos, sin


@triton.jit
def _dot(x, y, total=None):
    """total + x y. Three TF32 products are as good as one in float32, which would not run on tensor cores."""
    return tl.dot(x, y, total, input_precision="tf32x3")


@triton.jit
def _next(c, s, cos, sin):
    """The harmonic after (c, s)."""
    return c * cos - s * sin, s * cos + c * sin


@triton.jit
def _scores(x, y, scale, real, MASKED: tl.constexpr):
    """(cos S, sin S) of S = scale · x yᵀ. Masked keys are loaded as zeros: their sine is 0, their cosine is made so."""
    cos, sin = _cos_sin(_dot(x, tl.trans(y)) * scale)
    if MASKED:
        cos = tl.where(real, cos, 0.0)
    return cos, sin


@triton.jit
def _vectors(pointer, stride, token, keep, WIDTH: tl.constexpr, D: tl.constexpr, TYPE: tl.constexpr):
    """(tokens, D): the vectors of the tokens to keep, zeros elsewhere."""
    lane = tl.arange(0, D)[None, :]
    at = pointer + token[:, None].to(tl.int64) * stride + lane
    return tl.load(at, mask=keep[:, None] & (lane < WIDTH), other=0.0).to(TYPE)


@triton.jit
def _store(at, value, mask, ADD: tl.constexpr):
    """Store, or add to what an earlier launch left there."""
    if ADD:
        value += tl.load(at, mask=mask, other=0.0)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _store_vectors(pointer, token, keep, value, WIDTH: tl.constexpr, D: tl.constexpr, ADD: tl.constexpr):
    lane = tl.arange(0, D)[None, :]
    at = pointer + token[:, None].to(tl.int64) * WIDTH + lane
    _store(at, value, keep[:, None] & (lane < WIDTH), ADD)


@triton.jit
def _gradient(pointer, token_stride, rank_stride, token, tokens, ranks, R: tl.constexpr, TYPE: tl.constexpr):
    """(tokens, R): dH of one head, zeros beyond its edges."""
    rank = tl.arange(0, R)[None, :]
    at = pointer + token[:, None].to(tl.int64) * token_stride + rank.to(tl.int64) * rank_stride
    return tl.load(at, mask=(token[:, None] < tokens) & (rank < ranks), other=0.0).to(TYPE)


@triton.jit
def _keep(mask_ptr, image, key, tokens, MASKED: tl.constexpr):
    """Which keys are real."""
    keep = key < tokens
    if MASKED:
        keep = keep & (tl.load(mask_ptr + image * tokens + key, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _functions(pointer, index, key, padded, R: tl.constexpr, TYPE: tl.constexpr):
    """(R, keys): one harmonic's a (even index) or b (odd index), already zero beyond the ranks and the keys."""
    return tl.load(pointer + (index * R + tl.arange(0, R))[:, None] * padded + key[None, :]).to(TYPE)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, functions_ptr, mask_ptr, h_ptr, scale, heads, tokens, padded, harmonics, ranks, all_ranks, tiles,
    q_image, q_head, q_token, k_image, k_head, k_token,
    R: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head, image): one tile of H."""
    place = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = place // heads, place % heads
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    q = _vectors(q_ptr + image * q_image + head * q_head, q_token, row, row < tokens, WIDTH, D, TYPE)
    k_ptr += image * k_image + head * k_head
    functions_ptr += head * (2 * harmonics * R) * padded
    h = tl.zeros((ROWS, R), tl.float32)
    for start in tl.range(0, tokens, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        keep = _keep(mask_ptr, image, key, tokens, MASKED)
        k = _vectors(k_ptr, k_token, key, keep, WIDTH, D, TYPE)
        cos, sin = _scores(q, k, scale, keep[None, :], MASKED)
        c, s = cos, sin
        for m in tl.static_range(FIRST + COUNT):
            if m >= FIRST:
                a = _functions(functions_ptr, 2 * m, key, padded, R, TYPE)
                b = _functions(functions_ptr, 2 * m + 1, key, padded, R, TYPE)
                h = _dot(c.to(TYPE), tl.trans(a), h)
                h = _dot(s.to(TYPE), tl.trans(b), h)
            if m + 1 < FIRST + COUNT:
                c, s = _next(c, s, cos, sin)
    rank = tl.arange(0, R)[None, :]
    at = h_ptr + (place * tokens + row[:, None]) * all_ranks + rank
    _store(at, h, (row[:, None] < tokens) & (rank < ranks), ADD)


@triton.jit
def _query_kernel(
    dh_ptr, q_ptr, k_ptr, functions_ptr, mask_ptr, dq_ptr, scale, heads, tokens, padded, harmonics, ranks, tiles,
    dh_image, dh_head, dh_token, dh_rank, q_image, q_head, q_token, k_image, k_head, k_token,
    R: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program (query tile, head, image): one tile of dq."""
    place = (tl.program_id(0) // tiles).to(tl.int64)
    image, head = place // heads, place % heads
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    q = _vectors(q_ptr + image * q_image + head * q_head, q_token, row, row < tokens, WIDTH, D, TYPE)
    dh = _gradient(dh_ptr + image * dh_image + head * dh_head, dh_token, dh_rank, row, tokens, ranks, R, TYPE)
    k_ptr += image * k_image + head * k_head
    functions_ptr += head * (2 * harmonics * R) * padded
    dq = tl.zeros((ROWS, D), tl.float32)
    for start in tl.range(0, tokens, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        keep = _keep(mask_ptr, image, key, tokens, MASKED)
        k = _vectors(k_ptr, k_token, key, keep, WIDTH, D, TYPE)
        cos, sin = _scores(q, k, scale, keep[None, :], MASKED)
        c, s = cos, sin
        ds = tl.zeros((ROWS, COLUMNS), tl.float32)
        for m in tl.static_range(FIRST + COUNT):
            if m >= FIRST:
                a = _functions(functions_ptr, 2 * m, key, padded, R, TYPE)
                b = _functions(functions_ptr, 2 * m + 1, key, padded, R, TYPE)
                ds += (m + 1.0) * (c * _dot(dh, b))
                ds -= (m + 1.0) * (s * _dot(dh, a))
            if m + 1 < FIRST + COUNT:
                c, s = _next(c, s, cos, sin)
        dq = _dot(ds.to(TYPE), k, dq)
    _store_vectors(dq_ptr + place * tokens * WIDTH, row, row < tokens, dq * scale, WIDTH, D, ADD)


@triton.jit
def _key_kernel(
    dh_ptr, q_ptr, k_ptr, functions_ptr, mask_ptr, dk_ptr, sums_ptr, scale, images, images_each, heads, tokens, padded,
    harmonics, ranks, all_ranks, tiles,
    dh_image, dh_head, dh_token, dh_rank, q_image, q_head, q_token, k_image, k_head, k_token,
    R: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program (key tile, head, split): a tile of dk for each of its images, partial sums of da and db over them.
    Scores are transposed, (keys, queries)."""
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    split = (tl.program_id(0) // tiles // heads).to(tl.int64)
    key = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    functions_ptr += head * (2 * harmonics * R) * padded
    sums = ()
    for _ in tl.static_range(2 * COUNT):
        sums = sums + (tl.zeros((ROWS, R), tl.float32),)
    end = tl.minimum((split + 1) * images_each, images)
    # Left to itself, the compiler computes every step's addresses before this loop and keeps them in registers.
    for image in tl.range(split * images_each, end, num_stages=1, disable_licm=True):
        keep = _keep(mask_ptr, image, key, tokens, MASKED)
        k = _vectors(k_ptr + image * k_image + head * k_head, k_token, key, keep, WIDTH, D, TYPE)
        q_at = q_ptr + image * q_image + head * q_head
        dh_at = dh_ptr + image * dh_image + head * dh_head
        dk = tl.zeros((ROWS, D), tl.float32)
        for start in tl.range(0, tokens, COLUMNS):
            row = start + tl.arange(0, COLUMNS)
            q = _vectors(q_at, q_token, row, row < tokens, WIDTH, D, TYPE)
            dh = _gradient(dh_at, dh_token, dh_rank, row, tokens, ranks, R, TYPE)
            cos, sin = _scores(k, q, scale, keep[:, None], MASKED)
            c, s = cos, sin
            ds = tl.zeros((ROWS, COLUMNS), tl.float32)
            new = ()
            for m in tl.static_range(FIRST + COUNT):
                if m >= FIRST:
                    new = new + (_dot(c.to(TYPE), dh, sums[2 * (m - FIRST)]),)
                    new = new + (_dot(s.to(TYPE), dh, sums[2 * (m - FIRST) + 1]),)
                    a = _functions(functions_ptr, 2 * m, key, padded, R, TYPE)
                    b = _functions(functions_ptr, 2 * m + 1, key, padded, R, TYPE)
                    ds += (m + 1.0) * (c * _dot(tl.trans(b), tl.trans(dh)))
                    ds -= (m + 1.0) * (s * _dot(tl.trans(a), tl.trans(dh)))
                if m + 1 < FIRST + COUNT:
                    c, s = _next(c, s, cos, sin)
            sums = new
            dk = _dot(ds.to(TYPE), q, dk)
        at = dk_ptr + (image * heads + head) * tokens * WIDTH
        _store_vectors(at, key, key < tokens, dk * scale, WIDTH, D, ADD)
    rank = tl.arange(0, R)[None, :]
    for i in tl.static_range(2 * COUNT):
        place = ((split * 2 + i % 2) * heads + head) * harmonics + FIRST + i // 2
        at = sums_ptr + (place * all_ranks + rank) * tokens + key[:, None]
        tl.store(at, sums[i], mask=(key[:, None] < tokens) & (rank < ranks))


def forward(q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """H (B, h, N, r) in q's type, for q, k (B, h, N, d), a, b (h, G, r, N) and key_mask (B, N) or None."""
    if not q.numel():
        return q.new_zeros(*q.shape[:3], a.shape[2])
    plan = _Plan(q, k, a, b, key_mask)
    held = max(1, _FUNCTIONS // plan.ranks)
    h = q.new_empty(*q.shape[:3], a.shape[2], dtype=q.dtype if plan.harmonics <= held else torch.float32)
    with plan.device:
        for first, count, functions, harmonics in plan.launches(held):
            _forward_kernel[(plan.tiles * plan.heads * plan.images,)](
                plan.q, plan.k, functions, plan.mask, h[..., first:], scale, plan.heads, plan.tokens, plan.padded,
                plan.harmonics, count, h.shape[3], plan.tiles, *plan.strides, **plan.constants, **harmonics,
                COLUMNS=plan.columns, ADD=harmonics["FIRST"] > 0,
            )  # fmt: skip
    return h.to(q.dtype)


def backward(
    dh: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, da, db) of ``forward``."""
    if not q.numel():
        return tuple(t.new_zeros(t.shape) for t in (q, k, a, b))
    plan = _Plan(q, k, a, b, key_mask)
    images_each, splits = plan.splits()
    strides = (*dh.stride(), *plan.strides)

    held = max(1, _FUNCTIONS // plan.ranks)
    launches = list(plan.launches(held))
    dq = q.new_empty(q.shape, dtype=q.dtype if len(launches) == 1 else torch.float32)
    with plan.device:
        for i, (first, count, functions, harmonics) in enumerate(launches):
            _query_kernel[(plan.tiles * plan.heads * plan.images,)](
                dh[..., first:], plan.q, plan.k, functions, plan.mask, dq, scale, plan.heads, plan.tokens, plan.padded,
                plan.harmonics, count, plan.tiles, *strides, **plan.constants, **harmonics, COLUMNS=plan.inner,
                ADD=i > 0,
            )  # fmt: skip

    held = max(1, plan.sums // plan.ranks)
    launches = list(plan.launches(held))
    dk = k.new_empty(k.shape, dtype=k.dtype if len(launches) == 1 else torch.float32)
    sums = q.new_empty(splits, 2, *a.shape, dtype=torch.float32)
    with plan.device:
        for i, (first, count, functions, harmonics) in enumerate(launches):
            _key_kernel[(plan.tiles * plan.heads * splits,)](
                dh[..., first:], plan.q, plan.k, functions, plan.mask, dk, sums[..., first:, :], scale, plan.images,
                images_each, plan.heads, plan.tokens, plan.padded, plan.harmonics, count, a.shape[2], plan.tiles,
                *strides, **plan.constants, **harmonics, COLUMNS=plan.inner, ADD=i > 0,
            )  # fmt: skip
    return dq.to(q.dtype), dk.to(k.dtype), sums[:, 0].sum(0).to(a.dtype), sums[:, 1].sum(0).to(b.dtype)


_ROWS = 64  # of a tile, sixteen a warp: the smallest whose scores become the next product's operand where they are
_RANKS = 64  # functions a launch
_FUNCTIONS = 96  # ranks times harmonics a launch, for the sake of shared memory
_PROGRAMS = 2048  # of the key kernel: several rounds of a large GPU, while the partial sums stay small


class _Plan:
    """Operands as the kernels read them, tile sizes, launches."""

    def __init__(self, q: Tensor, k: Tensor, a: Tensor, b: Tensor, key_mask: Tensor | None):
        self.images, self.heads, self.tokens, width = q.shape
        self.q, self.k = (t if t.stride(3) == 1 or width == 1 else t.contiguous() for t in (q, k))
        self.strides = (*self.q.stride()[:3], *self.k.stride()[:3])
        self.mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        self.tiles, self.padded = triton.cdiv(self.tokens, _ROWS), triton.cdiv(self.tokens, 64) * 64
        self.harmonics = a.shape[1]
        self.chunks, self.ranks = self._chunks(a, b)
        lanes = max(16, triton.next_power_of_2(width))
        # Columns of a step, and ranks times harmonics of the key kernel: what fits into registers, of which the three
        # products of float32 take twice as many. A narrow step of the forward wastes less on the last one.
        half = q.element_size() == 2
        self.columns = 64 if half and -self.tokens % 64 < 32 else 32
        self.inner = 32 if half else 16
        self.sums = (80 if half else 48) - lanes // 2
        self.constants = {
            "R": self.ranks,
            "WIDTH": width,
            "D": lanes,
            "MASKED": key_mask is not None,
            "TYPE": _operand(q),
            "ROWS": _ROWS,
            "num_warps": _ROWS // 16,
            "num_stages": 2,
        }
        self.device = torch.cuda.device(q.device) if q.is_cuda else nullcontext()

    def _chunks(self, a: Tensor, b: Tensor) -> tuple[list[tuple[int, int, Tensor]], int]:
        """([(first rank, ranks, functions (h, G, 2, padded ranks, padded keys))...], padded ranks); padding holds 0."""
        heads, harmonics, total, tokens = a.shape
        each = triton.cdiv(total, triton.cdiv(total, _RANKS))
        ranks = max(16, triton.next_power_of_2(each))
        chunks = []
        for first in range(0, total, each):
            count = min(each, total - first)
            functions = self.q.new_zeros(heads, harmonics, 2, ranks, self.padded)
            for side, coefficients in enumerate((a, b)):
                functions[:, :, side, :count, :tokens] = coefficients[:, :, first : first + count]
            chunks.append((first, count, functions))
        return chunks, ranks

    def launches(self, held: int):
        """(first rank, ranks, their functions, harmonics) of each launch, with ``held`` harmonics at most."""
        for chunk in self.chunks:
            for first in range(0, self.harmonics, held):
                yield *chunk, {"FIRST": first, "COUNT": min(held, self.harmonics - first)}

    def splits(self) -> tuple[int, int]:
        """(images a program, programs to share them out to) for the sums over the batch."""
        wanted = min(self.images, triton.cdiv(_PROGRAMS, self.tiles * self.heads))
        each = triton.cdiv(self.images, wanted)
        return each, triton.cdiv(self.images, each)


def _operand(q: Tensor) -> tl.dtype:
    """Type of the products' operands: q's. (The interpreter would multiply the bits of bfloat16 as integers.)"""
    if q.dtype == torch.bfloat16 and q.is_cuda:
        return tl.bfloat16
    return tl.float16 if q.dtype == torch.float16 else tl.float32
