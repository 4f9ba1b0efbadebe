"""Does the C++ kernel of Fourier attention agree with the eager form and with float64, wherever it may be used?"""

import pytest
import torch

from backbones.ops import native_build
from backbones.ops.fourier_attention import blocked, eager, native

# (batch, heads, N, d, G, r): one token, odd and even N, ranks around the widths of the kernel's inner loops
SIZES = [(2, 2, 1, 4, 1, 1), (3, 2, 7, 5, 3, 2), (2, 3, 40, 8, 11, 12), (1, 2, 197, 16, 3, 12), (2, 1, 33, 8, 3, 70)]


def inputs(size, masked=False, dtype=torch.float32):
    batch, heads, n, d, grid, rank = size
    q, k = torch.randn(2, batch, heads, n, d).to(dtype)
    a, b = torch.randn(2, heads, grid, rank, n)
    mask = None
    if masked:
        mask = torch.rand(batch, n) > 0.3
        mask[:, 0] = True
    return torch.randn(batch, heads, n, rank).to(dtype), q, k, a, b, mask, d**-0.5


def both(dh, *arguments):
    return [blocked.forward(*arguments), *blocked.backward(dh, *arguments)]


def wide(arguments):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]


def assert_close(ours, exact, tolerance, of_outputs=0.0):
    for index, (one, other) in enumerate(zip(ours, exact, strict=True)):
        rounding = of_outputs if index < 3 else 0.0  # h, dq and dk are in q's type
        assert one.isfinite().all()
        assert (one - other).abs().max() <= (tolerance + rounding) * other.abs().max().clamp_min(0.1)


@pytest.fixture(params=[2**20, 3000], ids=["one_block", "many_blocks"])
def block_bytes(request, monkeypatch):
    monkeypatch.setitem(blocked._BLOCK_BYTES, "cpu", request.param)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_has_the_values_and_gradients_of_the_eager_form_and_of_float64(size, masked, block_bytes, monkeypatch):
    arguments = inputs(size, masked)
    assert native.available(arguments[1]), "these tests need a C++ compiler"
    ours, exact = both(*arguments), both(*wide(arguments))
    monkeypatch.setenv("KARVIS_NATIVE", "0")
    assert_close(ours, exact, 1e-5)
    assert_close(both(*arguments), exact, 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_float64_gradients_are_those_of_autograd(masked, block_bytes):
    dh, q, k, a, b, mask, scale = wide(inputs(SIZES[2], masked))
    leaves = [t.requires_grad_() for t in (q, k, a, b)]
    s = scale * q @ k.transpose(-2, -1)
    h = 0
    for m in range(1, a.shape[1] + 1):
        for values, coefficient in ((torch.cos(m * s), a), (torch.sin(m * s), b)):
            h = h + (values if mask is None else values * mask[:, None, None]) @ coefficient[:, m - 1].mT
    exact = [h, *torch.autograd.grad(h, leaves, dh)]
    with torch.no_grad():
        assert_close(both(dh, *leaves, mask, scale), exact, 1e-12)


def test_bfloat16_is_computed_in_float32():
    arguments = inputs(SIZES[3], dtype=torch.bfloat16)
    ours = both(*arguments)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert_close(ours, both(*wide(arguments)), 1e-5, torch.finfo(torch.bfloat16).eps)


def test_any_strides_are_taken():
    dh, _, _, *rest = inputs(SIZES[1])
    q, k, _ = torch.randn(3, 7, 3, 2, 5).permute(2, 0, 3, 1, 4)  # as split from one linear layer
    expanded = dh[:, :, :1, :1].expand(dh.shape)
    assert_close(both(expanded, q, k, *rest), both(*wide((expanded, q, k, *rest))), 1e-5)
    dense = both(expanded.contiguous(), q.contiguous(), k.contiguous(), *rest)
    assert all(torch.equal(one, two) for one, two in zip(both(expanded, q, k, *rest), dense, strict=True))


def test_sine_and_cosine_up_to_a_thousand():
    s = torch.cat([torch.linspace(-1000, 1000, 7999), torch.pi * torch.arange(-318, 319) / 2, torch.zeros(1)])
    s = torch.nn.functional.pad(s, (0, -len(s) % 8))
    one = torch.eye(len(s)).view(1, 1, len(s), len(s))  # φ_r takes key r alone
    for a, b, function in ((one, 0 * one, torch.cos), (0 * one, one, torch.sin)):
        h = torch.empty(1, 1, 1, len(s))
        native.forward(s.view(1, 1, 1, -1), native.pack(a, b, torch.float32), None, h)
        assert (h.flatten() - function(s.double())).abs().max() < 2e-7


def test_huge_scores_stay_bounded_and_nan_stays():
    s = torch.tensor([1e9, -3e12, 1e20, 0, 0, 0, 0, 0])
    one = torch.eye(8).view(1, 1, 8, 8)
    h = torch.empty(1, 1, 1, 8)
    for last in (0.0, float("nan")):
        s[7] = last
        native.forward(s.view(1, 1, 1, -1), native.pack(one, one, torch.float32), None, h)
        assert h.isnan().all() if s[7].isnan() else h.abs().max() < 1.5


def test_results_do_not_depend_on_the_number_of_threads_nor_on_the_run():
    arguments = inputs(SIZES[3], masked=True)
    coefficients = native.pack(*arguments[3:5], torch.float32)
    before, kernel, whole = torch.get_num_threads(), [], []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        s = torch.linspace(-5, 5, 2 * 2 * 50 * 200).view(2, 2, 50, 200)
        h, sums = torch.empty(2, 2, 50, 12), torch.zeros_like(coefficients)
        native.forward(s, coefficients, None, h)
        kernel.append([h, native.backward(s, h, coefficients, None, sums), sums])
        whole.append(both(*arguments))
    torch.set_num_threads(before)
    for one, other in ((kernel[0], kernel[1]), (kernel[1], kernel[2]), (whole[1], whole[2])):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernel", ["1", "0"], ids=["native", "eager"])
def test_what_masked_keys_hold_does_not_matter(kernel, value, monkeypatch):
    monkeypatch.setenv("KARVIS_NATIVE", kernel)
    dh, q, k, a, b, mask, scale = inputs(SIZES[2], masked=True)
    clean = both(dh, q, k, a, b, mask, scale)
    poisoned = both(dh, q, k.masked_fill(~mask[:, None, :, None], value), a, b, mask, scale)
    assert all(torch.equal(one, two) for one, two in zip(clean, poisoned, strict=True))
    assert clean[2].masked_select(~mask[:, None, :, None]).eq(0).all()


def test_who_takes_which_type(monkeypatch):
    assert [blocked._functions(torch.zeros(1, dtype=t))[0] for t in (torch.float32, torch.bfloat16)] == [native] * 2
    assert [blocked._functions(torch.zeros(1, dtype=t))[0] for t in (torch.float64, torch.float16)] == [eager] * 2
    monkeypatch.setenv("KARVIS_NATIVE", "0")
    assert blocked._functions(torch.zeros(1))[0] is eager


def test_without_a_working_compiler_the_eager_form_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("KARVIS_CACHE", str(tmp_path))
    native_build.library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = inputs(SIZES[1])
    with pytest.warns(UserWarning, match="no-such-compiler"):
        assert not native.available(arguments[1])
    assert_close(both(*arguments), both(*wide(arguments)), 1e-5)
    native_build.library.cache_clear()
