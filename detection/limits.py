"""How large a detection config's values may be, and which of Detectron2's classes it may name."""

import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from backbones.utils.errors import UserError, check_choice, shown

_LARGEST = 10**9
_LENGTH = 1024
_LIMITS = {  # by the last part of a key
    **dict.fromkeys(("NUM_FC", "NUM_CONV", "NUM_CONVS"), 64),
    **dict.fromkeys(("FC_DIM", "CONV_DIM", "CONV_DIMS", "OUT_CHANNELS"), 2**14),
    **dict.fromkeys(("IMAGE_SIZE", "SQUARE_PAD", "MIN_SIZE_TEST", "MAX_SIZE_TEST"), 2**16),
    **dict.fromkeys(("NUM_CLASSES", "DETECTIONS_PER_IMAGE"), 10**5),
    "POOLER_RESOLUTION": 256,
    "NUM_WORKERS": 1024,
    "MAX_PIXELS": 2**40,
    "SEED": 2**63 - 1,
}
_AT_LEAST_ONE = ("IMAGE_SIZE", "MIN_SIZE_TEST", "MAX_SIZE_TEST", "OUT_CHANNELS", "POOLER_RESOLUTION", "MAX_PIXELS")
_AT_LEAST_ZERO = ("SQUARE_PAD", "NUM_WORKERS", "SEED", "NUM_FC", "NUM_CONV", "NUM_CLASSES", "DETECTIONS_PER_IMAGE")
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
}
_OPTIONAL = ("MODEL.ROI_BOX_HEAD.NAME",)  # "" = none


def check_limits(node: CfgNode, prefix: str = "") -> None:
    """Raises UserError for a number that is not finite or out of range, a list too long, or a class that is not there.

    Args:
        node: a config or a section of one; MODEL.VIT is left to BackboneConfig.
    """
    for key, value in node.items():
        path = f"{prefix}{key}"
        if path == "MODEL.VIT":
            continue
        if isinstance(value, CfgNode):
            check_limits(value, f"{path}.")
        elif path in _REGISTRIES:
            if value or path not in _OPTIONAL:
                check_choice(path, value, [name for name, _ in _REGISTRIES[path]])
        elif key in _AT_LEAST_ONE or key in _AT_LEAST_ZERO:
            _check_integer(path, value, 1 if key in _AT_LEAST_ONE else 0, _LIMITS.get(key, _LARGEST))
        else:
            _check_numbers(path, value, _LIMITS.get(key, _LARGEST))


def check_lists(cfg: CfgNode) -> None:
    """Raises UserError for values that are None, or must be lists, of another kind."""
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        values = cfg.MODEL[key]
        numbers = len(values) == 3 and {type(v) for v in values} <= {int, float}
        if not numbers or (key == "PIXEL_STD" and min(values) <= 0):
            raise UserError(f"MODEL.{key} is {shown(values)}; it must be three numbers, of STD above 0.")
    for section, key in (("RPN", "IN_FEATURES"), ("ROI_HEADS", "IN_FEATURES"), ("ANCHOR_GENERATOR", "SIZES")):
        values = cfg.MODEL[section][key]
        if values is not None and not (isinstance(values, list | tuple) and values):
            raise UserError(f"MODEL.{section}.{key} is {shown(values)}; it must be a list.")


def _check_integer(path: str, value: Any, low: int, high: int) -> None:
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise UserError(f"{path} is {shown(value)}; it must be a whole number from {low} to {high}.")


def _check_numbers(path: str, value: Any, limit: int) -> None:
    if isinstance(value, list | tuple):
        if len(value) > _LENGTH:
            raise UserError(f"{path} has {len(value)} values; it may have {_LENGTH}.")
        for item in value:
            _check_numbers(path, item, limit)
    elif isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= limit):
        raise UserError(f"{path} is {shown(value)}; it must be finite and at most {limit}.")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{path} is {shown(value)}; it must have no NUL character.")
