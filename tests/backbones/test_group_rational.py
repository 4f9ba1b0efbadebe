"""The group-rational activation: formula, gradients with sgn(0) = +1, sharing, types, and its checks."""

import pytest
import torch

from backbones.layers.gr_kan import GroupRational
from backbones.ops import group_rational, native_build, norm_rational
from backbones.ops.rational import eager, library, native
from backbones.ops.rational.reference import group_rational_reference


def inputs(rows=6, width=48, numerator_rows=1, groups=8, degrees=(5, 4)):
    x = torch.randn(rows, width, dtype=torch.float64)
    x[0, :10] = 0.0
    a = torch.randn(numerator_rows, degrees[0] + 1, dtype=torch.float64)
    b = torch.randn(groups, degrees[1], dtype=torch.float64)
    b[:, -1] = 0.0
    return [t.requires_grad_() for t in (x, a, b)]


def test_equals_the_formula_channel_by_channel():
    x, a, b = (t.detach() for t in inputs(numerator_rows=8))
    out = group_rational(x, a, b)
    for channel in range(48):
        group, value = channel // 6, x[:, channel]
        p = sum(a[group, i] * value**i for i in range(6))
        q = 1 + sum(b[group, j - 1].abs() * value.abs() ** j for j in range(1, 5))
        torch.testing.assert_close(out[:, channel], p / q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
@pytest.mark.parametrize("numerator_rows", [1, 8], ids=["shared", "per_group"])
@pytest.mark.parametrize("degrees", [(5, 4), (3, 1), (0, 2)])
def test_eager_form_has_the_references_values_and_gradients(form, numerator_rows, degrees, monkeypatch):
    monkeypatch.setattr(eager, "_BLOCK_ELEMENTS", 96)  # several blocks; float64 takes the eager form
    tensors = inputs(rows=5, numerator_rows=numerator_rows, degrees=degrees)
    upstream = torch.randn(5, 48, dtype=torch.float64)
    results = []
    for function in (group_rational, group_rational_reference):
        out = function(*tensors, form)
        grads = torch.autograd.grad((out * upstream).sum(), tensors, allow_unused=True)
        results.append([out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
def test_gradients_pass_finite_differences_away_from_the_kinks(form):
    x = torch.randn(3, 16, dtype=torch.float64)
    x = (x + 0.2 * x.sign()).requires_grad_()
    a = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    b = (torch.rand(4, 4, dtype=torch.float64) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: group_rational(*t, form), (x, a, b))


def test_identity_start_can_learn_its_denominator():
    """With all b = 0 the derivative of |b| at 0 decides: autograd's 0 would freeze b, +1 does not."""
    layer = GroupRational(groups=4, degrees=(5, 4), init="identity")
    x = torch.randn(10, 16)
    torch.testing.assert_close(layer(x), x)
    layer(x).pow(2).sum().backward()
    assert (layer.weight_denominator.grad < 0).all()


def test_swish_start_is_swish_on_its_range():
    x = torch.linspace(-3, 3, 1000, dtype=torch.float64)[:, None].repeat(1, 8)
    layer = GroupRational(groups=8, degrees=(5, 4), init="swish").double()
    assert (layer(x) - torch.nn.functional.silu(x)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_has_the_inputs_type_even_under_autocast(dtype):
    x = torch.randn(4, 16).to(dtype)
    a, b = torch.randn(1, 6), torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = group_rational(x, a, b)
    assert out.dtype == dtype
    expected = group_rational(x.double(), a.double(), b.double())
    assert ((out - expected).abs() <= torch.finfo(dtype).eps * (1 + 4 * expected.abs())).all()


def test_strides_leading_shapes_and_empty_batches():
    a, b = torch.randn(1, 6), torch.randn(8, 4)
    x = torch.randn(16, 5, 3).permute(2, 1, 0)  # (3, 5, 16), not contiguous
    torch.testing.assert_close(group_rational(x, a, b), group_rational(x.contiguous(), a, b))
    wide = torch.randn(1, 16).expand(4, 16).requires_grad_()
    group_rational(wide, a, b).sum().backward()  # an expanded gradient
    assert group_rational(torch.empty(0, 16), a, b).shape == (0, 16)


@pytest.mark.parametrize(
    ("x", "a", "b", "message"),
    [
        (torch.ones(2, 15), torch.ones(1, 6), torch.ones(8, 4), r"\(15,\).*8 groups"),
        (torch.ones(2, 16, dtype=torch.int64), torch.ones(1, 6), torch.ones(8, 4), "int64"),
        (torch.ones(2, 16), torch.ones(2, 6), torch.ones(8, 4), "2 groups and denominator 8"),
        (torch.ones(2, 16), torch.ones(6), torch.ones(8, 4), r"numerator must be .* got shape \(6,\)"),
        (torch.ones(2, 16, device="meta"), torch.ones(1, 6), torch.ones(8, 4), "meta.*cpu"),
    ],
    ids=["width", "integer", "groups", "shape", "device"],
)
def test_input_that_does_not_fit_is_named(x, a, b, message):
    with pytest.raises(ValueError, match=message):
        group_rational(x, a, b)


@pytest.mark.parametrize("form", ["sum_abs", "abs_sum"])
@pytest.mark.parametrize("width", [768, 160, 21], ids=lambda w: f"width{w}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernel_has_the_references_values_and_gradients(dtype, width, form):
    groups = 7 if width == 21 else 8
    x, upstream = (torch.randn(65, width).to(dtype) for _ in range(2))
    x[:9] = 0  # on the kink
    assert native.available(x, (5, 4)), "these tests need a C++ compiler"
    a, b = torch.randn(1, 6), torch.randn(groups, 4)
    results = []
    for function, kind in ((group_rational, None), (group_rational_reference, torch.float64)):
        leaves = [t.to(kind or t.dtype).requires_grad_() for t in (x, a, b)]
        out = function(*leaves, form)
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))])
    for index, (ours, exact) in enumerate(zip(*results, strict=True)):
        rounding = torch.finfo(dtype).eps / 2 if index < 2 else 0
        assert ((ours - exact).abs() <= rounding * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_cpu_kernel_does_not_depend_on_the_number_of_threads():
    x, a, b, upstream = torch.randn(500, 48), torch.randn(1, 6), torch.randn(8, 4), torch.randn(500, 48)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(native.backward(upstream, x, a, b, "sum_abs"))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_cpu_kernel_keeps_infinite_and_nan_as_the_reference_does():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 1e4, 0.0, -0.0]).repeat(2, 2)
    a, b = torch.randn(1, 6), torch.randn(8, 4)
    for dtype in (torch.float32, torch.bfloat16):
        ours, reference = (f(x.to(dtype), a, b) for f in (group_rational, group_rational_reference))
        torch.testing.assert_close(ours, reference, equal_nan=True)


