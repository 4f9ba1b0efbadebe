"""The controls of a comparison: what they take away is gone, and what they freeze never moves."""

import pytest
import torch

from backbones import create_backbone
from backbones.checkpoint import load_weights, save_backbone
from backbones.layers.gr_kan import GroupRational
from backbones.layers.pointwise import CONTROLS, PointwiseOperator

VIT, KARAT, SWIN = "vit_nano_patch8_64", "karat_nano_patch8_64", "swin_nano_patch2_window4_64"
CONVIT, KAT = "convit_nano_patch8_64", "kat_nano_patch8_64"


def qkv(tokens=7):
    return torch.randn(3, 2, 3, tokens, 4, dtype=torch.float64).unbind(0)


def test_uniform_is_the_mean_of_the_values():
    q, k, v = qkv()
    out = PointwiseOperator("uniform")(q, k, v, (1, 7), 0, None)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))


def test_uniform_leaves_masked_values_out_whatever_they_hold():
    q, k, v = qkv()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    v[1, :, 5:] = float("nan")
    out = PointwiseOperator("uniform")(q, k, v, (1, 7), 0, mask)
    torch.testing.assert_close(out[1], v[1, :, :5].mean(1, keepdim=True).expand_as(out[1]))


def test_none_is_each_token_s_own_value():
    q, k, v = qkv()
    torch.testing.assert_close(PointwiseOperator("none")(q, k, v, (1, 7), 0, None), v)


@pytest.mark.parametrize(("kind", "reaches"), [("softmax", True), ("uniform", True), ("none", False)])
def test_a_token_sees_another_only_by_attention(kind, reaches):
    net = create_backbone(VIT, num_classes=0, class_token=False, attention={"kind": kind}).eval()
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1  # the first patch
    (before,), (after,) = net.forward_maps(image), net.forward_maps(changed)
    assert torch.equal(before[..., 4, 4], after[..., 4, 4]) is not reaches
    assert not torch.equal(before[..., 0, 0], after[..., 0, 0])


@pytest.mark.parametrize("arch", [VIT, SWIN])
@pytest.mark.parametrize("kind", CONTROLS)
def test_every_parameter_of_a_control_has_a_gradient_to_reduce(arch, kind):
    net = create_backbone(arch, num_classes=2, class_token=False, attention={"kind": kind})
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


FROZEN = {
    "vit": (VIT, {"attention": {"frozen": True}}, "attn.qkv.qk"),
    "vit mimetic": (VIT, {"attention": {"frozen": True, "weight_init": "mimetic"}}, "attn.qkv.qk"),
    "vit with relative positions": (
        VIT,
        {"attention": {"frozen": True, "rel_pos": True}, "class_token": False},
        "rel_pos",
    ),
    "karat": (KARAT, {"attention": {"frozen": True}}, "operator"),
    "universal karat": (KARAT, {"attention": {"frozen": True, "mode": "universal"}}, "operator"),
    "polynomial": (VIT, {"attention": {"frozen": True, "kind": "polynomial"}}, "attn.qkv.qk"),
    "convit": (CONVIT, {"attention": {"frozen": True}}, "gating_param"),
    "swin": (SWIN, {"attention": {"frozen": True}}, "relative_position_bias_table"),
    "rationals": (KAT, {"ffn": {"frozen": True}}, "weight_numerator"),
}


@pytest.mark.parametrize(("arch", "settings", "part"), FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_stays_bit_for_bit_under_weight_decay_and_the_rest_learns(arch, settings, part):
    net = create_backbone(arch, num_classes=2, **settings)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    kept = {name for name, p in net.named_parameters() if torch.equal(p, start[name])}
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert kept == frozen
    assert any(part in name for name in frozen)
    assert not any(word in name for name in frozen for word in ("attn.qkv.v.", "attn.v.", "attn.proj.", "fc1", "fc2"))


def test_frozen_operators_leave_queries_and_keys_to_train():
    net = create_backbone(KARAT, attention={"frozen": True, "blocks": [1]})
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {f"blocks.1.attn.operator.{name}" for name in ("w", "phi.a", "phi.b")}


def test_frozen_queries_and_keys_take_a_vit_s_weights_and_keep_its_function(tmp_path):
    vit = create_backbone(VIT, num_classes=2).eval()
    save_backbone(tmp_path / "vit.safetensors", vit)
    frozen = create_backbone(VIT, num_classes=2, attention={"frozen": True}).eval()
    report = load_weights(frozen, tmp_path / "vit.safetensors", min_match=1.0, quiet=True)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(frozen(image), vit(image))
    assert report.share == 1.0
    save_backbone(tmp_path / "frozen.safetensors", frozen)
    again = create_backbone(VIT, num_classes=2, attention={"frozen": True}).eval()
    load_weights(again, tmp_path / "frozen.safetensors", min_match=1.0, quiet=True)
    torch.testing.assert_close(again(image), vit(image))


def test_a_linear_feed_forward_has_no_activation():
    net = create_backbone(VIT, ffn={"kind": "linear"}).eval()
    mlp, x, y = net.blocks[0].mlp, torch.randn(2, 5, 96), torch.randn(2, 5, 96)
    torch.testing.assert_close(mlp(x + y), mlp(x) + mlp(y) - mlp(torch.zeros_like(x)))


def test_frozen_rationals_still_pass_gradients_to_what_is_below():
    net = create_backbone(KAT, num_classes=2, ffn={"frozen": True})
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is None for m in net.modules() if isinstance(m, GroupRational) for p in m.parameters())
    assert net.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": {"kind": "unifrom"}}, "Did you mean 'uniform'"),
        ({"attention": {"kind": "uniform", "frozen": True}}, "attention.frozen is True, and attention.kind 'uniform'"),
        ({"attention": {"kind": "none"}}, "leaves the class token without a sight of the image"),
        ({"attention": {"frozen": "yes"}}, "attention.frozen is 'yes'"),
        ({"ffn": {"frozen": True}}, "ffn.frozen is True, and ffn.kind 'mlp' has no rationals"),
        ({"ffn": {"frozen": 1}}, "ffn.frozen is 1"),
    ],
)
def test_controls_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(VIT, **settings)
