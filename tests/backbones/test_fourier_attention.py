"""Fourier-KArAt attention equals the double sum over φ it stands for in both orders, keeps masks, checks its input."""

import itertools
import math

import pytest
import torch

from backbones.ops import fourier_attention, fourier_mix, fourier_phi
from backbones.ops.fourier_attention import blocked, library, linear
from backbones.ops.fourier_attention.reference import fourier_mix_reference, fourier_phi_reference

ORDERS = ["w_phi", "phi_w"]


def inputs(batch=2, heads=2, n=7, d=4, harmonics=3, rank=5, dtype=torch.float64, order="w_phi"):
    shapes = [(batch, heads, n, d)] * 3 + [(heads, harmonics, rank, n)] * 2 + [(heads, n, rank)]
    if order == "phi_w":
        shapes[3:] = [(heads, harmonics, n, rank)] * 2 + [(heads, rank, n)]
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def some_masked(batch, n):
    mask = torch.ones(batch, n, dtype=torch.bool)
    mask[0, 2:4] = mask[-1, -1] = False
    return mask


def phi(a, b, h, p, q, x):
    """φ_pq(x) of head h, number by number."""
    return sum(
        a[h, m - 1, p, q].item() * math.cos(m * x) + b[h, m - 1, p, q].item() * math.sin(m * x)
        for m in range(1, a.shape[1] + 1)
    )


def double_loop(q, k, v, a, b, w, key_mask, scale, order):
    """O_k = Σ_p (W Φ̂(S_k))_p v_p, or Σ_p (Φ̂(W S_k))_p v_p, number by number."""
    batch, heads, n, _ = q.shape
    ranks = range(w.shape[2] if order == "w_phi" else w.shape[1])
    out = torch.zeros_like(q)
    for i, h, row in itertools.product(range(batch), range(heads), range(n)):
        real = [t for t in range(n) if key_mask is None or key_mask[i, t]]
        scores = {t: scale * (q[i, h, row] @ k[i, h, t]).item() for t in real}
        if order == "w_phi":
            inner = [sum(phi(a, b, h, r, t, scores[t]) for t in real) for r in ranks]
            weights = {p: sum(w[h, p, r].item() * inner[r] for r in ranks) for p in real}
        else:
            inner = [sum(w[h, r, t].item() * scores[t] for t in real) for r in ranks]
            weights = {p: sum(phi(a, b, h, p, r, inner[r]) for r in ranks) for p in real}
        for p in real:
            out[i, h, row] += weights[p] * v[i, h, p]
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("n", [5, 10], ids=["grid", "grid_and_class_token"])
def test_equals_the_double_loop_over_phi(n, masked, order):
    tensors = [t.detach() for t in inputs(n=n, order=order)]
    mask = some_masked(2, n) if masked else None
    out = fourier_attention(*tensors, key_mask=mask, order=order)
    assert (out - double_loop(*tensors, mask, 4**-0.5, order)).abs().max() < 1e-10


@pytest.mark.parametrize("block_bytes", [2**20, 512], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_blocked_form_has_the_references_values_and_gradients(block_bytes, masked, monkeypatch):
    monkeypatch.setitem(blocked._BLOCK_BYTES, "cpu", block_bytes)
    q, k, _, a, b, _ = inputs(batch=3, n=13)
    mask = (torch.rand(3, 13) > 0.3) if masked else None
    upstream = torch.randn(3, 2, 13, 5, dtype=torch.float64)
    results = []
    for function in (fourier_phi, fourier_phi_reference):
        out = function(q, k, a, b, mask, 0.5)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), (q, k, a, b))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", [2**18, 64], ids=["one_block", "many_blocks"])
def test_linear_form_has_the_references_values_and_gradients(block, monkeypatch):
    monkeypatch.setitem(linear._BLOCK, "cpu", block)
    _, _, v, a, b, _ = inputs(batch=3, n=13, order="phi_w")
    z = torch.randn(3, 2, 11, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 2, 11, 4, dtype=torch.float64)
    results = []
    for function in (fourier_mix, fourier_mix_reference):
        out = function(z, v, a, b)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), (z, v, a, b))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_pass_finite_differences(order):
    mask = torch.tensor([[True, True, False, True, True]])
    tensors = inputs(batch=1, heads=1, n=5, d=3, harmonics=2, rank=2, order=order)
    assert torch.autograd.gradcheck(lambda *t: fourier_attention(*t, key_mask=mask, order=order), tensors)


def test_the_op_obeys_torch_library():
    mask = some_masked(2, 7)
    q, k, _, a, b, _ = inputs(dtype=torch.float32)
    torch.library.opcheck(library.fourier_phi_op, (q, k, a, b, mask, 0.5))
    torch.library.opcheck(library.fourier_phi_op, (q, k, a, b, None, 0.5))
    _, _, v, a, b, _ = inputs(dtype=torch.float32, order="phi_w")
    z = torch.randn(2, 2, 7, 5, requires_grad=True)
    torch.library.opcheck(library.fourier_mix_op, (z, v, a, b))


