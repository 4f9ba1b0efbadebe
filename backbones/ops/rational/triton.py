"""GPU kernels of the group-rational activation, alone, with a bias before it, and with a LayerNorm before it.

Formulas as in ``eager.py`` (arXiv 2409.10594). A tile is (rows, chunks, lanes): a chunk is up to 16 bytes of adjacent
channels of one group and belongs to one thread, so that a thread reads its coefficients once, sums coefficient
gradients over its lanes and over all its rows in registers, and lanes are wasted for no width that is a multiple of
eight. Programs loop over rows (persistent grid) and write one partial sum each; a second kernel adds these in a fixed
order: no atomics, equal bits in every run. Tile sizes follow from width and type alone.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _coefficients(
    pointer, chunk, chunks_per_group, mask, COUNT: tl.constexpr, SHARED: tl.constexpr, ABSOLUTE: tl.constexpr
):
    """COUNT coefficients as a tuple: scalars when all groups share them, else (1, T, 1) by chunk."""
    values = ()
    for i in tl.static_range(COUNT):
        if SHARED:
            value = tl.load(pointer + i).to(tl.float32)
        else:
            at = pointer + (chunk // chunks_per_group) * COUNT + i
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)[None, :, None]
        values = values + (tl.abs(value) if ABSOLUTE else value,)
    return values


@triton.jit
def _polynomial(x, c, COUNT: tl.constexpr):
    """c_0 + c_1 x + … by Horner's rule."""
    p = tl.zeros_like(x) + c[COUNT - 1]
    for i in tl.static_range(COUNT - 2, -1, -1):
        p = p * x + c[i]
    return p


