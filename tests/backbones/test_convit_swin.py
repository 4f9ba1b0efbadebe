"""ConViT and Swin are timm's with softmax, and with KArAt equal what their masks and biases say, at any size."""

import pytest
import timm
import torch
from torch import nn

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.layers.windows import window_partition, window_unpartition
from backbones.models.swin import SwinBlock

NANO = [
    "convit_nano_patch8_64",
    "karat_convit_nano_patch8_64",
    "swin_nano_patch2_window4_64",
    "karat_swin_nano_patch2_window4_64",
]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("convit_tiny_patch16_224", "convit_tiny"),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    ],
)
def test_timms_weights_give_timms_logits(ours, theirs):
    theirs = timm.create_model(theirs, num_classes=10).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() > 1 or "gating" in name or "pos" in name:
            nn.init.normal_(parameter, std=0.3 if "pos_proj" in name else 0.1)
    ours = create_backbone(ours, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_gated_attention_equals_timms_on_a_masked_rectangle():
    """The real tokens of a padded window see what timm's GPSA sees on a grid of those tokens alone."""
    net = create_backbone("convit_nano_patch8_64", num_classes=0, depth=5).eval()
    attention = net.blocks[0].attn
    nn.init.normal_(attention.pos_proj.weight)
    nn.init.normal_(attention.gating_param)
    x = torch.randn(2, 5, 5, 96)
    real = torch.zeros(2, 5, 5, dtype=torch.bool)
    real[:, :4, :4] = True
    with torch.no_grad():
        out = attention(x.flatten(1, 2), (5, 5), 0, real.flatten(1)).unflatten(1, (5, 5))[:, :4, :4]
        theirs = super(type(attention), attention).forward(x[:, :4, :4].reshape(2, 16, 96))
    torch.testing.assert_close(out.flatten(1, 2), theirs, rtol=1e-4, atol=1e-5)


def test_class_token_joins_after_the_local_blocks():
    net = create_backbone("karat_convit_nano_patch8_64", num_classes=3)
    assert net.pos_embed.shape == (1, 64, 96)
    assert [hasattr(block.attn, "gating_param") for block in net.blocks] == [True] * 4 + [False] * 2
    assert list(net.operators()) == ["blocks.4.attn.operator", "blocks.5.attn.operator"]
    assert net.blocks[4].attn.operator.prefix == 1
    assert net.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 65, 96)


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (9, 13)])
def test_shifted_windows_are_swins(size):
    """Tokens that share a window, and their places in it, are those of timm's cyclic shift with its mask."""
    height, width = size
    index = torch.arange(height * width).view(1, height, width, 1) + 1.0
    windows, real = window_partition(index, 4, offset=2)
    torch.testing.assert_close(window_unpartition(windows, 4, height, width, offset=2), index)
    if height % 4 or width % 4:
        return  # timm pads after the shift: other places
    pairs = set()
    for window, mask in zip(windows[..., 0].int(), real, strict=True):
        places = [(int(t), place) for place, t in enumerate(window) if mask[place]]
        pairs |= {(x, y) for x in places for y in places}
    block = timm.models.swin_transformer.SwinTransformerBlock(8, size, 1, window_size=4, shift_size=2)
    shifted = torch.roll(index, (-2, -2), (1, 2))
    expected = set()
    for window, mask in zip(window_partition(shifted, 4)[0][..., 0].int(), block.attn_mask, strict=True):
        places = [(int(t), place) for place, t in enumerate(window)]
        expected |= {(x, y) for x in places for y in places if mask[x[1], y[1]] == 0}
    assert pairs == expected


