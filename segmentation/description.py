"""What a segmentor's file may say of the model it holds: listed types with listed arguments, and plain values.

mmengine's registries import any dotted ``type``, so what a file names is checked here before anything is built of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmseg.registry import MODELS
from torch import nn

from backbones.config import BackboneConfig
from backbones.header import check_fits
from backbones.layer_config import AttentionConfig, FfnConfig
from backbones.models.presets import preset_config
from backbones.utils.errors import UserError, check_choice, check_keys, check_name, shown

from .transforms import MAX_CLASSES

# Of an argument: None, a plain value; a tuple, the types that may stand there; a mapping, its keys.
_NORM = ("SyncBN", "BN", "BN2d", "GN", "LN2d")
_BATCH_NORM = dict.fromkeys(("requires_grad", "eps", "momentum", "affine", "track_running_stats"))
_HEADS = ("UPerHead", "FCNHead")
_HEAD = {
    **dict.fromkeys(("in_channels", "in_index", "input_transform", "channels", "num_classes", "out_channels")),
    **dict.fromkeys(("threshold", "dropout_ratio", "ignore_index", "align_corners")),
    "norm_cfg": _NORM,
    "act_cfg": ("ReLU", "GELU"),
    "loss_decode": ("CrossEntropyLoss",),
}
_SIZES = dict.fromkeys(("size", "size_divisor"))
_BACKBONE = [f.name for f in fields(BackboneConfig) if f.name not in ("num_classes", "final_norm", "attention", "ffn")]
_TYPES: dict[str, dict[str, Any]] = {
    "CheckedEncoderDecoder": {
        "data_preprocessor": ("SegDataPreProcessor",),
        "backbone": ("KarvisBackbone",),
        "neck": ("Feature2Pyramid",),
        "decode_head": _HEADS,
        "auxiliary_head": _HEADS,
        "train_cfg": {},
        "test_cfg": dict.fromkeys(("mode", "crop_size", "stride")),
    },
    "SegDataPreProcessor": {
        **dict.fromkeys(("mean", "std", "bgr_to_rgb", "rgb_to_bgr", "pad_val", "seg_pad_val")),
        **_SIZES,
        "test_cfg": _SIZES,
    },
    "KarvisBackbone": {
        **dict.fromkeys(_BACKBONE),
        "attention": dict.fromkeys(f.name for f in fields(AttentionConfig)),
        "ffn": dict.fromkeys(f.name for f in fields(FfnConfig)),
    },
    "Feature2Pyramid": {"embed_dim": None, "rescales": None, "norm_cfg": _NORM},
    "UPerHead": {**_HEAD, "pool_scales": None},
    "FCNHead": {**_HEAD, **dict.fromkeys(("num_convs", "kernel_size", "concat_input", "dilation"))},
    "CrossEntropyLoss": dict.fromkeys(
        ("use_sigmoid", "use_mask", "reduction", "class_weight", "loss_weight", "loss_name", "avg_non_ignore")
    ),
    "SyncBN": _BATCH_NORM,
    "BN": _BATCH_NORM,
    "BN2d": _BATCH_NORM,
    "GN": dict.fromkeys(("num_groups", "requires_grad", "eps", "affine")),
    "LN2d": dict.fromkeys(("requires_grad", "eps")),
    "ReLU": {"inplace": None},
    "GELU": {},
    "LoadCheckedImage": dict.fromkeys(("to_float32", "color_type", "max_pixels")),
    "Resize": dict.fromkeys(("scale", "scale_factor", "keep_ratio", "interpolation")),
    "PackSegInputs": {"meta_keys": None},
}
_PIPELINE = ("LoadCheckedImage", "Resize", "PackSegInputs")
_REQUIRED = {
    "CheckedEncoderDecoder": ("backbone", "decode_head", "data_preprocessor", "test_cfg"),
    "KarvisBackbone": ("arch",),
    "Feature2Pyramid": ("embed_dim",),
    "UPerHead": ("in_channels", "channels", "num_classes"),
    "FCNHead": ("in_channels", "channels", "num_classes"),
}
# Largest sizes; every other integer is below 2^24.
_LIMITS = {
    "max_pixels": 2**40,
    **{"channels": 4096, "in_channels": 2**14, "embed_dim": 2**14, "num_classes": MAX_CLASSES, "out_channels": 4096},
    **{"num_convs": 64, "kernel_size": 31, "dilation": 64, "pool_scales": 64, "rescales": 16, "in_index": 1000},
}
_LONGEST = 1024  # items of a list, characters of a word


def check_description(config: Any, meta: Any, path: str | Path) -> None:
    """Raises UserError unless ``config`` and ``meta`` describe a segmentor of listed types.

    Args:
        config: ``{"model": ..., "test_pipeline": [...]}``, as ``segmentation.state.save_model`` writes it.
        meta: ``{"classes": [...], "palette": [...]}``.
        path: the file, for messages.
    """
    where = f"the description in {path}"
    _keys(config, ("model", "test_pipeline"), where)
    _typed(config.get("model"), ("CheckedEncoderDecoder",), f"{where}: model")
    steps = config.get("test_pipeline")
    if not isinstance(steps, list) or not 1 <= len(steps) <= len(_PIPELINE):
        raise UserError(f"{where}: test_pipeline is {shown(steps)}; it must be a list of {', '.join(_PIPELINE)}.")
    for number, step in enumerate(steps):
        _typed(step, _PIPELINE, f"{where}: test_pipeline.{number}")
    if config["model"]["backbone"].get("weights") is not None:
        raise UserError(f"{where}: model.backbone.weights names another file, which is not opened. It must be null.")
    backbone = {k: v for k, v in config["model"]["backbone"].items() if k not in ("type", "arch") and v is not None}
    arch = config["model"]["backbone"]["arch"]
    check_fits(preset_config(arch).merged({**backbone, "num_classes": 0, "final_norm": False}), path)
    _check_windows(config["model"]["test_cfg"], f"{where}: model.test_cfg")
    _check_meta(meta, config["model"]["decode_head"]["num_classes"], where)


def build_segmentor(config: Mapping[str, Any], path: str | Path) -> nn.Module:
    """The network of a checked description; raises UserError when its values do not fit together."""
    try:
        return MODELS.build(config["model"])
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        reason = shown(str(error))
        raise UserError(
            f"the description in {path} gives no model ({reason}). Train again, or copy it again."
        ) from None


def _typed(value: Any, types: Sequence[str], where: str) -> None:
    """A mapping whose ``type`` is one of ``types``, with no other arguments than those listed for it."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {shown(value)}; it must be a section with a type: {' or '.join(types)}.")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in types:
        raise UserError(
            f"{where}.type is {shown(kind)}; allowed: {', '.join(types)}. Nothing else is built from a file. If it "
            "is one of yours, build the model from its config and load the weights with load_from."
        )
    arguments = _TYPES[kind]
    _section({k: v for k, v in value.items() if k != "type"}, arguments, where)
    missing = [key for key in _REQUIRED.get(kind, ()) if value.get(key) is None]
    if missing:
        raise UserError(f"{where} has no {missing[0]}. The file is incomplete; train again, or copy it again.")