def test_without_a_working_compiler_the_eager_form_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("KARVIS_CACHE", str(tmp_path))
    native_build.library.cache_clear()
    x, a, b = torch.randn(4, 16), torch.randn(1, 6), torch.randn(8, 4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no-such-compiler"):
        assert not native.available(x, (5, 4))
    torch.testing.assert_close(group_rational(x, a, b), group_rational_reference(x, a, b))
    native_build.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rational_is_the_activation_of_the_layer_norm(dtype):
    x = torch.randn(5, 7, 48).to(dtype)
    tensors = [t.requires_grad_() for t in (x, torch.randn(48), torch.randn(48), torch.randn(1, 6), torch.randn(8, 4))]

    def composed(x, weight, bias, a, b):
        return group_rational_reference(torch.nn.functional.layer_norm(x, (48,), weight, bias, 1e-6), a, b)

    exact = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(5, 7, 48, dtype=torch.float64)
    out, truth = norm_rational(*tensors), composed(*exact)
    assert out.dtype == dtype
    ours = [out, *torch.autograd.grad(out, tensors, upstream.to(dtype))]
    for mine, theirs in zip(ours, [truth, *torch.autograd.grad(truth, exact, upstream)], strict=True):
        assert (mine - theirs).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * theirs.abs().max()
    assert norm_rational(x.detach()[:0], *tensors[1:]).shape == (0, 7, 48)


def test_only_the_inputs_are_saved():
    saved = []
    x, a, b = (t.float().detach().requires_grad_() for t in inputs())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        group_rational(x, a, b)
    assert set(saved) == {t.data_ptr() for t in (x, a, b)}


@pytest.mark.parametrize("bias", [False, True])
def test_the_ops_keep_the_rules_of_torch_library(bias):
    x, a, b = (t.float().detach().requires_grad_() for t in inputs())
    extra = torch.randn(48, requires_grad=True) if bias else None
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(library.group_rational_op, (x, extra, a, b, "sum_abs"), test_utils=checks)
    w = torch.randn(48, requires_grad=True)
    arguments = (x, w, torch.randn(48), 1e-6, a, b, "sum_abs", torch.float32)
    torch.library.opcheck(library.norm_rational_op, arguments, test_utils=checks)


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_exports_to_plain_operators():
    layer = GroupRational(groups=4, degrees=(5, 4), init="swish")
    x = torch.randn(6, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,))
    assert not any("karvis" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": torch.ones(15)}, r"bias must be \(16,\).*got \(15,\)"),
        ({"denominator": torch.ones(8, 4, dtype=torch.int32)}, "denominator must be floating point, got torch.int32"),
        ({"form": "signed"}, "sum_abs.*abs_sum"),
    ],
    ids=["bias", "integer_coefficients", "form"],
)
def test_more_input_that_does_not_fit_is_named(arguments, message):
    call = {"x": torch.ones(2, 16), "numerator": torch.ones(1, 6), "denominator": torch.ones(8, 4), **arguments}
    with pytest.raises(ValueError, match=message):
        group_rational(**call)
