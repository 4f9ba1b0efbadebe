"""Do ConViT under ViTDet's pyramid and Swin under FPN get their strides and learning rates, and are mistakes named?"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from safetensors.torch import load_file
from tiny_detector import CONFIGS, TINY_CONVIT, TINY_SWIN

from backbones import create_backbone
from backbones.checkpoint import save_backbone
from backbones.utils.errors import UserError
from detection import engine
from detection.backbone import find_trunk
from detection.config import load_config
from detection.engine import load_trained, prepare, train, train_step

CONVIT, SWIN = ("vitdet_convit", "vitdet_karat_convit"), ("fpn_swin", "fpn_karat_swin")


@pytest.fixture
def short(paths, tmp_path):
    """Makes the nano config ``name``, short enough to train within seconds."""

    def make(name: str, *overrides: str):
        tiny = TINY_SWIN if name in SWIN else TINY_CONVIT
        output = ["OUTPUT_DIR", str(tmp_path / "run")]
        return load_config(CONFIGS / f"{name}.yaml", "nano", [*paths, *tiny, *output, *overrides])

    return make


def load(name: str, size: str | None, *overrides: str):
    always = ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    return load_config(CONFIGS / f"{name}.yaml", size, [*always, *overrides])


@pytest.mark.parametrize(
    ("name", "size", "strides", "widths"),
    [
        *((name, "nano", [4, 8, 16, 32], [96]) for name in CONVIT),
        *((name, "tiny", [4, 8, 16, 32, 64], [192]) for name in CONVIT),
        *((name, "nano", [2, 4, 8, 16, 32], [24, 48, 96, 192]) for name in SWIN),
        *((name, "tiny", [4, 8, 16, 32, 64], [96, 192, 384, 768]) for name in SWIN),
    ],
)
def test_pyramid_has_the_strides_it_announces_on_maps_of_the_trunks_widths(name, size, strides, widths):
    cfg = load(name, size, "INPUT.IMAGE_SIZE", "64")
    backbone = build_model(cfg).backbone.eval()
    _, trunk = find_trunk(backbone)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 128))
        inner = trunk.forward_maps(torch.rand(1, 3, 64, 128))
    assert list(maps) == cfg.MODEL.RPN.IN_FEATURES == [f"p{s.bit_length() - 1}" for s in strides]
    assert [s.stride for s in backbone.output_shape().values()] == strides
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(max(1, 64 // s), 128 // s) for s in strides]
    assert {m.shape[1] for m in maps.values()} == {cfg.MODEL.SFP.OUT_CHANNELS}
    assert [m.shape[1] for m in inner] == widths
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(strides)
    assert list(maps)[:-1] == cfg.MODEL.ROI_HEADS.IN_FEATURES


@pytest.mark.parametrize("name", [*CONVIT, *SWIN])
def test_sizes_are_those_of_the_family(name):
    assert "_tiny_" in load(name, None).MODEL.VIT.arch
    assert load(name, "tiny").INPUT.IMAGE_SIZE == 512
    with pytest.raises(UserError, match=r"size of \w+ 'base'; allowed: nano, tiny"):
        load(name, "base")


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("fpn_swin", ["MODEL.SFP.SCALE_FACTORS", "[4.0, 2.0]"], "levels of its own, of strides 4, 8, 16, 32"),
        ("vitdet_convit", ["MODEL.SFP.SCALE_FACTORS", "4.0"], "must be a list"),
        ("fpn_swin", ["MODEL.VIT.out_indices", "[0, 2, 3]"], "stages that follow each other"),
        ("fpn_swin", ["MODEL.VIT.out_indices", "[4]"], "stages 0 to 3"),
        ("fpn_karat_swin", ["MODEL.VIT.global_blocks", "[1]"], "a Swin Transformer allows"),
        ("fpn_karat_swin", ["MODEL.VIT.class_token", "True"], "class_token is True"),
        ("fpn_swin", ["INPUT.IMAGE_SIZE", "1000"], "multiple of 32, such as 992"),
        ("vitdet_karat_convit", ["MODEL.VIT.gpsa_blocks", "2", "MODEL.VIT.attention.blocks", "[1]"], "local attention"),
    ],
)
def test_settings_that_do_not_fit_the_family_are_named(name, overrides, message):
    with pytest.raises(UserError, match=message):
        load(name, None, *overrides)


@pytest.mark.parametrize("name", [CONVIT[1], *SWIN])
def test_unpadded_images_of_any_size_are_detected_on(name):
    model = build_model(load(name, "nano", "MODEL.SFP.SQUARE_PAD", "0")).eval()
    images = [torch.rand(3, 75, 101), torch.rand(3, 33, 17)]
    with torch.no_grad():
        padded = model.preprocess_image([{"image": image} for image in images])
        found = model([{"image": image, "height": 150, "width": 202} for image in images])
    assert padded.tensor.shape[2:] == (80, 112)
    assert all(x["instances"].image_size == (150, 202) for x in found)


@pytest.mark.parametrize("name", [CONVIT[1], SWIN[1]])
def test_every_parameter_learns_under_bf16(short, monkeypatch, name):
    monkeypatch.setattr(engine, "_precision", lambda cfg: torch.autocast("cpu", torch.bfloat16))
    run = prepare(short(name), resume=False)
    types = []
    mlp = next(m for m in find_trunk(run.model)[1].modules() if type(m).__name__ == "Mlp")
    mlp.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    run.network.train()
    with EventStorage(0):
        losses, norm = train_step(run, next(iter(run.batches())), 1e-4)
    assert types == [torch.bfloat16]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert 0 < norm < float("inf")
    assert [n for n, p in run.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_learning_rate_follows_the_depth_of_a_swins_blocks(short):
    run = prepare(short("fpn_karat_swin"), resume=False)
    group_of = {id(p): g for g in run.optimizer.param_groups for p in g["params"]}
    named = dict(run.model.named_parameters())
    decay, prefix = run.cfg.SOLVER.LAYER_DECAY, "backbone.bottom_up.trunk."
    for name, power in {  # five blocks
        f"{prefix}patch_embed.proj.weight": 6,
        f"{prefix}layers.0.blocks.0.mlp.fc1.weight": 5,
        f"{prefix}layers.1.downsample.reduction.weight": 3,
        f"{prefix}layers.3.blocks.0.attn.qkv.weight": 1,
        f"{prefix}out_norms.0.weight": 0,
        "backbone.fpn_lateral1.weight": 0,
    }.items():
        assert group_of[id(named[name])]["lr_scale"] == pytest.approx(decay**power), name
    undecayed = [n for n in named if "norm" in n or n.endswith("relative_position_bias_table")]
    assert len([n for n in undecayed if n.endswith("table")]) == 5
    assert {group_of[id(named[n])]["weight_decay"] for n in undecayed} == {0.0}
    assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(named)


def test_a_swin_trains_from_a_classifier_and_is_built_from_its_weights_alone(short, tmp_path, capsys):
    classifier = create_backbone("karat_swin_nano_patch2_window4_64", num_classes=5, stage_depths=(2, 1, 1, 1))
    save_backbone(tmp_path / "classifier.safetensors", classifier)
    figures = train(short("fpn_karat_swin", "MODEL.VIT.weights", str(tmp_path / "classifier.safetensors")))
    assert 0 <= figures["box_ap"] <= 100
    assert figures["backbone_parameters"] < figures["parameters"]
    assert "out_norms" in capsys.readouterr().out
    model, _, _ = load_trained(tmp_path / "run", device="cpu")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