@pytest.mark.parametrize("shifted", [False, True], ids=["windows", "shifted"])
@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_swins_block_with_softmax_is_timms(kind, shifted, monkeypatch):
    """The relative position bias reaches the scores, and the mask keeps regions apart, exactly as in timm."""
    theirs = timm.models.swin_transformer.SwinTransformerBlock(
        48, (8, 8), 4, window_size=4, shift_size=2 if shifted else 0
    ).eval()
    nn.init.normal_(theirs.attn.relative_position_bias_table)
    config = create_backbone("karat_swin_nano_patch2_window4_64", attention={"kind": kind}).config
    ours = SwinBlock(config, 0, 48, 4, shifted, 0.0).eval()

    def softmax(q, k, v, grid, prefix, key_mask, scale):
        scores = q @ k.transpose(-2, -1) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
        return scores.softmax(-1) @ v

    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("attn.operator.") for name in missing)
    if kind == "karat":  # a softmax in the operator's place
        monkeypatch.setattr(ours.attn.operator, "forward", softmax)
    x = torch.randn(2, 8, 8, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(name):
    net = create_backbone(name, num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        net.zero_grad()
        net(x).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in net.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", NANO)
def test_weights_load_at_another_size_and_maps_have_their_strides(name, tmp_path):
    net = create_backbone(name, num_classes=4).eval()
    save_backbone(tmp_path / "w.safetensors", net)
    larger = create_backbone(name, num_classes=4, img_size=(96, 128), weights=str(tmp_path / "w.safetensors")).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), net(x), rtol=1e-3, atol=1e-4)
    swin = "swin" in name
    dense = create_backbone(
        name,
        num_classes=0,
        class_token=False,
        final_norm=False,
        weights=str(tmp_path / "w.safetensors"),
        out_indices=range(4),
    )
    maps = dense.forward_maps(x)
    strides = (2, 4, 8, 16) if swin else (8,) * 4
    assert [m.shape[2:] for m in maps] == [(96 // s, 128 // s) for s in strides]
    assert [m.shape[1] for m in maps] == list(dense.widths)


@pytest.mark.parametrize("name", ["swin_nano_patch2_window4_64", "karat_swin_nano_patch2_window4_64"])
def test_swins_layers_are_numbered_by_block(name):
    net = create_backbone(name)
    ids = {key: net.layer_id(key) for key, _ in net.named_parameters()}
    assert ids["patch_embed.proj.weight"] == 0
    assert ids["layers.0.blocks.1.norm1.weight"] == 2
    assert ids["layers.1.downsample.norm.weight"] == ids["layers.1.blocks.0.norm1.weight"] == 3
    assert ids["layers.3.blocks.1.mlp.fc1.weight"] == 8
    assert ids["norm.weight"] == ids["head.fc.weight"] == 9
    undecayed = net.no_weight_decay()
    assert undecayed <= set(ids)
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in undecayed


def test_swin_takes_every_attention_and_feed_forward():
    for attention in ({"kind": "relu"}, {"kind": "polynomial"}, {"kind": "karat", "basis": "morlet", "blocks": [1]}):
        net = create_backbone(
            "swin_nano_patch2_window4_64", num_classes=3, attention=attention, ffn={"kind": "grkan"}, depth=8
        )
        kinds = [b.attn.operator is not None for stage in net.layers for b in stage.blocks]
        assert kinds == [attention["kind"] != "karat" or i == 1 for i in range(8)]
        net(torch.randn(1, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("karat_swin_nano_patch2_window4_64", {"class_token": True}, "class_token is True; a Swin Transformer allows"),
        ("karat_swin_nano_patch2_window4_64", {"attention": {"mode": "universal"}}, "attention.mode is 'universal'"),
        ("karat_swin_nano_patch2_window4_64", {"attention": {"heads": [0]}}, r"attention.heads is \(0,\)"),
        ("swin_nano_patch2_window4_64", {"attention": {"rel_pos": True}}, "attention.rel_pos is True"),
        ("karat_swin_nano_patch2_window4_64", {"attention": {"rank": 17}}, "rank 17 exceeds the 16 tokens"),
        ("karat_swin_nano_patch2_window4_64", {"window_size": 0}, "window_size is 0; a Swin Transformer needs windows"),
        (
            "karat_swin_nano_patch2_window4_64",
            {"out_indices": [4]},
            "out_indices holds 4; the backbone has stages 0 to",
        ),
        ("karat_convit_nano_patch8_64", {"depth": 4}, "gpsa_blocks is 4; it must be below the 4 blocks"),
        ("karat_convit_nano_patch8_64", {"attention": {"blocks": [3]}}, "attention.blocks holds 3; blocks 0 to 3 have"),
    ],
)
def test_settings_that_are_not_defined_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, **settings)
