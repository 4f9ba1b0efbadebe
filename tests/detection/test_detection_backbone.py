"""Does Detectron2 get the maps it asks for, at any image size and for either patch size?"""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from tiny_detector import CONFIGS

from detection.config import load_config

SMALL = ["MODEL.VIT.depth", "2", "MODEL.VIT.global_blocks", "[1]", "MODEL.DEVICE", "cpu"]


def pyramid(family: str, size: str, *overrides: str):
    cfg = load_config(CONFIGS / f"vitdet_{family}.yaml", size, [*SMALL, *overrides])
    return cfg, build_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize("family", ["softmax", "karkat"])
@pytest.mark.parametrize(("size", "pixels"), [("nano", 128), ("tiny", 256)])
def test_maps_have_the_strides_and_channels_they_are_announced_with(family, size, pixels):
    cfg, backbone = pyramid(family, size, "INPUT.IMAGE_SIZE", str(pixels))
    maps = backbone(torch.rand(2, 3, pixels, pixels))
    shapes = backbone.output_shape()
    assert list(maps) == list(shapes) == cfg.MODEL.RPN.IN_FEATURES
    for name, value in maps.items():
        side = pixels // shapes[name].stride
        assert value.shape == (2, cfg.MODEL.SFP.OUT_CHANNELS, side, side), name
    assert min(s.stride for s in shapes.values()) == 4


@pytest.mark.parametrize(("height", "width"), [(64, 128), (96, 48), (208, 128)])
def test_maps_of_an_image_that_is_not_square(height, width):
    _, backbone = pyramid("karat", "nano", "MODEL.SFP.SQUARE_PAD", "0")
    maps = backbone(torch.rand(1, 3, height, width))
    assert maps["p3"].shape[-2:] == (height // 8, width // 8)


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_unpadded_images_of_any_size_are_detected_on(size):
    overrides = [*SMALL, "MODEL.SFP.SQUARE_PAD", "0"]
    overrides += ["INPUT.IMAGE_SIZE", "128", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = load_config(CONFIGS / "vitdet_karat.yaml", size, overrides)
    model = build_model(cfg).eval()
    images = [torch.rand(3, 75, 101), torch.rand(3, 33, 17)]
    with torch.no_grad():
        padded = model.preprocess_image([{"image": image} for image in images])
        found = model([{"image": image, "height": 150, "width": 202} for image in images])
    assert padded.tensor.shape[-1] % model.backbone.size_divisibility == 0
    assert all(x["instances"].image_size == (150, 202) for x in found)


def test_images_are_padded_to_the_square_that_windows_were_made_for():
    overrides = [*SMALL, "INPUT.IMAGE_SIZE", "224", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    model = build_model(load_config(CONFIGS / "vitdet_softmax.yaml", "tiny", overrides))
    padded = model.preprocess_image([{"image": torch.rand(3, 100, 50)}])
    assert padded.tensor.shape == (1, 3, 224, 224)
    assert padded.image_sizes == [(100, 50)]


def test_every_parameter_of_the_detector_learns(tiny):
    from detectron2.utils.events import EventStorage

    from detection.engine import prepare, train_step

    run = prepare(tiny(family="karkat"), resume=False)
    run.network.train()
    with EventStorage(0):
        train_step(run, next(iter(run.batches())), 1e-4)
    without = [name for name, p in run.model.named_parameters() if p.grad is None]
    assert without == []
