"""A Karvis backbone as a Detectron2 backbone: ViTDet's simple pyramid on a ViT's one map, FPN on a Swin's four."""

from itertools import pairwise
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from backbones import BackboneConfig, create_backbone
from backbones.models.presets import preset_config
from backbones.utils.errors import UserError

# What ViTDet leaves out: the classifier, the norm before it, and (a window has no place for it) the class token.
_FIXED = {"num_classes": 0, "final_norm": False}
_DEFAULTS = {"class_token": False}


def backbone_config(cfg: Any) -> BackboneConfig:
    """The backbone that MODEL.VIT describes: the preset ``arch`` with every key that is not None on top.

    Its maps are those the pyramid is made of: a ViT's last block, or every stage of a Swin Transformer.
    """
    given = _without_none(cfg.MODEL.VIT)
    arch = given.pop("arch", None)
    if arch is None:
        raise UserError("MODEL.VIT.arch is not set. Name a preset, such as karat_base_patch16_224.")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise UserError(f"MODEL.VIT.{name} is {given[name]!r}; detection needs {value!r}. Leave it out.")
    size = {"img_size": cfg.INPUT.IMAGE_SIZE}
    config = preset_config(arch).merged({**_DEFAULTS, **size, "out_indices": None, **given, **_FIXED})
    if config.stage_depths is not None and "out_indices" not in given:
        config = config.merged({"out_indices": range(config.num_outputs)})
    return config


def _without_none(node: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_none(value) if isinstance(value, dict) else value for key, value in node.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}


class Trunk(Backbone):
    """The maps that ``forward_maps`` gives, each under a name, with the channels and stride that a pyramid asks for."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self._out_features = [f"map{index}" for index in trunk.out_indices]
        self._out_feature_channels = dict(zip(self._out_features, trunk.widths, strict=True))
        self._out_feature_strides = dict(zip(self._out_features, trunk.strides, strict=True))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to {name: (B, width, H/stride, W/stride)}."""
        return dict(zip(self._out_features, self.trunk.forward_maps(x), strict=True))


def find_trunk(model: nn.Module) -> tuple[str, nn.Module]:
    """The Karvis backbone within a detector, after its name there, such as ``backbone.net.trunk``."""
    return next((f"{name}.trunk", module.trunk) for name, module in model.named_modules() if isinstance(module, Trunk))


class SimplePyramid(SimpleFeaturePyramid):
    """SimpleFeaturePyramid for any patch size: its padding covers whole patches."""

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this. SimpleFeaturePyramid says so under a misspelt key only."""
        return max(self._size_divisibility, self.net.trunk.patch_size)


def pyramid_strides(config: BackboneConfig, scale_factors: list[float] | None) -> dict[str, int]:
    """Stride in pixels of each pyramid level by its Detectron2 name, the max-pooled top level last.

    Args:
        scale_factors: levels of a ViT, relative to its map; None for a Swin Transformer, whose stages are the levels.

    Raises:
        UserError: for scale factors with a Swin Transformer, or without; for stages that do not follow each other.
    """
    if config.stage_depths is None:
        strides = [int(config.strides[-1] / scale) for scale in scale_factors]
    else:
        strides = list(config.strides)
        if scale_factors is not None:
            raise UserError(
                f"MODEL.SFP.SCALE_FACTORS is {scale_factors}; {config.arch} has levels of its own, of strides "
                f"{', '.join(map(str, strides))}. Leave it out, or set it to None."
            )
        if any(after != 2 * before for before, after in pairwise(strides)):
            raise UserError(
                f"MODEL.VIT.out_indices is {config.out_indices}; a pyramid needs stages that follow each other, such "
                "as [1, 2, 3]."
            )
    strides.append(strides[-1] * 2)
    return {f"p{stride.bit_length() - 1}": stride for stride in strides}


@BACKBONE_REGISTRY.register()
def build_karvis_vitdet_backbone(cfg: Any, input_shape: ShapeSpec) -> SimplePyramid | FPN:
    """Builds MODEL.VIT under MODEL.SFP's pyramid; prints the match report when MODEL.VIT.weights is set.

    A ViT's last map gets ViTDet's simple feature pyramid, a Swin Transformer's maps get FPN.
    """
    config = backbone_config(cfg).merged({"in_chans": input_shape.channels})
    net, sfp = Trunk(create_backbone(config)), cfg.MODEL.SFP
    maps = list(net.output_shape())
    top = LastLevelMaxPool()
    # Detectron2 names p5 here, the last level of stride 32 only.
    top.in_feature = list(pyramid_strides(config, sfp.SCALE_FACTORS))[-1 - top.num_levels]
    if config.stage_depths is not None:
        return FPN(net, maps, sfp.OUT_CHANNELS, sfp.NORM, top, square_pad=sfp.SQUARE_PAD)
    return SimplePyramid(net, maps[-1], sfp.OUT_CHANNELS, sfp.SCALE_FACTORS, top, sfp.NORM, sfp.SQUARE_PAD)
