"""What a run leaves on disk, in one form for all tasks: a checkpoint to continue from, and weights."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import check_finite, read_metadata, read_tensors
from ..utils.digest import check_seal, damaged, seal
from ..utils.errors import UserError
from ..utils.files import FORMAT, atomic_path, save_weights
from .log import versions
from .processes import world_size

_SHOWN = 5


@dataclass(frozen=True)
class Header:
    """What a model.safetensors says about itself; ``build`` of each task needs nothing else.

    Args:
        task: classification, detection or segmentation.
        backbone: a BackboneConfig as a dict.
        settings: the task's own: a recipe, a Detectron2 config, a segmentor's config.
        classes: names, in the order of the outputs.
        transform: how evaluation prepared its images: mean and std (of values from 0 to 1), size, interpolation,
            channels, and crop_pct where there is one.
        extra: what else the task needs, such as COCO's category ids or a palette.
        versions: of the packages that wrote it.
    """

    task: str
    backbone: dict[str, Any]
    settings: dict[str, Any]
    classes: list[str]
    transform: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)


def save_model(path: str | Path, state: Mapping[str, Tensor], header: Header) -> None:
    """Writes weights with their header; whole or not at all.

    Raises:
        UserError: when a tensor holds NaN or infinity: such weights are of no use to anyone.
    """
    check_finite(state, str(path))
    save_weights(path, dict(state), asdict(header))


def read_header(path: str | Path, task: str) -> Header | dict[str, Any]:
    """The header of a model.safetensors of ``task``; the raw metadata of a file from before headers were one.

    Raises:
        UserError: for no such file, one of another task, and one that says nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Train first, or give the folder of a finished run.")
    metadata = read_metadata(path)
    if not {"settings", "backbone"} & metadata.keys():
        return metadata
    found = metadata.get("task")
    if found != task:
        raise UserError(f"{path} is of the task {str(found)[:40]!r}; this needs one of {task!r}. Give another file.")
    known = {name: metadata.get(name) for name in Header.__dataclass_fields__}
    kinds = {"backbone": dict, "settings": dict, "classes": list, "transform": dict, "extra": dict, "versions": dict}
    for name, kind in kinds.items():
        if not isinstance(known[name], kind):
            raise UserError(f"{path}: its header has no valid {name!r}. Train again, or give another file.")
    return Header(**known)


def load_model(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a model.safetensors, checked against their digest and for finite numbers."""
    state = read_tensors(Path(path))
    check_finite(state, str(path))
    return state


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes all that the next step depends on, tensors and plain values, whole or not at all."""
    write_checkpoint(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))


def write_checkpoint(path: str | Path, save: Callable[[Path], None]) -> None:
    """Has ``save`` write a checkpoint under a temporary name, puts its digest behind it and names it ``path``."""
    with atomic_path(path) as temporary:
        save(temporary)
        seal(temporary)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint; nothing in it is unpickled but tensors and plain values.

    Raises:
        UserError: for one that is damaged, of another kind, or from before checkpoints had digests.
    """
    path = Path(path)
    try:
        sealed = check_seal(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError:
        raise
    except Exception as error:  # torch's reader raises errors of many kinds, with advice that is dangerous
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({kind}). Start over, or copy it again.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} was written by another version. Start a new run, with its weights if you like.")
    if not sealed:
        raise damaged(path)
    return state


@dataclass(frozen=True)
class Contract:
    """What a run and its continuation must share.

    Args:
        task: its name.
        settings: resolved, as nested dicts.
        data: number of training images, classes, and a digest of what they are.
        world: number of processes.
    """

    task: str
    settings: dict[str, Any]
    data: dict[str, Any]
    world: int = field(default_factory=world_size)

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "settings": plain(self.settings), "data": plain(self.data), "world": self.world}

    def check(self, saved: Mapping[str, Any], allowed: Sequence[str], path: Path) -> list[str]:
        """Compares with a checkpoint's; returns the allowed differences, as ``name old -> new``.

        Args:
            allowed: patterns of the settings that may differ, such as ``data.workers`` or ``model.weights``.

        Raises:
            UserError: naming the first difference that is not allowed.
        """
        now = self.to_dict()
        if saved.get("task") != self.task:
            raise UserError(f"{path} is a checkpoint of {saved.get('task')!r}, and this is {self.task!r}.")
        old, new = flat(saved["settings"]), flat(now["settings"])
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        refused = [n for n in changed if not any(fnmatch.fnmatchcase(n, pattern) for pattern in allowed)]
        differences = [(name, old.get(name), new.get(name)) for name in refused]
        for part in ("data", "world"):
            before, after = flat({part: saved[part]}), flat({part: now[part]})
            names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            differences += [(name, before.get(name), after.get(name)) for name in names]
        if differences:
            shown = ", ".join(f"{_named(n)} {_short(a)} (now {_short(b)})" for n, a, b in differences[:_SHOWN])
            more = f" (and {len(differences) - _SHOWN} more)" if len(differences) > _SHOWN else ""
            raise UserError(
                f"{path} was written with {shown}{more}. Continue with the same settings, data and number of "
                "processes, or start a new run in another folder."
            )
        return [f"{name} {_short(old.get(name))} -> {_short(new.get(name))}" for name in changed]


def check_length(path: Path, done: int, total: int, setting: str) -> None:
    """Raises UserError when a checkpoint is past the end of the run that continues it; ``setting`` says its length."""
    if done > total:
        raise UserError(f"{path} is at step {done}, past this run's last, {total}. Raise {setting}.")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts, and lists of dicts, as one dict with dotted names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return result


def plain(value: Any) -> Any:
    """Mappings, sequences and scalars as dicts, lists and what torch.load allows; the rest as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def _named(name: str) -> str:
    return {"world": "the number of processes"}.get(name, name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