def _section(value: Any, arguments: Mapping[str, Any], where: str) -> None:
    _keys(value, arguments, where)
    for key, inner in value.items():
        allowed = arguments[key]
        if inner is None:
            continue
        if isinstance(allowed, tuple):
            _typed(inner, allowed, f"{where}.{key}")
        elif allowed is not None:
            _section(inner, allowed, f"{where}.{key}")
        else:
            _plain(inner, _LIMITS.get(key, 2**24), f"{where}.{key}")


def _keys(value: Any, allowed: Iterable[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {shown(value)}; it must be a section with keys.")
    check_keys(where, value, allowed)


def _plain(value: Any, limit: int, where: str) -> None:
    """A bool, a short word, a number of at most ``limit``, or a list of these."""
    if isinstance(value, list | tuple):
        if len(value) > _LONGEST or any(isinstance(v, list | tuple) for v in value):
            raise UserError(f"{where} is {shown(value)}; it must be a list of at most {_LONGEST} plain values.")
        for item in value:
            _plain(item, limit, where)
    elif isinstance(value, bool) or (isinstance(value, str) and len(value) <= _LONGEST):
        return
    elif not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > limit:
        raise UserError(f"{where} is {shown(value)}; it must be a word, true, false or a number of at most {limit}.")


def _check_windows(test: Mapping[str, Any], where: str) -> None:
    check_choice(f"{where}.mode", test.get("mode"), ("slide", "whole"))
    for key in ("crop_size", "stride") if test["mode"] == "slide" else ():
        if not _is_list(test.get(key), lambda side: isinstance(side, int) and side > 0) or len(test[key]) != 2:
            raise UserError(f"{where}.{key} is {shown(test.get(key))}; it must be two positive numbers of pixels.")


def _check_meta(meta: Any, num_classes: Any, where: str) -> None:
    _keys(meta, ("classes", "palette"), f"{where}: dataset_meta")
    classes, palette = meta.get("classes"), meta.get("palette")
    if not _is_list(classes, lambda name: isinstance(name, str)) or len(classes) != num_classes:
        raise UserError(f"{where}: classes is {shown(classes)}; it must be a list of {shown(num_classes)} names.")
    for name in classes:
        check_name(f"{where}: a class", name)
    if palette is not None and not _is_list(palette, _is_colour):
        raise UserError(f"{where}: palette is {shown(palette)}; it must be a list of [r, g, b], each 0 to 255.")


def _is_colour(value: Any) -> bool:
    return _is_list(value, lambda part: isinstance(part, int) and 0 <= part <= 255) and len(value) == 3


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _LONGEST and all(holds(item) for item in value)
