"""ConViT behind a neck and Swin's own stages in MMSegmentation: maps, heads, gradients, learning rates, a whole run."""

from functools import partial

import numpy as np
import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import PixelData
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.structures import SegDataSample
from PIL import Image

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.training.measure import images_per_second
from backbones.utils.errors import UserError
from segmentation import engine
from segmentation.backbone import KarvisBackbone
from segmentation.config import CONFIG_FOLDER, load_config
from segmentation.engine import predict, train

CONVIT, SWIN = ("convit", "karat_convit"), ("swin", "karat_swin")


def build(cfg):
    return revert_sync_batchnorm(MODELS.build(cfg.model))


@pytest.mark.parametrize("name", SWIN)
def test_stages_cover_an_image_that_is_no_multiple_of_their_strides(name):
    net = KarvisBackbone(f"{name}_nano_patch2_window4_64", out_indices=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = net(torch.randn(1, 3, 51, 65))
    assert [tuple(m.shape) for m in maps] == [(1, 24, 26, 33), (1, 48, 13, 17), (1, 96, 7, 9), (1, 192, 4, 5)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize(
    ("name", "size", "widths", "indices"),
    [
        *((name, "nano", [96] * 4, [0, 2, 3, 5]) for name in CONVIT),
        *((name, None, [192] * 4, [2, 5, 8, 11]) for name in CONVIT),
        *((name, "nano", [24, 48, 96, 192], [0, 1, 2, 3]) for name in SWIN),
        *((name, None, [96, 192, 384, 768], [0, 1, 2, 3]) for name in SWIN),
    ],
)
def test_heads_take_the_widths_of_the_maps(name, size, widths, indices, ade_layout):
    cfg = load_config(CONFIG_FOLDER / f"upernet_{name}.py", size, {"data_root": str(ade_layout)})
    assert cfg.model.decode_head.in_channels == widths
    assert cfg.model.auxiliary_head.in_channels == widths[2]
    assert cfg.model.backbone.out_indices == indices
    assert (cfg.model.neck is None) == (name in SWIN)
    model = build(cfg).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, 75, 90), mode="tensor")
    assert logits.shape[1] == 11


@pytest.mark.parametrize("name", [*CONVIT, *SWIN])
def test_a_size_that_the_family_lacks_is_named(name, ade_layout):
    with pytest.raises(UserError, match=r"size of \w+ 'base'; allowed: nano, tiny"):
        load_config(CONFIG_FOLDER / f"upernet_{name}.py", "base", {"data_root": str(ade_layout)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.backbone.out_indices": [1, 2, 3]}, r"3 maps; model\.decode_head\.in_index has 4"),
        ({"model.backbone.global_blocks": [1]}, "a Swin Transformer allows"),
        ({"model.backbone.class_token": True}, "class_token is True"),
        ({"crop_size": 63}, "patch size 2"),
    ],
)
def test_settings_that_do_not_fit_a_swin_are_named(make_config, options, message):
    with pytest.raises(UserError, match=message):
        make_config("karat_swin", options=options)


@pytest.mark.parametrize("name", [CONVIT[1], SWIN[1]])
def test_every_parameter_learns_under_bf16(make_config, name):
    model = build(make_config(name, options={"model.backbone.drop_path": 0.0}))
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 11, (1, 64, 64))), metainfo={"img_shape": (64, 64)})
        for _ in range(2)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        images = torch.randn(2, 3, 64, 64)
        assert model.decode_head(model.extract_feat(images)).dtype == torch.bfloat16
        losses = model.loss(images, samples)
    losses = {k: v for k, v in losses.items() if "loss" in k}
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_a_swins_relative_positions_are_not_decayed_and_layers_slow_down(make_config):
    cfg = make_config("swin")
    model = build(cfg)
    for name in ("constructor", "paramwise_cfg"):  # mmengine takes them out before it calls the constructor
        cfg.optim_wrapper.pop(name)
    paramwise = {"layer_decay": 0.5}
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {"type": "KarvisOptimWrapperConstructor", "optim_wrapper_cfg": cfg.optim_wrapper, "paramwise_cfg": paramwise}
    )
    of = {id(p): group for group in constructor(model).optimizer.param_groups for p in group["params"]}
    lr, named = cfg.optim_wrapper.optimizer.lr, dict(model.backbone.net.named_parameters())
    tables = [p for n, p in named.items() if n.endswith("relative_position_bias_table")]
    assert len(tables) == 8
    assert {of[id(p)]["weight_decay"] for p in tables} == {0}
    for name, power in {  # eight blocks, two in each stage
        "patch_embed.proj.weight": 9,
        "layers.0.blocks.1.mlp.fc1.weight": 7,
        "layers.3.downsample.reduction.weight": 2,
        "layers.3.blocks.1.attn.qkv.weight": 1,
        "out_norms.3.weight": 0,
    }.items():
        assert of[id(named[name])]["lr"] == pytest.approx(lr * 0.5**power), name
    assert len(of) == len(list(model.parameters()))


def test_a_swin_trains_from_a_classifier_and_predicts_at_any_size(build_config, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "images_per_second", partial(images_per_second, seconds=0.0))
    arch = "karat_swin_nano_patch2_window4_64"
    save_backbone(tmp_path / "cls.safetensors", create_backbone(arch, num_classes=8))
    options = {"model.backbone.weights": str(tmp_path / "cls.safetensors"), "schedule.max_iters": 2}
    metrics = train(build_config("karat_swin", tmp_path / "run", options))
    assert 0 <= metrics["miou"] <= 100
    Image.new("RGB", (101, 75)).save(tmp_path / "odd.png")
    (prediction,) = predict(tmp_path / "run", [tmp_path / "odd.png"])
    assert prediction.shape == (75, 101)
    assert set(np.unique(prediction)) <= set(range(1, 12))
