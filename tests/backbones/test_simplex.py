"""The projection is the nearest point of the simplex, its gradient included."""

import pytest
import torch

from backbones.layers.simplex import project_simplex


@pytest.mark.parametrize("n", [1, 2, 7, 197])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_satisfies_the_conditions_of_optimality(n, scale):
    """x ≥ 0, Σ x = 1, and y − x is one number λ on the support and at most λ off it."""
    y = torch.randn(4, 3, n, dtype=torch.float64) * scale
    x = project_simplex(y)
    assert x.min() >= 0
    torch.testing.assert_close(x.sum(-1), torch.ones(4, 3, dtype=torch.float64))
    rest = y - x
    threshold = rest.masked_fill(x == 0, -torch.inf).amax(-1, keepdim=True)
    assert ((rest - threshold).abs()[x > 0] < 1e-9).all()
    assert (rest <= threshold + 1e-9).all()


def test_keeps_points_of_the_simplex_and_spreads_ties():
    point = torch.tensor([0.25, 0.75, 0.0])
    assert torch.equal(project_simplex(point), point)
    torch.testing.assert_close(project_simplex(torch.full((4,), 3.0)), torch.full((4,), 0.25))


@pytest.mark.parametrize("edge", [1e-9, 1e-6, 1e-3])
def test_entries_at_the_edge_of_the_support_fall_on_the_right_side(edge):
    """(1, y) projects onto (1, 0) for y ≤ 0 and keeps half of any y above."""
    y = torch.tensor([[1.0, -edge], [1.0, 0.0], [1.0, edge]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1 - edge / 2, edge / 2]], dtype=torch.float64)
    torch.testing.assert_close(project_simplex(y), expected, rtol=0, atol=1e-15)


def test_masked_entries_are_no_part_of_it():
    y = torch.randn(5, 6, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True])
    x = project_simplex(y.masked_fill(~mask, torch.nan), mask)
    assert torch.equal(x[:, ~mask], torch.zeros(5, 2, dtype=torch.float64))
    torch.testing.assert_close(x[:, mask], project_simplex(y[:, mask]))
    assert torch.equal(project_simplex(y, torch.zeros(6, dtype=torch.bool)), torch.zeros_like(y))


def test_gradient_passes_finite_differences():
    y = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True])
    assert torch.autograd.gradcheck(project_simplex, y)
    assert torch.autograd.gradcheck(lambda t: project_simplex(t, mask), y)


def test_low_precision_is_projected_in_float32():
    y = torch.randn(8, 197).bfloat16()
    x = project_simplex(y)
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x, project_simplex(y.float()).bfloat16(), rtol=0, atol=0)
