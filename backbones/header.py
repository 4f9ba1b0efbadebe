"""What the header of a safetensors file says: JSON by key, bounded, and of the types that this project writes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import BackboneConfig
from .utils.documents import parse_json
from .utils.errors import UserError, check_name, shown

_MAPPINGS = ("backbone", "backbone_config", "config", "dataset_meta", "detection_config", "extra", "settings")


def parse_header(raw: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The values of a header; text that is not JSON, of another program, stays text.

    Raises:
        UserError: for JSON past the limits of ``parse_json``, and a key of this project with another type.
    """
    values = {key: _value(text, f"{path}: {shown(key)} in its header") for key, text in raw.items()}
    for key in (*_MAPPINGS, "transform"):
        _check(values, key, isinstance(values.get(key), Mapping), "a mapping", path)
    _check(values, "task", isinstance(values.get("task"), str), "a name", path)
    _check(values, "classes", _all(values.get("classes"), lambda v: isinstance(v, str)), "a list of names", path)
    for name in values.get("classes") or []:
        check_name(f"{path}: a class in its header", name)
    transform = values["transform"] if isinstance(values.get("transform"), Mapping) else values
    for key in ("mean", "std"):
        numbers = transform.get(key)
        valid = _all(numbers, lambda v: type(v) in (int, float) and math.isfinite(v)) and len(numbers) == 3
        _check(transform, key, valid, "three finite numbers", path)
    extra = values.get("extra") or {}
    for key, holder in (("category_ids", extra), ("categories", values)):
        items = holder.get(key)
        ids = items if key == "category_ids" else [v[0] if _all(v, lambda _: True) and v else v for v in items or []]
        _check(holder, key, isinstance(items, list) and _all(ids, lambda v: type(v) is int), "whole numbers", path)
    for key in ("backbone", "backbone_config", "config"):
        _check_size(values.get(key), path)
    for key in ("settings", "detection_config"):
        model = (values.get(key) or {}).get("MODEL")
        _check_size(model.get("VIT") if isinstance(model, Mapping) else None, path)
    return values


def _check_size(backbone: Any, path: str | Path) -> None:
    """Raises UserError when the file is too small for the projections of the blocks that it describes."""
    if not isinstance(backbone, Mapping):
        return
    width, depth = (v if type(v) is int and v > 0 else 1 for v in (backbone.get("embed_dim"), backbone.get("depth")))
    if width > 1 and depth * width**2 > Path(path).stat().st_size:
        raise UserError(
            f"{path} describes a backbone of width {shown(width)} and depth {shown(depth)}, and is too small to hold "
            "it. Its header is damaged: copy the file again."
        )


def check_fits(config: BackboneConfig, path: str | Path) -> None:
    """Raises UserError when the file is too small to hold a backbone of ``config``, before memory is taken for it."""
    if config.least_parameters > Path(path).stat().st_size:
        raise UserError(
            f"{path} describes a backbone of over {config.least_parameters / 1e6:.0f}M parameters and is too small to "
            "hold them. Its header is damaged: copy the file again."
        )


def _value(text: str, where: str) -> Any:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError):
        pass  # parse_json says what is wrong
    return parse_json(text, where)


def _all(value: Any, is_valid: Any) -> bool:
    return isinstance(value, list) and all(is_valid(v) for v in value)


def _check(values: Mapping[str, Any], key: str, valid: bool, what: str, path: str | Path) -> None:
    if values.get(key) is not None and not valid:
        raise UserError(
            f"{path}: {key} in its header is {shown(values[key])}; it must be {what}. The header is damaged or another "
            "program's: copy the file again, or give another."
        )
