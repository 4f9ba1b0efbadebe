"""The backbone inside MMSegmentation: maps, gradients, parameter groups and the derived configs."""

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.structures import SegDataSample

from backbones.training.groups import OPERATOR_STEP
from backbones.utils.errors import UserError
from segmentation.backbone import KarvisBackbone
from segmentation.config import CONFIG_FOLDER, load_config

NAMES = ("softmax", "karat", "kat", "karkat", "gated_karat", "gated_karkat")


def build(cfg):
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def batch(size=64, classes=9):
    samples = []
    for _ in range(2):
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, classes, (1, size, size))))
        sample.set_metainfo({"img_shape": (size, size)})
        samples.append(sample)
    return torch.randn(2, 3, size, size), samples


def test_maps_cover_an_image_that_is_no_multiple_of_the_patch():
    net = KarvisBackbone("vit_nano_patch8_64", out_indices=(2, 5)).eval()
    image = torch.randn(1, 3, 50, 61)
    padded = torch.zeros(1, 3, 56, 64)
    padded[..., :50, :61] = image
    maps = net(image)
    assert [tuple(m.shape[-2:]) for m in maps] == [(7, 8), (7, 8)]
    for ours, explicit in zip(maps, net(padded), strict=True):
        torch.testing.assert_close(ours, explicit)


def test_none_in_a_config_means_the_value_of_the_preset():
    assert KarvisBackbone("vit_nano_patch8_64", img_size=None, depth=None).net.config.img_size == (64, 64)


def test_unknown_backbone_key_names_the_nearest():
    with pytest.raises(UserError, match="drop_path"):
        KarvisBackbone("vit_nano_patch8_64", drop_paht=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_segmentor_gets_a_gradient(make_config, name):
    model = build(make_config(name))
    sum(v for k, v in model.loss(*batch()).items() if "loss" in k).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_derive_widths_and_levels_from_the_backbone(name, size, ade_layout):
    cfg = load_config(CONFIG_FOLDER / f"upernet_{name}.py", size, {"data_root": str(ade_layout)})
    width = {"tiny": 192, "small": 384, "base": 768}[size]
    assert size in cfg.model.backbone.arch
    assert cfg.model.decode_head.in_channels == [width] * 4
    assert cfg.model.backbone.out_indices == [2, 5, 8, 11]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 11
    assert cfg.model.test_cfg.stride == (341, 341)


def test_norms_biases_and_rational_coefficients_are_not_decayed_and_layers_slow_down(make_config):
    cfg = make_config("kat")
    model = build(cfg)
    for name in ("constructor", "paramwise_cfg"):  # mmengine takes them out before it calls the constructor
        cfg.optim_wrapper.pop(name)
    paramwise = {"layer_decay": 0.5}
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {"type": "KarvisOptimWrapperConstructor", "optim_wrapper_cfg": cfg.optim_wrapper, "paramwise_cfg": paramwise}
    )
    groups = constructor(model).optimizer.param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    lr, net = cfg.optim_wrapper.optimizer.lr, model.backbone.net
    named = dict(net.named_parameters())
    coefficients = [n for n in named if n.endswith(("weight_numerator", "weight_denominator"))]
    assert len(coefficients) == 4 * net.depth
    for name in (*coefficients, "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"):
        assert of[id(named[name])]["weight_decay"] == 0
    assert of[id(named["blocks.0.attn.qkv.weight"])]["weight_decay"] == cfg.optim_wrapper.optimizer.weight_decay
    assert of[id(named["blocks.5.attn.qkv.weight"])]["lr"] == pytest.approx(lr * 0.5)
    assert of[id(named["patch_embed.proj.weight"])]["lr"] == pytest.approx(lr * 0.5**7)
    assert of[id(model.decode_head.conv_seg.weight)]["lr"] == lr
    assert len(of) == len(list(model.parameters()))


@pytest.mark.parametrize("value", [0, -1.0, "quick"])
def test_rates_of_operators_that_are_not_positive_are_named(make_config, value):
    with pytest.raises(UserError, match=r"paramwise_cfg\.operator_lr is .*'derived', or a positive factor"):
        make_config("karat", options={"optim_wrapper.paramwise_cfg.operator_lr": value})


@pytest.mark.parametrize(("value", "expected"), [("derived", OPERATOR_STEP / (12 * 65)), (1.0, 1.0)])
def test_operators_learn_at_the_rates_that_follow_from_their_sizes(make_config, value, expected):
    cfg = make_config("karat", options={"optim_wrapper.paramwise_cfg.operator_lr": value})
    model = build(cfg)
    for name in ("constructor", "paramwise_cfg"):
        paramwise = cfg.optim_wrapper.pop(name)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {"type": "KarvisOptimWrapperConstructor", "optim_wrapper_cfg": cfg.optim_wrapper, "paramwise_cfg": paramwise}
    )
    of = {id(p): group for group in constructor(model).optimizer.param_groups for p in group["params"]}
    w = dict(model.backbone.net.named_parameters())["blocks.5.attn.operator.w"]
    share = of[id(w)]["lr"] / (cfg.optim_wrapper.optimizer.lr * paramwise["layer_decay"])
    assert share == pytest.approx(expected, rel=0.02)  # N is 64 tokens, or 65 with a class token


def test_a_loss_that_is_not_finite_names_the_module_where_it_began(make_config):
    model = build(make_config())
    with torch.no_grad():
        model.backbone.net.blocks[3].mlp.fc2.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"backbone\.net\.blocks\.3\.mlp"):
        model.loss(*batch())