@triton.jit
def _derivative(x, c, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Derivative of Σ c_i x^(i + 1 − FIRST): FIRST 1 for P = Σ c_i xⁱ, 0 for Σ c_j xʲ with c_1 first."""
    p = tl.zeros_like(x)
    for i in tl.static_range(COUNT - 1, FIRST - 1, -1):
        p = p * x + c[i] * (i + 1.0 - FIRST)
    return p


@triton.jit
def _evaluate(x, a, b, M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr):
    base = x if SIGNED else tl.abs(x)
    inner = _polynomial(base, b, N) * base
    return _polynomial(x, a, M + 1) / (1.0 + tl.abs(inner))


@triton.jit
def _differentiate(x, grad, a, b, sums, M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr):
    """(dx, sums + this tile's coefficient gradients); those of b lack sgn(b), which the second stage applies."""
    base = x if SIGNED else tl.abs(x)
    inner = _polynomial(base, b, N) * base
    reciprocal = 1.0 / (1.0 + tl.abs(inner))
    term = grad * reciprocal
    scaled = term * (_polynomial(x, a, M + 1) * reciprocal)
    negative = (inner if SIGNED else x) < 0
    slope = _derivative(base, b, 0, N)
    slope = tl.where(negative, -slope, slope)
    dx = term * _derivative(x, a, 1, M + 1) - scaled * slope
    new = (sums[0] + tl.sum(term, 2),)
    for i in tl.static_range(1, M + 1):
        term = term * x
        new = new + (sums[i] + tl.sum(term, 2),)
    if SIGNED:
        scaled = tl.where(negative, -scaled, scaled)
    for j in tl.static_range(N):
        scaled = scaled * base
        new = new + (sums[M + 1 + j] - tl.sum(scaled, 2),)
    return dx, new


@triton.jit
def _zeros(COUNT: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((R, T), tl.float32),)
    return values


@triton.jit
def _store_sums(pointer, sums, chunk, chunks, program, COUNT: tl.constexpr):
    """Partial sums (program, coefficient, chunk): the first sum across lanes."""
    for k in tl.static_range(COUNT):
        at = pointer + (program.to(tl.int64) * COUNT + k) * chunks + chunk
        tl.store(at, tl.sum(sums[k], 0), mask=chunk < chunks)


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, a_ptr, b_ptr, out_ptr, rows, stride, chunks, chunks_per_group,
    M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    BIAS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1) * T + tl.arange(0, T)
    inside = chunk < chunks
    a = _coefficients(a_ptr, chunk, chunks_per_group, inside, M + 1, SHARED_A, False)
    b = _coefficients(b_ptr, chunk, chunks_per_group, inside, N, SHARED_B, not SIGNED)
    channel = chunk[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
    for start in tl.range(tl.program_id(0) * R, rows, tl.num_programs(0) * R, num_stages=STAGES):
        row = (start + tl.arange(0, R))[:, None, None].to(tl.int64)
        mask = (row < rows) & inside[None, :, None]
        x = tl.load(x_ptr + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            x = x + bias
        y = _evaluate(x, a, b, M, N, SIGNED)
        tl.store(out_ptr + row * (chunks * VEC) + channel, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, a_ptr, b_ptr, dx_ptr, sums_ptr, dbias_ptr, rows, grad_stride, stride, chunks,
    chunks_per_group,
    M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    BIAS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1) * T + tl.arange(0, T)
    inside = chunk < chunks
    a = _coefficients(a_ptr, chunk, chunks_per_group, inside, M + 1, SHARED_A, False)
    b = _coefficients(b_ptr, chunk, chunks_per_group, inside, N, SHARED_B, not SIGNED)
    channel = chunk[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    sums = _zeros(M + 1 + N, R, T)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
        dbias = tl.zeros((R, T, VEC), tl.float32)
    for start in tl.range(tl.program_id(0) * R, rows, tl.num_programs(0) * R, num_stages=STAGES):
        row = (start + tl.arange(0, R))[:, None, None].to(tl.int64)
        mask = (row < rows) & inside[None, :, None]
        x = tl.load(x_ptr + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + channel, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            x = x + bias
        dx, sums = _differentiate(x, grad, a, b, sums, M, N, SIGNED)
        tl.store(dx_ptr + row * (chunks * VEC) + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if BIAS:
            dbias += dx
    _store_sums(sums_ptr, sums, chunk, chunks, tl.program_id(0), M + 1 + N)
    if BIAS:
        column = chunk[:, None] * VEC + tl.arange(0, VEC)[None, :]
        at = dbias_ptr + tl.program_id(0).to(tl.int64) * (chunks * VEC) + column
        tl.store(at, tl.sum(dbias, 0), mask=inside[:, None])


@triton.jit
def _normalized(x, mask, eps, WIDTH: tl.constexpr):
    """((x − mean)/σ, mean, 1/σ) over axes 1 and 2; the last two are (R,)."""
    mean = tl.sum(tl.sum(x, 2), 1) / WIDTH
    centred = tl.where(mask, x - mean[:, None, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 2), 1) / WIDTH + eps)
    return centred * rstd[:, None, None], mean, rstd


@triton.jit
def _norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, a_ptr, b_ptr, out_ptr, mean_ptr, rstd_ptr, rows, stride, chunks_per_group, eps,
    M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.arange(0, T)
    inside = chunk < CHUNKS
    a = _coefficients(a_ptr, chunk, chunks_per_group, inside, M + 1, SHARED_A, False)
    b = _coefficients(b_ptr, chunk, chunks_per_group, inside, N, SHARED_B, not SIGNED)
    channel = chunk[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    weight = tl.load(weight_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
    for start in tl.range(tl.program_id(0) * R, rows, tl.num_programs(0) * R, num_stages=STAGES):
        flat = start + tl.arange(0, R)
        row = flat[:, None, None].to(tl.int64)
        mask = (row < rows) & inside[None, :, None]
        x = tl.load(x_ptr + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
        normal, mean, rstd = _normalized(x, mask, eps, CHUNKS * VEC)
        y = _evaluate(normal * weight + bias, a, b, M, N, SIGNED)
        tl.store(out_ptr + row * (CHUNKS * VEC) + channel, y.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + flat, mean, mask=flat < rows)
        tl.store(rstd_ptr + flat, rstd, mask=flat < rows)


@triton.jit
def _norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, dx_ptr, sums_ptr, dweight_ptr, dbias_ptr,
    rows, grad_stride, stride, chunks_per_group,
    M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, VEC: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk = tl.arange(0, T)
    inside = chunk < CHUNKS
    a = _coefficients(a_ptr, chunk, chunks_per_group, inside, M + 1, SHARED_A, False)
    b = _coefficients(b_ptr, chunk, chunks_per_group, inside, N, SHARED_B, not SIGNED)
    channel = chunk[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    weight = tl.load(weight_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=inside[None, :, None], other=0.0).to(tl.float32)
    sums = _zeros(M + 1 + N, R, T)
    dweight = tl.zeros((R, T, VEC), tl.float32)
    dbias = tl.zeros((R, T, VEC), tl.float32)
    for start in tl.range(tl.program_id(0) * R, rows, tl.num_programs(0) * R, num_stages=STAGES):
        flat = start + tl.arange(0, R)
        row = flat[:, None, None].to(tl.int64)
        mask = (row < rows) & inside[None, :, None]
        x = tl.load(x_ptr + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + channel, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + flat, mask=flat < rows, other=0.0)[:, None, None]
        rstd = tl.load(rstd_ptr + flat, mask=flat < rows, other=0.0)[:, None, None]
        normal = tl.where(mask, (x - mean) * rstd, 0.0)
        dy, sums = _differentiate(normal * weight + bias, grad, a, b, sums, M, N, SIGNED)
        dweight += dy * normal
        dbias += dy
        dy = dy * weight
        shift = (tl.sum(tl.sum(dy, 2), 1) / (CHUNKS * VEC))[:, None, None]
        tilt = (tl.sum(tl.sum(dy * normal, 2), 1) / (CHUNKS * VEC))[:, None, None]
        dx = rstd * (dy - shift - normal * tilt)
        tl.store(dx_ptr + row * (CHUNKS * VEC) + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    _store_sums(sums_ptr, sums, chunk, CHUNKS, tl.program_id(0), M + 1 + N)
    at = tl.program_id(0) * (CHUNKS * VEC) + chunk[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=inside[:, None])
    tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=inside[:, None])


@triton.jit
def _collect_kernel(
    sums_ptr, b_ptr, da_ptr, db_ptr, programs, chunks, chunks_per_group,
    M: tl.constexpr, N: tl.constexpr, SIGNED: tl.constexpr, SHARED_A: tl.constexpr, SHARED_B: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage: program (k, group) adds coefficient k of its group over programs and chunks, in a fixed order."""
    k = tl.program_id(0)
    group = tl.program_id(1)
    in_numerator = k <= M
    shared = (in_numerator & SHARED_A) | ((not in_numerator) & SHARED_B)
    if group == 0 or not shared:
        first = tl.where(shared, 0, group * chunks_per_group)
        count = tl.where(shared, chunks, chunks_per_group)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, programs * count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            at = ((index // count).to(tl.int64) * (M + 1 + N) + k) * chunks + first + index % count
            total += tl.load(sums_ptr + at, mask=index < programs * count, other=0.0)
        value = tl.sum(total, 0)
        if in_numerator:
            tl.store(da_ptr + group * (M + 1) + k, value.to(da_ptr.dtype.element_ty))
        else:
            at = group * N + k - (M + 1)
            if not SIGNED:
                value = tl.where(tl.load(b_ptr + at) < 0, -value, value)
            tl.store(db_ptr + at, value.to(db_ptr.dtype.element_ty))


def forward(x: Tensor, bias: Tensor | None, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x + bias) for rows x (R, C) whose channels are adjacent."""
    plan = _Plan(x, numerator, denominator, form)
    out = x.new_empty(x.shape)
    grid, tile = plan.columns(x, bias is not None)
    with plan.device:
        _forward_kernel[grid](
            x, bias, numerator, denominator, out, len(x), x.stride(0), plan.chunks, plan.chunks_per_group,
            **plan.form, BIAS=bias is not None, **tile,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dbias, dnumerator, ddenominator) of ``forward``."""
    plan = _Plan(x, numerator, denominator, form)
    dx = x.new_empty(x.shape)
    grid, tile = plan.columns(x, bias is not None)
    sums = plan.partial_sums(grid[0])
    dbias = None if bias is None else x.new_empty(grid[0], x.shape[1], dtype=torch.float32)
    with plan.device:
        _backward_kernel[grid](
            grad, x, bias, numerator, denominator, dx, sums, dbias, len(x), grad.stride(0), x.stride(0), plan.chunks,
            plan.chunks_per_group, **plan.form, BIAS=bias is not None, **tile,
        )  # fmt: skip
        da, db = plan.collect(sums, numerator, denominator)
    return dx, None if bias is None else dbias.sum(0).to(bias.dtype), da, db


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, numerator: Tensor, denominator: Tensor, form: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(F(LayerNorm(x)) in ``dtype``, mean, 1/σ) for rows x (R, C)."""
    plan = _Plan(x, numerator, denominator, form)
    out = x.new_empty(x.shape, dtype=dtype)
    mean, rstd = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
    grid, tile = plan.whole_rows(x)
    with plan.device:
        _norm_forward_kernel[grid](
            x, weight, bias, numerator, denominator, out, mean, rstd, len(x), x.stride(0), plan.chunks_per_group, eps,
            **plan.form, CHUNKS=plan.chunks, **tile,
        )  # fmt: skip
    return out, mean, rstd


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, numerator: Tensor,
    denominator: Tensor, form: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias, dnumerator, ddenominator) of ``norm_forward``."""
    plan = _Plan(x, numerator, denominator, form)
    dx = x.new_empty(x.shape)
    grid, tile = plan.whole_rows(x)
    sums = plan.partial_sums(grid[0])
    dweight, dbias = (x.new_empty(grid[0], x.shape[1], dtype=torch.float32) for _ in range(2))
    with plan.device:
        _norm_backward_kernel[grid](
            grad, x, weight, bias, mean, rstd, numerator, denominator, dx, sums, dweight, dbias, len(x),
            grad.stride(0), x.stride(0), plan.chunks_per_group, **plan.form, CHUNKS=plan.chunks, **tile,
        )  # fmt: skip
        da, db = plan.collect(sums, numerator, denominator)
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), da, db


class _Plan:
    """Tile sizes and launch grid for one tensor's width, type and device."""

    def __init__(self, x: Tensor, numerator: Tensor, denominator: Tensor, form: str):
        groups = max(len(numerator), len(denominator))
        width = x.shape[1] // groups
        self.groups = groups
        self.vec = min(width & -width, 16 // x.element_size())
        self.chunks, self.chunks_per_group = x.shape[1] // self.vec, width // self.vec
        self.form = {
            "M": numerator.shape[1] - 1,
            "N": denominator.shape[1],
            "SIGNED": form == "abs_sum",
            "SHARED_A": len(numerator) == 1,
            "SHARED_B": len(denominator) == 1,
        }
        self.place = x.device
        self.device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
        self.programs = 4 * _processors(x.device)

    def columns(self, x: Tensor, bias: bool) -> tuple[tuple[int, int], dict[str, int]]:
        """Tiles of some rows and some columns; the column blocks divide the width when eight threads' worth does."""
        divisor = self.chunks & -self.chunks
        tile_chunks = min(32, divisor if divisor >= 4 else triton.next_power_of_2(self.chunks))
        rows = 128 // tile_chunks
        blocks = triton.cdiv(self.chunks, tile_chunks)
        programs = max(1, min(triton.cdiv(len(x), rows), self.programs // blocks))
        # A bias keeps more in registers: prefetching a second tile takes twice as many.
        stages = 1 if bias else 2
        return (programs, blocks), {"R": rows, "T": tile_chunks, "VEC": self.vec, "num_warps": 4, "STAGES": stages}

    def whole_rows(self, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
        """Tiles of whole rows, for the sums over a row."""
        tile_chunks = triton.next_power_of_2(self.chunks)
        rows = max(1, 64 // tile_chunks)
        warps = max(1, min(8, tile_chunks * rows // 32))  # one chunk per thread where that is possible
        programs = max(1, min(triton.cdiv(len(x), rows), self.programs * 4 // warps))
        return (programs,), {"R": rows, "T": tile_chunks, "VEC": self.vec, "num_warps": warps, "STAGES": 1}

    def partial_sums(self, programs: int) -> Tensor:
        count = self.form["M"] + 1 + self.form["N"]
        return torch.empty(programs, count, self.chunks, dtype=torch.float32, device=self.place)

    def collect(self, sums: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        da, db = torch.empty_like(numerator), torch.empty_like(denominator)
        _collect_kernel[(sums.shape[1], self.groups)](
            sums, denominator, da, db, len(sums), self.chunks, self.chunks_per_group, **self.form, BLOCK=2048,
            num_warps=8,
        )  # fmt: skip
        return da, db


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
