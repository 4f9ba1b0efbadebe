"""The Triton kernels of the group-rational op: on a GPU where there is one, else under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from backbones.layers.gr_kan import GRKAN
from backbones.ops import group_rational, norm_rational
from backbones.ops.rational import library
from backbones.ops.rational.reference import group_rational_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Every op runs on the kernels, and memory that they forget to write holds NaN."""
    monkeypatch.setattr(library, "_kernels", lambda x: library._triton() if x.dtype != torch.float64 else None)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse otherwise
    yield
    torch.use_deterministic_algorithms(False)


def draw(rows, width, dtype=torch.float32, groups=8, degrees=(5, 4), shared=(True, False)):
    """x, numerator, denominator and an upstream gradient."""
    a = torch.randn(1 if shared[0] else groups, degrees[0] + 1, device=DEVICE)
    b = torch.randn(1 if shared[1] else groups, degrees[1], device=DEVICE)
    x, upstream = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(2))
    return x, a, b, upstream


def run(function, tensors, upstream, dtype=None):
    """[output, gradients...] of function(*tensors), computed in ``dtype``."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_as_right_as_pytorch(ours, low, exact):
    """The kernel rule: at most twice the error of the same maths in PyTorch, both against float64."""
    for mine, theirs, truth in zip(ours, low, exact, strict=True):
        scale = truth.abs().max().clamp_min(1e-30) if truth.numel() else 1.0
        truncates = DEVICE == "cpu" and mine.dtype == torch.bfloat16  # the interpreter, where a GPU rounds
        floor = (torch.finfo(torch.bfloat16).eps if truncates else 64 * torch.finfo(torch.float32).eps) * scale
        error, allowed = (mine.double() - truth).abs(), 2 * (theirs.double() - truth).abs()
        assert torch.isfinite(mine).all()
        assert error.numel() == 0 or error.max() <= allowed.max() + floor


def check(ours, reference, tensors, upstream):
    assert_as_right_as_pytorch(
        run(ours, tensors, upstream),
        run(reference, tensors, upstream),
        run(reference, tensors, upstream, torch.float64),
    )


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [192, 384, 768, 3072, 160, 21])
def test_any_width_and_type(width, dtype, form):
    x, a, b, upstream = draw(13, width, dtype, groups=7 if width == 21 else 8)
    functions = [lambda *t, f=f: f(*t, form) for f in (group_rational, group_rational_reference)]
    check(*functions, (x, a, b), upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 197, 4096])
def test_any_number_of_rows(rows, dtype):
    x, a, b, upstream = draw(rows, 192 if rows < 1000 or DEVICE == "cuda" else 32, dtype)  # the interpreter is slow
    check(group_rational, group_rational_reference, (x, a, b), upstream)


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("degrees", [(5, 4), (0, 1), (2, 3), (7, 6)])
def test_any_degrees_and_sharing(degrees, shared):
    x, a, b, upstream = draw(9, 48, groups=4, degrees=degrees, shared=shared)
    check(group_rational, group_rational_reference, (x, a, b), upstream)


@pytest.mark.parametrize("width", [192, 160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_in_the_same_pass(dtype, width):
    x, a, b, upstream = draw(37, width, dtype)
    bias = torch.randn(width, device=DEVICE)
    check(
        lambda x, a, b, bias: group_rational(x, a, b, bias=bias),
        lambda x, a, b, bias: group_rational_reference((x + bias).to(x.dtype), a, b),
        (x, a, b, bias),
        upstream,
    )


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(37, 192), (3, 768), (5, 160), (1, 3072), (0, 192), (6, 21)])
def test_layer_norm_in_the_same_pass(rows, width, dtype, form):
    x, a, b, upstream = draw(rows, width, dtype, groups=7 if width == 21 else 8)
    weight, bias = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)

    def unfused(x, weight, bias, a, b):
        normal = F.layer_norm(x, (width,), weight.to(x.dtype), bias.to(x.dtype), 1e-6)
        return group_rational_reference(normal, a, b, form)

    check(lambda *t: norm_rational(*t, form), unfused, (x, weight, bias, a, b), upstream)


def strided(kind):
    base = torch.randn(6, 7, 5, 64, device=DEVICE)
    return {
        "slice": base[:, 1:, :, 16:48],
        "transposed": base[:, :, 0].transpose(0, 1)[..., :32],
        "channels_first": torch.randn(2, 32, 3, 5, device=DEVICE).permute(0, 2, 3, 1),
        "channels_last": torch.randn(2, 32, 3, 5, device=DEVICE)
        .to(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1),
        "expanded": torch.randn(1, 1, 32, device=DEVICE).expand(3, 4, 32),
        "misaligned": torch.randn(4 * 32 + 1, device=DEVICE)[1:].view(4, 32),
    }[kind]


@pytest.mark.parametrize("kind", ["slice", "transposed", "channels_first", "channels_last", "expanded", "misaligned"])
def test_strides_do_not_change_the_result(kind):
    x = strided(kind)
    _, a, b, _ = draw(0, 32)
    upstream = torch.randn(1, 32, device=DEVICE).expand(x.numel() // 32, 32).view(x.shape)  # an expanded gradient
    expected = run(group_rational, (x.contiguous(), a, b), upstream.contiguous())
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    out = group_rational(*leaves)
    for ours, dense in zip([out, *torch.autograd.grad(out, leaves, upstream)], expected, strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=0)


def test_channels_last_input_is_not_copied():
    x = strided("channels_last")
    assert library._rows(x).data_ptr() == x.data_ptr()
    half = torch.randn(6, 64, device=DEVICE)[:, :32]
    assert library._rows(half).data_ptr() == half.data_ptr()


def test_gradients_at_zero_use_the_sign_plus_one():
    x, b = torch.zeros(5, 16, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
    a = torch.randn(1, 6, device=DEVICE)
    b[:, ::2] = -0.5  # b_1, whose sign at x = 0 decides dx, and b_3; the others stay at their own kink
    check(group_rational, group_rational_reference, (x, a, b), torch.ones_like(x))
    ones = torch.ones(5, 16, device=DEVICE)
    identity = torch.tensor([[0.0, 1.0]], device=DEVICE)
    gradient = run(group_rational, (ones, identity, torch.zeros(8, 4, device=DEVICE)), ones)[3]
    assert (gradient == -10).all()  # Σ −x·|x|ʲ over five rows of two channels


def test_two_runs_are_equal_bit_for_bit():
    x, a, b, upstream = draw(60, 192, torch.bfloat16)
    weight, bias = torch.randn(192, device=DEVICE), torch.randn(192, device=DEVICE)
    for function, tensors in ((group_rational, (x, a, b)), (norm_rational, (x, weight, bias, a, b))):
        first, second = (run(function, tensors, upstream) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
def test_infinite_and_nan_inputs_give_what_the_reference_gives(form):
    x, a, b, _ = draw(1, 16)
    x[0, :6] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 1e4], device=DEVICE)
    torch.testing.assert_close(
        group_rational(x, a, b, form), group_rational_reference(x, a, b, form), equal_nan=True, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_fused_feed_forward_equals_the_unfused_one(autocast, monkeypatch):
    mlp, norm = GRKAN(32, 128, 4, (5, 4), "swish", "variance_preserving").to(DEVICE), torch.nn.LayerNorm(32).to(DEVICE)
    torch.nn.init.normal_(mlp.fc1.bias)
    x = torch.randn(2, 5, 32, device=DEVICE)
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(library, "_kernels", lambda x: None)
        mlp.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = mlp(x, norm)
        out.float().square().sum().backward()
        results.append([out, *(p.grad.clone() for p in (*mlp.parameters(), *norm.parameters()))])
        norm.zero_grad()
    for one, two in zip(*results, strict=True):
        scale = two.abs().max()
        assert (one - two).abs().max() <= (0.03 if autocast else 1e-5) * scale


def test_a_watched_layer_is_not_fused_away():
    mlp, norm = GRKAN(32, 64, 4, (5, 4), "swish", "variance_preserving").to(DEVICE), torch.nn.LayerNorm(32).to(DEVICE)
    seen = []
    for module in (norm, mlp.fc1):
        module.register_forward_hook(lambda *_: seen.append(1))
    mlp(torch.randn(3, 32, device=DEVICE), norm)
    assert len(seen) == 2


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from backbones.ops.rational import triton as kernels

FORM = dict(M=5, N=4, SIGNED=False, SHARED_A=True, SHARED_B=False)
for kernel, sizes in (
    (kernels._forward_kernel, dict(BIAS=True, R=4, T=32, VEC=8, STAGES=1)),
    (kernels._backward_kernel, dict(BIAS=True, R=4, T=32, VEC=8, STAGES=1)),
    (kernels._norm_forward_kernel, dict(R=1, T=128, VEC=8, CHUNKS=96, STAGES=1)),
    (kernels._norm_backward_kernel, dict(R=1, T=128, VEC=8, CHUNKS=96, STAGES=1)),
    (kernels._collect_kernel, dict(BLOCK=2048)),
):
    constants, signature, hints = {**FORM, **sizes}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*bf16" if name in ("x_ptr", "grad_ptr", "out_ptr", "dx_ptr") else "*fp32"
            hints[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
            if "stride" in name or name == "chunks":
                hints[(index,)] = [["tt.divisibility", 16]]
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source, target = ASTSource(kernel, signature, at, hints), GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options={"num_warps": 4})
    ptx = built.asm["ptx"]
    atomics = "atom" in ptx or "red.global" in ptx
    print(kernel.fn.__name__, ptx.count("ld.global.v4"), ptx.count("st.global.v4"), atomics)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_16_byte_accesses_and_no_atomics(tmp_path):
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = {name: rest for name, *rest in map(str.split, result.stdout.splitlines())}
    assert len(lines) == 5
    for name, (loads, stores, atomics) in lines.items():
        assert atomics == "False"
        if name != "_collect_kernel":
            assert int(loads) >= (2 if "backward" in name else 1) and int(stores) >= 1
