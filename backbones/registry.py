"""``create_backbone``, the front door, and the same presets as timm models."""

import sys
from collections.abc import Mapping
from typing import Any

import timm.models

from .checkpoint import load_weights
from .config import BackboneConfig
from .models.presets import list_backbones, preset_config
from .models.swin import SwinTransformer
from .models.vit import VisionTransformer
from .utils.errors import UserError


def create_backbone(
    arch: str | BackboneConfig | Mapping[str, Any], **overrides: Any
) -> VisionTransformer | SwinTransformer:
    """Builds a backbone and loads its weights, if any are named.

    Args:
        arch: preset name (see ``list_backbones``), a BackboneConfig, or a dict of its fields with ``arch``.
        overrides: fields of BackboneConfig; ``attention`` and ``ffn`` dicts change single keys of the preset's.

    Raises:
        UserError: for unknown presets or keys (naming the nearest valid one), values out of range, and weights that
            do not fit.
    """
    if isinstance(arch, BackboneConfig):
        config = arch.merged(overrides)
    else:
        if isinstance(arch, Mapping):
            if "arch" not in arch:
                raise UserError(f"the backbone config needs the key 'arch', one of: {', '.join(list_backbones())}.")
            arch, overrides = arch["arch"], {**{k: v for k, v in arch.items() if k != "arch"}, **overrides}
        config = preset_config(arch).merged(overrides)
    network = (VisionTransformer if config.stage_depths is None else SwinTransformer)(config)
    if config.weights is not None:
        load_weights(network, config.weights, config.weights_min_match)
    return network


def register_with_timm() -> None:
    """Makes the presets available to ``timm.create_model``; names that timm owns stay timm's."""
    module = sys.modules[__name__]
    for name in list_backbones():
        if timm.is_model(name):
            continue
        entry = _timm_entry(name)
        setattr(module, name, entry)
        timm.models.register_model(entry)


def _timm_entry(name: str):
    def entry(pretrained: bool = False, **kwargs: Any) -> VisionTransformer | SwinTransformer:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(key, None)
        if pretrained:
            raise UserError(f"{name} has no published weights. Use weights=FILE, or weights=NAME of a timm ViT.")
        renamed = {"drop_path_rate": "drop_path", "proj_drop_rate": "drop_rate"}
        network = create_backbone(name, **{renamed.get(key, key): value for key, value in kwargs.items()})
        config = network.config
        network.pretrained_cfg = network.default_cfg = {
            "architecture": name,
            "input_size": (config.in_chans, *config.img_size),
            "num_classes": config.num_classes,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "classifier": "head" if config.stage_depths is None else "head.fc",
            "first_conv": "patch_embed.proj",
        }
        return network

    entry.__name__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"The preset {name} of Karvis; keywords are the fields of BackboneConfig."
    return entry
