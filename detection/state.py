"""A trained detector on disk: its weights, and the header that it is built from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from backbones.checkpoint import closed_gates
from backbones.header import check_fits
from backbones.training.folder import WEIGHTS
from backbones.training.state import Header, check_finite, load_model, read_header
from backbones.utils.errors import UserError

from .backbone import backbone_config, find_trunk
from .config import get_config, merge, resolve

TASK = "detection"


def config_values(cfg: CfgNode) -> dict[str, Any]:
    """A config as plain values."""
    return yaml.safe_load(cfg.dump())


def header(cfg: CfgNode, model: nn.Module, categories: Sequence[tuple[int, str]]) -> Header:
    """How a trained detector describes itself."""
    transform = {
        "mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        "std": [value / 255 for value in cfg.MODEL.PIXEL_STD],
        "size": [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST],  # of the shortest side, at most of the longest
        "interpolation": "bilinear",
        "channels": cfg.INPUT.FORMAT,
    }
    ids, names = zip(*categories, strict=True)
    backbone = find_trunk(model)[1].config.to_dict()
    return Header(TASK, backbone, config_values(cfg), list(names), transform, {"category_ids": list(ids)})


def load_trained(run: str | Path, device: str | None = None) -> tuple[nn.Module, CfgNode, list[tuple[int, str]]]:
    """Builds the detector of a finished run.

    Args:
        run: output folder, or its model.safetensors.
        device: where to put it; None = the GPU if there is one.
    Returns:
        The model in eval mode, its config, and its categories as (id, name).
    """
    path = Path(run) / WEIGHTS if Path(run).is_dir() else Path(run)
    found = read_header(path, TASK)
    if isinstance(found, Header):
        ids = found.extra.get("category_ids") or []
        if len(ids) != len(found.classes):
            raise UserError(f"{path}: its header has {len(found.classes)} classes and {len(ids)} category_ids.")
        settings, categories = found.settings, zip(ids, found.classes, strict=True)
    elif "detection_config" in found:  # from before headers were one
        settings, categories = found["detection_config"], found["categories"]
    else:
        raise UserError(f"{path} holds no detector of this project (its header has no config). Give another file.")
    cfg = get_config()
    merge(cfg, settings, str(path))
    cfg.MODEL.VIT.weights, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = None, "", device
    resolve(cfg)
    check_fits(backbone_config(cfg), path)
    model = build_model(cfg)
    load_detector(model, path)
    return model.eval(), cfg, [(int(i), name) for i, name in categories]


def load_detector(model: nn.Module, path: str | Path, strict: bool = True) -> None:
    """Fills a whole detector from safetensors or a tensors-only .pth.

    Args:
        strict: every tensor must match; otherwise those of the heads that have another shape (other classes), and KArAt
            beside a softmax where the weights have none, keep their start, and are named.
    """
    state, target = _read(Path(path)), model.state_dict()
    fits = {name: t for name, t in state.items() if name in target and t.shape == target[name].shape}
    missing = [name for name in target if name not in fits]
    kept = {} if strict else closed_gates(state, target, str(path))
    needed = missing if strict else [n for n in missing if n.startswith("backbone.") and n not in kept]
    if needed:
        more = f" and {len(needed) - 3} more" if len(needed) > 3 else ""
        raise UserError(
            f"{path} fills {len(fits)} of this detector's {len(target)} tensors; without a match: "
            f"{', '.join(needed[:3])}{more}. Use the config and the classes that it was trained with."
        )
    model.load_state_dict(fits, strict=False)
    if missing:
        print(f"{path}: {len(fits)} of {len(target)} tensors; left at their start: {', '.join(missing)}")


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"MODEL.WEIGHTS: {path} does not exist. Check the path.")
    if path.suffix == ".safetensors":
        return load_model(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises errors of many kinds, with advice that is dangerous
        kind = type(error).__name__
        raise UserError(f"cannot read {path} ({kind}). Give safetensors, or a .pth with tensors only.") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    check_finite(tensors, str(path))
    return tensors
