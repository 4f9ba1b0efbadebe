"""B-spline KAN: its basis is scipy's, its layer is the sum of its functions, and its settings are checked."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch.nn import functional as F

from backbones import create_backbone
from backbones.layers.spline_kan import SplineLinear, bspline_basis, uniform_knots


@pytest.mark.parametrize("knots", ["uniform", "uneven"])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_basis_is_scipys(order, knots):
    grid = uniform_knots(5, order).double()
    if knots == "uneven":
        grid = (grid + 0.1 * torch.rand(len(grid), dtype=torch.float64)).sort().values
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    ours = bspline_basis(x, grid, order)
    assert ours.shape == (301, 5 + order)
    for i in range(5 + order):
        theirs = BSpline.basis_element(grid[i : i + order + 2].numpy(), extrapolate=False)(x.numpy())
        expected = torch.from_numpy(np.nan_to_num(theirs))
        inside = (x - grid[i + order + 1]).abs() > 1e-9  # scipy closes the last interval, ours are half-open
        torch.testing.assert_close(ours[inside, i], expected[inside], atol=1e-12, rtol=0)
    inner = (x >= grid[order]) & (x < grid[-order - 1])
    torch.testing.assert_close(ours[inner].sum(1), torch.ones(int(inner.sum()), dtype=torch.float64))


def test_basis_has_the_gradient_of_finite_differences():
    x = torch.tensor([-0.93, -0.31, 0.05, 0.77], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bspline_basis(x, uniform_knots(5, 3).double(), 3), x)


def test_too_few_knots_are_named():
    with pytest.raises(ValueError, match=r"order 3 needs at least 5 knots in one dimension, got \(4,\)"):
        bspline_basis(torch.zeros(2), torch.arange(4.0), 3)


def test_layer_sums_one_function_per_pair_of_channels():
    layer = SplineLinear(4, 3).double()
    x = torch.rand(7, 4, dtype=torch.float64) * 3 - 1.5
    expected = torch.zeros(7, 3, dtype=torch.float64)
    for o in range(3):
        for i in range(4):
            curve = (bspline_basis(x[:, i], uniform_knots(5, 3), 3) * layer.spline_weight[o, i]).sum(-1)
            expected[:, o] += layer.base_weight[o, i] * F.silu(x[:, i]) + curve
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_layer_keeps_the_variance_at_the_start():
    out = SplineLinear(256, 256)(torch.randn(200, 256))
    assert out.std().item() == pytest.approx(1.0, abs=0.1)


def test_vitkan_learns_and_has_nine_weights_per_pair_of_channels():
    net = create_backbone("vitkan_nano_patch8_64", num_classes=5, ffn={"grid": 5, "order": 3})
    assert sum(p.numel() for p in net.blocks[0].mlp.parameters()) == 2 * 96 * 384 * 9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(torch.randn(2, 3, 64, 64)).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert not [name for name in net.state_dict() if "knots" in name]


@pytest.mark.parametrize("key", ["grid", "order"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_grid_and_order_are_positive_integers(key, value):
    with pytest.raises(ValueError, match=rf"ffn.{key} is {value}; it must be a positive integer"):
        create_backbone("vitkan_nano_patch8_64", ffn={key: value})


def test_an_mlps_weights_are_not_a_spline_networks(tmp_path):
    torch.save(create_backbone("vit_nano_patch8_64").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="less than 90%"):
        create_backbone("vitkan_nano_patch8_64", weights=str(tmp_path / "vit.pth"))
