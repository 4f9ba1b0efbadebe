"""A Karvis backbone as a Detectron2 backbone: one feature map, and ViTDet's simple feature pyramid on it."""

from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from backbones import BackboneConfig, create_backbone
from backbones.models.presets import preset_config
from backbones.utils.errors import UserError

_FEATURE = "last_feat"
# What ViTDet leaves out: the classifier, the norm before it, and (a window has no place for it) the class token.
_FIXED = {"num_classes": 0, "final_norm": False}
_DEFAULTS = {"class_token": False}


def backbone_config(cfg: Any) -> BackboneConfig:
    """The backbone that MODEL.VIT describes: the preset ``arch`` with every key that is not None on top."""
    given = _without_none(cfg.MODEL.VIT)
    arch = given.pop("arch", None)
    if arch is None:
        raise UserError("MODEL.VIT.arch is not set. Name a preset, such as karat_base_patch16_224.")
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise UserError(f"MODEL.VIT.{name} is {given[name]!r}; detection needs {value!r}. Leave it out.")
    size = {"img_size": cfg.INPUT.IMAGE_SIZE}
    return preset_config(arch).merged({**_DEFAULTS, **size, "out_indices": None, **given, **_FIXED})


def _without_none(node: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _without_none(value) if isinstance(value, dict) else value for key, value in node.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}


class ViTTrunk(Backbone):
    """The last map that ``forward_maps`` gives, under the name and stride that the pyramid asks for."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self._out_features = [_FEATURE]
        self._out_feature_channels = {_FEATURE: trunk.embed_dim}
        self._out_feature_strides = {_FEATURE: trunk.patch_size}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) to {name: (B, C, H/p, W/p)}."""
        return {_FEATURE: self.trunk.forward_maps(x)[-1]}


class ViTDetBackbone(SimpleFeaturePyramid):
    """SimpleFeaturePyramid for any patch size: its padding covers whole patches, its top level follows its last."""

    def __init__(self, net: ViTTrunk, out_channels: int, scale_factors: list[float], norm: str, square_pad: int):
        top = LastLevelMaxPool()
        super().__init__(net, _FEATURE, out_channels, scale_factors, top, norm, square_pad)
        # Detectron2 names p5 here, the last level of patch 16 only.
        top.in_feature = self._out_features[-1 - top.num_levels]
        self._size_divisibility = max(self._size_divisibility, net.trunk.patch_size)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this. SimpleFeaturePyramid says so under a misspelt key only."""
        return self._size_divisibility


def pyramid_strides(patch_size: int, scale_factors: list[float]) -> dict[str, int]:
    """Stride in pixels of each pyramid level by its Detectron2 name, the max-pooled top level last."""
    strides = [int(patch_size / scale) for scale in scale_factors]
    strides.append(strides[-1] * 2)
    return {f"p{stride.bit_length() - 1}": stride for stride in strides}


@BACKBONE_REGISTRY.register()
def build_karvis_vitdet_backbone(cfg: Any, input_shape: ShapeSpec) -> ViTDetBackbone:
    """Builds MODEL.VIT under MODEL.SFP's pyramid; prints the match report when MODEL.VIT.weights is set."""
    trunk = create_backbone(backbone_config(cfg).merged({"in_chans": input_shape.channels}))
    sfp = cfg.MODEL.SFP
    return ViTDetBackbone(ViTTrunk(trunk), sfp.OUT_CHANNELS, sfp.SCALE_FACTORS, sfp.NORM, sfp.SQUARE_PAD)
