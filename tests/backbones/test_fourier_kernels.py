"""The Triton kernels of Fourier attention: on a GPU where there is one, else under Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from test_rational_kernels import DEVICE, DTYPES, assert_as_right_as_pytorch, run

from backbones.ops.fourier_attention import library
from backbones.ops.fourier_attention import triton as kernels
from backbones.ops.fourier_attention.library import fourier_phi_op
from backbones.ops.fourier_attention.reference import fourier_phi_reference


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch):
    """The op runs on the kernels, and memory that they forget to write holds NaN."""
    monkeypatch.setattr(library, "_kernels", lambda q: kernels)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would refuse otherwise
    yield
    torch.use_deterministic_algorithms(False)


def draw(images, heads, tokens, width, harmonics, ranks, dtype=torch.float32):
    """(q, k, a, b) and an upstream gradient."""
    q, k = (torch.randn(images, heads, tokens, width, device=DEVICE).to(dtype) for _ in range(2))
    a, b = (torch.randn(heads, harmonics, ranks, tokens, device=DEVICE) for _ in range(2))
    return (q, k, a, b), torch.randn(images, heads, tokens, ranks, device=DEVICE).to(dtype)


def check(tensors, upstream, mask=None, scale=None):
    scale = tensors[0].shape[3] ** -0.5 if scale is None else scale
    ours, reference = (lambda *t, f=f: f(*t, mask, scale) for f in (fourier_phi_op, fourier_phi_reference))
    assert_as_right_as_pytorch(
        run(ours, tensors, upstream),
        run(reference, tensors, upstream),
        run(reference, tensors, upstream, torch.float64),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 32, 48, 64, 80, 96, 128])
def test_any_width_and_type(width, dtype):
    check(*draw(1, 2, 21, width, 1, 12, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 49, 75, 197])
def test_any_number_of_tokens(tokens, dtype):
    check(*draw(1, 1, tokens, 16, 1, 12, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("harmonics", "ranks"), [(1, 1), (3, 2), (3, 20), (11, 12), (2, 70)])
def test_any_harmonics_and_ranks(harmonics, ranks, dtype):
    check(*draw(2, 1, 19, 16, harmonics, ranks, dtype))


@pytest.mark.parametrize("images", [0, 1, 5])
def test_any_batch_and_share_of_it(images, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)  # two heads: two splits, of three images and of two
    check(*draw(images, 2, 9, 16, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [0.0, float("inf"), float("nan")])
def test_masked_keys_add_nothing_whatever_they_hold(garbage, dtype):
    tensors, upstream = draw(3, 1, 21, 16, 2, 2, dtype)
    mask = torch.rand(3, 21, device=DEVICE) > 0.4
    mask[1] = False
    tensors[1].masked_fill_(~mask[:, None, :, None], garbage)
    check(tensors, upstream, mask)
    h, dq, dk, *_ = run(lambda *t: fourier_phi_op(*t, mask, 0.25), tensors, upstream)
    assert not h[1].any() and not dq[1].any()
    assert not dk.masked_select(~mask[:, None, :, None]).any()


def test_a_mask_of_any_strides():
    tensors, upstream = draw(2, 1, 9, 16, 1, 2)
    mask = (torch.rand(9, 2, device=DEVICE) > 0.5).T
    one, two = (run(lambda *t, m=m: fourier_phi_op(*t, m, 0.25), tensors, upstream) for m in (mask, mask.contiguous()))
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["projection", "transposed", "expanded", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_the_result(kind, dtype):
    (_, _, a, b), _ = draw(2, 3, 21, 16, 2, 4)
    base = torch.randn(2, 21, 3, 3, 16, device=DEVICE).to(dtype)  # image, token, (q, k, v), head, lane
    q, k = {
        "projection": base.permute(2, 0, 3, 1, 4)[:2],
        "transposed": base.transpose(1, 4).contiguous().transpose(1, 4).permute(2, 0, 3, 1, 4)[:2],
        "expanded": base[:1, :, :2].permute(2, 0, 3, 1, 4).expand(2, 2, 3, 21, 16),
        "misaligned": base.flatten()[1:4033].view(2, 2, 3, 21, 16),
    }[kind]
    upstream = torch.randn(2, 1, 21, 1, device=DEVICE).to(dtype).expand(2, 3, 21, 4)
    a, b = a.transpose(2, 3).contiguous().transpose(2, 3), b.flip(0)
    dense = [t.contiguous() for t in (q, k, a, b)]
    h = kernels.forward(q, k, a, b, None, 0.25)
    assert torch.equal(h, kernels.forward(*dense, None, 0.25))
    ours = kernels.backward(upstream, q, k, a, b, None, 0.25)
    for mine, theirs in zip(ours, kernels.backward(upstream.contiguous(), *dense, None, 0.25), strict=True):
        assert torch.equal(mine, theirs)


def test_a_projection_is_not_copied():
    q, k, _ = torch.randn(2, 9, 3, 2, 16, device=DEVICE).permute(2, 0, 3, 1, 4)
    plan = kernels._Plan(q, k, *(torch.randn(2, 1, 3, 9, device=DEVICE) for _ in range(2)), None)
    assert plan.q.data_ptr() == q.data_ptr() and plan.k.data_ptr() == k.data_ptr()


def test_coefficients_of_any_type():
    (q, k, a, b), upstream = draw(1, 2, 9, 16, 2, 4, torch.bfloat16)
    h = kernels.forward(q, k, a, b, None, 0.25)
    grads = kernels.backward(upstream, q, k, a, b, None, 0.25)
    for dtype in (torch.bfloat16, torch.float64):
        other = a.bfloat16().to(dtype), b.bfloat16().to(dtype)
        assert torch.equal(h, kernels.forward(q, k, *other, None, 0.25))
        for mine, theirs, like in zip(
            kernels.backward(upstream, q, k, *other, None, 0.25), grads, (q, k, *other), strict=True
        ):
            assert mine.dtype == like.dtype and mine.shape == like.shape
            assert torch.equal(mine, theirs.to(mine.dtype))


def test_two_runs_are_equal_bit_for_bit():
    tensors, upstream = draw(4, 1, 23, 16, 5, 12, torch.bfloat16)
    first, second = (run(lambda *t: fourier_phi_op(*t, None, 0.25), tensors, upstream) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_large_scores():
    check(*draw(1, 1, 33, 16, 3, 2), scale=100.0)  # up to about 1,500 in size


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_a_real_token_that_is_not_finite_stays_visible():
    (q, k, a, b), _ = draw(1, 1, 9, 16, 1, 2)
    q[0, 0, 3, 0] = float("inf")
    assert fourier_phi_op(q, k, a, b, None, 0.25)[0, 0].isnan().any(1).tolist() == [i == 3 for i in range(9)]
    k[0, 0, 2] = float("nan")
    assert fourier_phi_op(q, k, a, b, None, 0.25).isnan().all()


@triton.jit
def _cos_sin_kernel(x_ptr, cos_ptr, sin_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    cos, sin = kernels._cos_sin(tl.load(x_ptr + at))
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


def cos_sin(x):
    x = x.to(DEVICE)
    cos, sin = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    size = min(1024, len(x))
    _cos_sin_kernel[(len(x) // size,)](x, cos, sin, size)
    return torch.stack([cos, sin]).double(), torch.stack([x.double().cos(), x.double().sin()])


@pytest.mark.parametrize("size", [2.0, 1e3, 1e4])
def test_cosine_and_sine(size):
    quarters = torch.arange(-512, 512) * torch.pi / 4  # where one of them is zero, and where the sign flips
    x = torch.cat([(torch.rand(1 << 18) * 2 - 1) * size, quarters, quarters.nextafter(torch.tensor(1e9))])
    ours, exact = cos_sin(x)
    assert (ours - exact).abs().max() < (1.5e-7 if DEVICE == "cuda" else 2e-7)  # the interpreter fuses nothing


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy
def test_cosine_and_sine_beyond_float32_phases():
    ours, _ = cos_sin(torch.tensor([3e8, -1e20, 3.4e38, -7e12]))
    assert ours.abs().max() <= 1
    ours, _ = cos_sin(torch.tensor([float("inf"), float("-inf"), float("nan"), float("inf")]))
    assert ours.isnan().all()


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from backbones.ops.fourier_attention import triton as kernels

FORM = dict(R=16, WIDTH=64, D=64, MASKED=False, TYPE=tl.bfloat16, ROWS=64, FIRST=0)
for harmonics in (1, 3):
    for kernel, columns, add in (
        (kernels._forward_kernel, 64, False),
        (kernels._query_kernel, 32, False),
        (kernels._key_kernel, 32, False),
        (kernels._key_kernel, 32, True),
    ):
        constants, signature, hints = dict(FORM, COLUMNS=columns, COUNT=harmonics, ADD=add), {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                wide = name == "sums_ptr" or (add and name == "dk_ptr")
                signature[name] = "*fp32" if wide else "*u8" if name == "mask_ptr" else "*bf16"
                hints[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if name == "scale" else "i32"
                if name.startswith(("q_", "k_")) or name == "padded":
                    hints[(index,)] = [["tt.divisibility", 16]]
        at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source, target = ASTSource(kernel, signature, at, hints), GPUTarget("cuda", 90, 32)
        built = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 2})
        ptx = built.asm["ptx"]
        atomics = "atom.global" in ptx or "red.global" in ptx.replace("shared.global", "")
        print(kernel.fn.__name__, ptx.count("wgmma.mma_async"), ptx.count("], 0x10,"), atomics)
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_to_tensor_core_products_and_no_atomics(tmp_path):
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 8
    for _, products, asynchronous_16_byte_copies, atomics in lines:
        assert int(products) >= 6 and int(asynchronous_16_byte_copies) >= 2 and atomics == "False"
