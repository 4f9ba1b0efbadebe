"""The trunk: timm's and Detectron2's numbers, the papers' parameter counts, any size, windows, checkpointing."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from backbones import create_backbone, list_backbones
from backbones.layers.windows import window_partition, window_unpartition

NANO = [
    "vit_nano_patch8_64",
    "karat_nano_patch8_64",
    "kat_nano_patch8_64",
    "karkat_nano_patch8_64",
    "vitkan_nano_patch8_64",
]


def millions(name, **overrides):
    return sum(p.numel() for p in create_backbone(name, **overrides).parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "mode", "classes", "expected"),
    [
        ("vit_tiny_patch16_224", None, 10, 5.53),
        ("karat_tiny_patch16_224", "blockwise", 10, 6.29),
        ("karat_tiny_patch16_224", "universal", 10, 5.59),
        # The paper's Small row counts the classifier of 1000 classes (its ViT-S has 22.05), the others one of 10.
        ("karat_small_patch16_224", "blockwise", 1000, 23.58),
        ("karat_small_patch16_224", "universal", 1000, 22.18),
        ("karat_base_patch16_224", "blockwise", 10, 87.51),
        ("karat_base_patch16_224", "universal", 10, 85.95),
    ],
)
def test_karat_has_the_papers_parameter_count(name, mode, classes, expected):
    overrides = {"attention": {"mode": mode, "scales": True}} if mode else {}
    assert millions(name, num_classes=classes, **overrides) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("size", "expected"), [("tiny", 5_718_328), ("base", 86_568_568)])
def test_kat_has_the_papers_parameter_count(size, expected):
    assert sum(p.numel() for p in create_backbone(f"kat_{size}_patch16_224").parameters()) == expected


@pytest.mark.parametrize("size", [(224, 224), (256, 320)])
def test_timms_weights_give_timms_logits(size):
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=10).eval()
    ours = create_backbone("vit_tiny_patch16_224", num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().max() < 1e-5


@pytest.mark.parametrize("rel_pos", [False, True], ids=["abs_pos", "rel_pos"])
@pytest.mark.parametrize(("size", "masking"), [(64, True), (80, False)], ids=["no_padding", "padding_without_masking"])
def test_detectron2s_weights_give_detectron2s_maps(rel_pos, size, masking):
    from detectron2.modeling import ViT

    theirs = ViT(
        img_size=size,
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=3,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=4,
        window_block_indexes=(0, 2),
        use_rel_pos=rel_pos,
        rel_pos_zero_init=False,
        pretrain_img_size=size,
        pretrain_use_cls_token=False,
        out_feature="last_feat",
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
    ours = create_backbone(
        "vit_nano_patch8_64",
        img_size=size,
        embed_dim=48,
        depth=4,
        num_classes=0,
        class_token=False,
        final_norm=False,
        window_size=4,
        global_blocks=(1, 3),
        mask_window_padding=masking,
        attention={"rel_pos": rel_pos},
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert (ours.forward_maps(x)[0] - theirs(x)["last_feat"]).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (3, 9), (2, 2)])
def test_windows_mark_their_padding_and_fit_together_again(shape):
    x = torch.rand(2, *shape, 4) + 1
    windows, real = window_partition(x, 3)
    assert windows.shape[1:] == (9, 4)
    if real is None:
        assert shape == (3, 9)
        real = torch.ones(windows.shape[:2], dtype=torch.bool)
    assert torch.equal(real, windows[..., 0] > 0)  # padding is zero, tokens are not
    assert torch.equal(window_unpartition(windows, 3, *shape), x)


@pytest.mark.parametrize("name", NANO)
def test_padded_window_tokens_change_nothing(name):
    """A window's real tokens come out the same whatever the padded ones hold: here, whatever their bias makes them."""
    net = create_backbone(name, class_token=False, num_classes=0, window_size=3, depth=1, attention={"rank": 4}).eval()
    x = torch.randn(1, 3, 64, 64)  # 8x8 patches in 3x3 windows: the last row and column are padded
    with torch.no_grad():
        nn.init.normal_(net.blocks[0].attn.qkv.bias)
        before = net.forward_maps(x)[0]
        masked = net.blocks[0].attn.forward

        def poisoned(tokens, grid, prefix, key_mask, shared):
            return masked(torch.where(key_mask[..., None], tokens, 7.0), grid, prefix, key_mask, shared)

        net.blocks[0].attn.forward = poisoned
        torch.testing.assert_close(net.forward_maps(x)[0], before)


