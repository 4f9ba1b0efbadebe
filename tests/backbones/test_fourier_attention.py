"""Fourier-KArAt attention equals the double sum over φ it stands for, keeps masks, and checks its input."""

import itertools
import math

import pytest
import torch

from backbones.ops import fourier_attention
from backbones.ops.fourier_attention import blocked
from backbones.ops.fourier_attention.reference import fourier_attention_reference


def inputs(batch=2, heads=2, n=7, d=4, harmonics=3, rank=5, dtype=torch.float64):
    shapes = [(batch, heads, n, d)] * 3 + [(heads, harmonics, rank, n)] * 2 + [(heads, n, rank)]
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def double_loop(q, k, v, a, b, w, key_mask, scale):
    """O_k = Σ_p Σ_r w_pr Φ̂_r(S_k) v_p, Φ̂_r(S_k) = Σ_q Σ_m a_mrq cos(m S_kq) + b_mrq sin(m S_kq), number by number."""
    batch, heads, n, _ = q.shape
    out = torch.zeros_like(q)
    for i, h, row in itertools.product(range(batch), range(heads), range(n)):
        real = [t for t in range(n) if key_mask is None or key_mask[i, t]]
        scores = {t: scale * (q[i, h, row] @ k[i, h, t]).item() for t in real}
        for r in range(w.shape[2]):
            phi = 0.0
            for t, m in itertools.product(real, range(1, a.shape[1] + 1)):
                phi += a[h, m - 1, r, t].item() * math.cos(m * scores[t])
                phi += b[h, m - 1, r, t].item() * math.sin(m * scores[t])
            for p in real:
                out[i, h, row] += w[h, p, r] * phi * v[i, h, p]
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("n", [5, 10], ids=["grid", "grid_and_class_token"])
def test_equals_the_double_loop_over_phi(n, masked):
    tensors = [t.detach() for t in inputs(n=n)]
    mask = None
    if masked:
        mask = torch.ones(2, n, dtype=torch.bool)
        mask[0, 2:4] = mask[1, -1] = False
    out = fourier_attention(*tensors, key_mask=mask)
    expected = double_loop(*tensors, mask, 4**-0.5)
    assert (out - expected).abs().max() < 1e-10


@pytest.mark.parametrize("block_bytes", [2**20, 512], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_blocked_form_has_the_references_values_and_gradients(block_bytes, masked, monkeypatch):
    monkeypatch.setitem(blocked._BLOCK_BYTES, "cpu", block_bytes)
    tensors = inputs(batch=3, n=13)
    mask = (torch.rand(3, 13) > 0.3) if masked else None
    upstream = torch.randn(3, 2, 13, 4, dtype=torch.float64)
    results = []
    for function in (fourier_attention, fourier_attention_reference):
        out = function(*tensors, mask, 0.5)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), tensors)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-11)


def test_gradients_pass_finite_differences():
    mask = torch.tensor([[True, True, False, True, True]])
    tensors = inputs(batch=1, heads=1, n=5, d=3, harmonics=2, rank=2)
    assert torch.autograd.gradcheck(lambda *t: fourier_attention(*t, key_mask=mask), tensors)


def test_masked_key_gets_no_weight_and_no_gradient():
    q, k, v, *coefficients = inputs(batch=1, n=6)
    mask = torch.tensor([[True] * 5 + [False]])
    out = fourier_attention(q, k, v, *coefficients, key_mask=mask)
    changed = fourier_attention(
        q, k + 100 * ~mask[:, None, :, None], v - 9 * ~mask[:, None, :, None], *coefficients, mask
    )
    torch.testing.assert_close(out, changed, rtol=0, atol=0)
    grad_k, grad_v = torch.autograd.grad(out.sum(), (k, v))
    assert grad_k[:, :, 5].abs().max() == 0
    assert grad_v[:, :, 5].abs().max() == 0


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    tensors = [t.detach() for t in inputs(dtype=torch.float32)]
    low = [t.to(dtype) for t in tensors[:3]] + tensors[3:]
    expected = fourier_attention(*[t.double() for t in low])
    out = fourier_attention(*low)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_empty_batch():
    tensors = [t[:0] if i < 3 else t for i, t in enumerate(inputs())]
    assert fourier_attention(*tensors).shape == (0, 2, 7, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__setitem__(1, t[1][:, :, :5]), "share one shape"),
        (lambda t: t.__setitem__(3, t[3][..., :5]), r"N=7"),
        (lambda t: t.__setitem__(5, t[5][:, :5]), r"w must be \(h=2, N=7, r=5\), got \(2, 5, 5\)"),
        (lambda t: t.append(torch.ones(2, 7)), "key_mask must be bool"),
    ],
    ids=["keys", "coefficients", "w", "mask"],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    tensors = inputs()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        fourier_attention(*tensors)
