"""KArAt at other resolutions: an operator's output on a constant image stays, and networks load and run at any grid."""

import pytest
import torch

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.layers.bases import BASES, LinearBasis
from backbones.layers.karat import PROJECTIONS, KArAtOperator

NATIVE = (14, 14)  # 224 pixels in patches of 16
OTHERS = [(24, 24), (32, 48), (7, 7), (9, 20)]  # 384x384, 512x768, half the size, neither square nor a multiple


def constant_image(grid, heads=2, width=8):
    """q, k, v of a class token and equal patches."""
    torch.manual_seed(1)
    tokens = torch.randn(3, 1, heads, 2, width, dtype=torch.float64)
    count = torch.tensor([1, grid[0] * grid[1]])
    return tokens.repeat_interleave(count, 3).unbind(0)


def change(operator, grid):
    """Largest change of the outputs on a constant image, relative to the largest output at the native grid."""
    with torch.no_grad():
        native = operator(*constant_image(NATIVE), NATIVE, 1, None)[:, :, :2]
        other = operator(*constant_image(grid), grid, 1, None)[:, :, :2]
    return ((other - native).abs().max() / native.abs().max()).item()


@pytest.mark.parametrize("grid", OTHERS, ids=str)
@pytest.mark.parametrize("order", ["w_phi", "phi_w", "phi_phi"])
@pytest.mark.parametrize("basis", BASES)
def test_output_on_a_constant_image_stays(basis, order, grid):
    """At the start; for bases that are linear in their coefficients, with any coefficients."""
    torch.manual_seed(0)
    operator = KArAtOperator(2, NATIVE, 1, basis, 3, 4, order, "silu").double()
    if issubclass(BASES[basis], LinearBasis):
        for parameter in operator.parameters():
            torch.nn.init.normal_(parameter)
    assert change(operator, grid) < 0.01


def test_output_projected_before_w_stays():
    torch.manual_seed(0)
    assert change(KArAtOperator(2, NATIVE, 1, projection="before").double(), (24, 24)) < 0.01


def test_full_form_on_a_constant_image_stays():
    torch.manual_seed(0)
    operator = KArAtOperator(2, NATIVE, 1, harmonics=1, order="full").double()
    assert change(operator, (10, 18)) < 0.01


@pytest.mark.parametrize("order", list(PROJECTIONS))
def test_weights_of_224_load_at_384_and_512_by_768(order, tmp_path, capsys):
    attention = {"order": order, "scales": True}
    settings = {"depth": 1, "num_classes": 3, "patch_size": 32, "embed_dim": 48, "attention": attention}
    net = create_backbone("karat_tiny_patch16_224", **settings).eval()
    save_backbone(tmp_path / "w.safetensors", net)
    for size in ((384, 384), (512, 768)):
        moved = create_backbone(
            "karat_tiny_patch16_224", img_size=size, weights=str(tmp_path / "w.safetensors"), **settings
        ).eval()
        assert "100.0% of" in capsys.readouterr().out
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            # Scales load one by one and meet after: the product of two resampled tensors is near, not equal.
            torch.testing.assert_close(moved(x), net(x), rtol=0.02, atol=1e-3)


def test_a_token_count_that_is_no_grid_is_reported_and_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    net = create_backbone("karat_nano_patch8_64", depth=1, num_classes=3)
    save_backbone(tmp_path / "w.safetensors", net)
    state = load_file(tmp_path / "w.safetensors")
    name = "blocks.0.attn.operator.phi.a"
    state[name] = state[name][..., :60].contiguous()
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"missing   1: blocks.0.attn.operator.phi.a \[3, 3, 12, 60\]->"):
        create_backbone(
            "karat_nano_patch8_64",
            depth=1,
            num_classes=3,
            weights=str(tmp_path / "cut.safetensors"),
            weights_min_match=1,
        )