@pytest.mark.parametrize("name", NANO)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_nothing(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = create_backbone(name, num_classes=5, grad_checkpointing=checkpointing, attention={"scales": True})
        net(torch.randn(2, 3, 64, 64)).square().sum().backward()
        missing = [n for n, p in net.named_parameters() if p.grad is None]
        assert not missing
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
@pytest.mark.parametrize("window_size", [0, 4])
def test_maps_of_any_size_divisible_by_the_patch(window_size, mode):
    net = create_backbone(
        "karkat_nano_patch8_64",
        num_classes=0,
        class_token=False,
        final_norm=False,
        window_size=window_size,
        global_blocks=(5,),
        out_indices=(1, 5),
        attention={"mode": mode},
    )
    maps = net.forward_maps(torch.randn(2, 3, 40, 104))
    assert [tuple(m.shape) for m in maps] == [(2, 96, 5, 13)] * 2
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_karat_blocks_can_be_mixed_with_softmax():
    net = create_backbone("karat_nano_patch8_64", attention={"blocks": [4, 5]})
    assert [i for i in range(6) if f"blocks.{i}.attn.operator" in net.operators()] == [4, 5]


def test_karat_starts_with_the_variance_of_its_values():
    net = create_backbone("karat_tiny_patch16_224")
    q, k, v = torch.randn(3, 8, 3, 197, 64).unbind(0)
    out = net.blocks[0].attn.mix(q, k, v, (14, 14), 1, None, None)
    assert out.std().item() == pytest.approx(1.0, abs=0.15)


def test_mimetic_start_makes_tokens_attend_to_their_like_and_values_take_themselves_back():
    """arXiv 2305.09828: W_q W_kᵀ ≈ 0.7 Z + 0.7 I at rank d per head, W_v W_proj = 0.4 Z − 0.4 I."""

    def correlation(product):
        identity = torch.eye(len(product))
        return (product.sub(product.mean()) * (identity - identity.mean())).sum() / (
            product.sub(product.mean()).norm() * (identity - identity.mean()).norm()
        )

    torch.manual_seed(0)
    nets = {
        kind: create_backbone("vit_tiny_patch16_224", attention={"weight_init": kind}) for kind in ("normal", "mimetic")
    }
    for kind, net in nets.items():
        for block in net.blocks[::5]:
            queries, keys, values = block.attn.qkv.weight.detach().T.chunk(3, 1)  # (C, C), tokens are rows
            for head in range(3):
                q, k = (w[:, 64 * head : 64 * head + 64] for w in (queries, keys))
                assert correlation(q @ k.T) > 0.3 if kind == "mimetic" else abs(correlation(q @ k.T)) < 0.1
            output = values @ block.attn.proj.weight.detach().T
            if kind == "normal":
                assert abs(correlation(output)) < 0.1
                continue
            assert correlation(output) < -0.5
            assert output.diagonal().mean().item() == pytest.approx(-0.4, abs=0.01)
            rest = output - torch.diag(output.diagonal())
            assert rest.std().item() == pytest.approx(0.4 / 192**0.5, rel=0.05)
            assert block.attn.qkv.bias.eq(0).all()
    assert nets["mimetic"].blocks[0].attn.qkv.weight.ne(nets["mimetic"].blocks[1].attn.qkv.weight).any()


def test_presets_are_timm_models_and_timms_own_stay_timms():
    assert set(NANO) <= set(list_backbones())
    net = timm.create_model("karkat_nano_patch8_64", num_classes=7, drop_path_rate=0.1)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert type(timm.create_model("vit_tiny_patch16_224")).__module__.startswith("timm.")


def test_class_token_and_pooled_features():
    x = torch.randn(2, 3, 64, 64)
    for token in (True, False):
        net = create_backbone("vit_nano_patch8_64", num_classes=0, class_token=token)
        assert net.forward_features(x).shape == (2, 64 + token, 96)
        assert net(x).shape == (2, 96)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("karat_nano", {}, "Did you mean 'karat_nano_patch8_64'"),
        ("vit_nano_patch8_64", {"dropath": 0.1}, "Did you mean 'drop_path'"),
        ("karat_nano_patch8_64", {"attention": {"rnk": 4}}, "Did you mean 'rank'"),
        ("karat_nano_patch8_64", {"attention": {"mode": "shared"}}, "'blockwise', 'universal'"),
        ("vit_nano_patch8_64", {"img_size": 70}, "70x70 is not divisible by the patch size 8; use 64 or 72"),
        ("karat_nano_patch8_64", {"attention": {"rank": 99}, "class_token": False}, "rank 99 exceeds the 64 tokens"),
        ("vit_nano_patch8_64", {"attention": {"weight_init": "mimic"}}, "'normal', 'mimetic'"),
        ("kat_nano_patch8_64", {"ffn": {"groups": 7}}, "width 96 is not divisible by ffn.groups 7"),
        ("vit_nano_patch8_64", {"window_size": 4}, "class_token=False"),
        ("vit_nano_patch8_64", {"out_indices": [6]}, "blocks 0 to 5"),
        (
            "karat_nano_patch8_64",
            {"attention": {"rel_pos": True}, "class_token": False},
            "rel_pos is defined for softmax",
        ),
        ("vit_nano_patch8_64", {"drop_path": 2}, "drop_path is 2; it must be between 0 and 1"),
    ],
)
def test_bad_settings_name_what_came_and_what_is_allowed(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, **overrides)


def test_input_of_a_wrong_size_names_the_nearest():
    net = create_backbone("vit_nano_patch8_64")
    with pytest.raises(ValueError, match="input 64x60 is not divisible by the patch size 8; use 56 or 64 for 60"):
        net(torch.randn(1, 3, 64, 60))
