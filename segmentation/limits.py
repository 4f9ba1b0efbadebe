"""How large a segmentation config's values may be, checked before anything is derived from them."""

import math
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from backbones.utils.errors import UserError, shown

_DEEPEST = 64
_LARGEST = 10**9
_INTEGERS = {  # by dotted name: least and largest; None is left as it is
    "crop_size": (1, 2**14),
    "max_pixels": (1, 2**40),
    "log_interval": (1, _LARGEST),
    "schedule.max_iters": (1, _LARGEST),
    "schedule.reference_batch_size": (1, 2**20),
    "train_dataloader.batch_size": (1, 2**20),
    "val_dataloader.batch_size": (1, 2**20),
    "train_dataloader.num_workers": (0, 1024),
    "val_dataloader.num_workers": (0, 1024),
    "randomness.seed": (0, 2**63 - 1),
}
_NUMBERS = {
    "schedule.epochs": (1e-6, 1e6),
    "schedule.warmup_epochs": (0, 1e6),
    "schedule.val_epochs": (1e-6, 1e6),
    "class_balance": (0, 10),
    "optim_wrapper.optimizer.lr": (0, 1e6),
    "optim_wrapper.optimizer.weight_decay": (0, 1e6),
}


def check_limits(cfg: Config) -> None:
    """Raises UserError for a number that is not finite or out of range, and for settings nested too deeply."""
    _walk(cfg._cfg_dict, "", 0)
    for table, kinds, what in ((_INTEGERS, (int,), "a whole number"), (_NUMBERS, (int, float), "a number")):
        for name, (low, high) in table.items():
            value = _at(cfg, name)
            if value is not None and (type(value) not in kinds or not low <= value <= high):
                raise UserError(f"{name} is {shown(value)}; it must be {what} from {low} to {high}.")
    if not isinstance(cfg.get("data_root"), str) or "\0" in cfg.data_root:
        raise UserError(f"data_root is {shown(cfg.get('data_root'))}; it must be the path of a folder.")


def _at(cfg: Any, name: str) -> Any:
    for part in name.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping | Config) else None
    return cfg


def _walk(value: Any, name: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise UserError(f"{shown(name)} is nested more than {_DEEPEST} levels deep. Write it flat.")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _walk(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _walk(inner, name, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; numbers must be finite.")
    elif isinstance(value, int) and abs(value) > _INTEGERS.get(name, (0, 2**40))[1]:
        raise UserError(f"{name} is {shown(value)}; it is too large.")