@pytest.mark.parametrize("order", ORDERS)
def test_compiles_without_a_graph_break_and_exports_to_plain_operators(order):
    tensors = [t.detach() for t in inputs(dtype=torch.float32, order=order)]

    class Module(torch.nn.Module):
        def forward(self, *t):
            return fourier_attention(*t, order=order)

    expected = Module()(*tensors)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    exported = torch.export.export(Module(), tuple(tensors))
    assert "karvis" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*tensors), expected, rtol=1e-5, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit():
    def run():
        torch.manual_seed(0)
        tensors = inputs(batch=5, n=197, d=16, dtype=torch.float32)
        return torch.autograd.grad(fourier_attention(*tensors).square().sum(), tensors)

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_masked_key_gets_no_weight_and_no_gradient(order):
    q, k, v, *coefficients = inputs(batch=1, n=6, order=order)
    mask = torch.tensor([[True] * 5 + [False]])
    out = fourier_attention(q, k, v, *coefficients, key_mask=mask, order=order)
    spoiled = [t.masked_fill(~mask[:, None, :, None], float("nan")) for t in (k, v)]
    changed = fourier_attention(q, *spoiled, *coefficients, key_mask=mask, order=order)
    torch.testing.assert_close(out, changed, rtol=0, atol=0)
    grad_k, grad_v = torch.autograd.grad(changed.sum(), (k, v))
    assert grad_k[:, :, 5].abs().max() == 0
    assert grad_v[:, :, 5].abs().max() == 0
    assert grad_k.isfinite().all()


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_mix_is_the_second_half_of_phi_w(masked):
    q, k, v, a, b, w = inputs(order="phi_w")
    mask = some_masked(2, 7) if masked else None
    real = 1 if mask is None else mask[:, None, :, None]
    z = q @ (w @ (k * real)).transpose(-2, -1) * 4**-0.5
    torch.testing.assert_close(fourier_mix(z, v, a, b, mask), fourier_attention(q, k, v, a, b, w, mask, order="phi_w"))


def test_memory_grows_with_n_not_its_square():
    """Nothing of N×N elements lives at N = 2048: the largest tensor made stays within a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    tensors = inputs(batch=1, heads=2, n=2048, d=8, harmonics=2, rank=3, dtype=torch.float32)
    with Watch():
        fourier_attention(*tensors).sum().backward()
    assert largest <= 2**20 // 4 < 2048 * 2048


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_as_its_rounding_does(dtype, order):
    """The yardstick rounds what the operator stores in this type, H or Z, U and W, and computes the rest in float64."""
    tensors = [t.detach() for t in inputs(n=49, dtype=torch.float32, order=order)]
    q, k, v, a, b, w = [t.to(dtype).double() for t in tensors[:3]] + [t.double() for t in tensors[3:]]
    expected = fourier_attention(q, k, v, a, b, w, order=order)
    low = w.to(dtype).double()
    if order == "w_phi":
        h = fourier_phi(q, k, a, b).to(dtype).double()
        rounded = (h @ (low.transpose(1, 2) @ v).to(dtype).double()).to(dtype)
    else:
        z = (((q * 0.5) @ (low @ k).to(dtype).double().transpose(-2, -1)).to(dtype)).double()
        rounded = fourier_mix(z, v, *(t.to(dtype).double() for t in (a, b))).to(dtype)
    out = fourier_attention(*[t.to(dtype) for t in tensors[:3]], *tensors[3:], order=order)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= 2 * (rounded - expected).abs().max()


def test_empty_batch():
    tensors = [t[:0] if i < 3 else t for i, t in enumerate(inputs())]
    assert fourier_attention(*tensors).shape == (0, 2, 7, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__setitem__(1, t[1][:, :, :5]), "share one shape"),
        (lambda t: t.__setitem__(3, t[3][..., :5]), r"N=7"),
        (lambda t: t.__setitem__(5, t[5][:, :5]), r"w must be \(h=2, N=7, r=5\) for order 'w_phi', got \(2, 5, 5\)"),
        (lambda t: t.append(torch.ones(2, 7)), "key_mask must be bool"),
        (lambda t: t.__setitem__(2, t[2].float()), "one floating-point type"),
        (lambda t: t.__setitem__(slice(3, 5), [t[3][:, :0], t[4][:, :0]]), "at least 1"),
        (lambda t: t.extend([None, None, "w_phi_w"]), r"order is 'w_phi_w'; allowed: 'w_phi', 'phi_w'"),
        (lambda t: t.extend([None, None, "phi_w"]), r"a and b must be \(h=2, G, N=7, r\)"),
    ],
    ids=["keys", "coefficients", "w", "mask", "type", "no_harmonic", "order", "other_orders_shapes"],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    tensors = inputs()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        fourier_attention(*tensors)
