"""What a detector leaves on disk: weights with their config, and the state that a run continues from."""

from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from backbones.checkpoint import closed_gates, read_metadata
from backbones.training.rng import random_state
from backbones.utils.errors import UserError
from backbones.utils.files import atomic_path, save_weights

from .backbone import find_trunk
from .config import get_config, merge, resolve

WEIGHTS, CHECKPOINT = "model.safetensors", "checkpoint.pth"
# Keys that may differ between a run and its continuation.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "DATASETS",
    "DATALOADER",
    "MODEL.DEVICE",
    "MODEL.VIT.weights",
    "MODEL.WEIGHTS",
    "SOLVER.LOG_STEPS",
    "SOLVER.LOG_OPERATORS",
)


def config_values(cfg: CfgNode) -> dict[str, Any]:
    """A config as plain values."""
    return yaml.safe_load(cfg.dump())


def save_model(folder: Path, model: nn.Module, cfg: CfgNode, categories: tuple[tuple[int, str], ...]) -> None:
    """Writes model.safetensors, which ``load_trained`` needs nothing else to build."""
    metadata = {"detection_config": config_values(cfg), "categories": categories}
    metadata["backbone_config"] = find_trunk(model)[1].config.to_dict()
    save_weights(folder / WEIGHTS, model.state_dict(), metadata)


def load_trained(run: str | Path, device: str | None = None) -> tuple[nn.Module, CfgNode, list[tuple[int, str]]]:
    """Builds the detector of a finished run.

    Args:
        run: output folder, or its model.safetensors.
        device: where to put it; None = the GPU if there is one.
    Returns:
        The model in eval mode, its config, and its categories as (id, name).
    """
    path = Path(run) / WEIGHTS if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Train first, or give the folder of a finished run.")
    metadata = read_metadata(path)
    if "detection_config" not in metadata:
        raise UserError(f"{path} holds no detector of this project (its header has no config). Give another file.")
    cfg = get_config()
    merge(cfg, metadata["detection_config"], str(path))
    cfg.MODEL.VIT.weights, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = None, "", device
    model = build_model(resolve(cfg))
    load_detector(model, path)
    return model.eval(), cfg, [(int(i), name) for i, name in metadata["categories"]]


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
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read {path} ({first}). Give safetensors, or a .pth with tensors only.") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    return {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Any, cfg: CfgNode, extra: dict) -> None:
    """Writes all that the next step depends on, whole or not at all; holds tensors and plain values only."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": cfg.dump(),
        "extra": extra,
        "random": random_state(),
    }
    with atomic_path(folder / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Any, cfg: CfgNode) -> dict[str, Any]:
    """Restores model and optimizer; returns the checkpoint: ``step``, ``extra``, and ``random``."""
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read {path} ({error}). Remove it to start over without --resume.") from None
    _check_same_config(yaml.safe_load(state["config"]), config_values(cfg), path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def _check_same_config(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    old, new = _flat(saved), _flat(now)
    changed = [k for k in {**old, **new} if old.get(k) != new.get(k) and not k.startswith(_FREE_KEYS)]
    if changed:
        key = changed[0]
        raise UserError(
            f"{path} was written with {key} {old.get(key)!r}; this run has {new.get(key)!r}"
            + (f" (and {len(changed) - 1} more differences)" if len(changed) > 1 else "")
            + ". Continue with the same settings, or start over without --resume."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
