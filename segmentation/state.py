"""Checkpoints and weights of a segmentation run: written whole, read without unpickling objects."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from backbones.checkpoint import read_metadata
from backbones.utils.errors import UserError
from backbones.utils.files import atomic_path, save_weights

from .description import check_description

LAST = "last_checkpoint"  # mmengine's: holds the path of the newest checkpoint


def save_whole(save: Callable[[str], None], folder: str | Path, name: str) -> None:
    """Calls ``save`` with a temporary file name in ``folder`` and renames the result to ``name``."""
    with atomic_path(Path(folder) / name) as temporary:
        save(temporary.name)


def find_last(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run, wherever its folder was moved; None without one."""
    pointer = Path(folder) / LAST
    if not pointer.is_file():
        return None
    path = Path(folder) / Path(pointer.read_text(encoding="utf-8").strip()).name
    if not path.is_file():
        raise UserError(f"{pointer} names {path.name}, which is not in {folder}. Train again without --resume.")
    return path


def forget_last(folder: str | Path) -> None:
    """Makes a new run in ``folder`` the one that --resume will continue."""
    (Path(folder) / LAST).unlink(missing_ok=True)


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of mmengine (.pth) or model.safetensors, as a dict with ``state_dict`` on the CPU.

    Raises:
        UserError: for a missing or broken file, and for one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist. Check the path.")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {"state_dict": load_file(path), "meta": {}}
        except SafetensorError as error:
            raise UserError(f"the checkpoint {path} is not a valid safetensors file ({error}).") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the checkpoint {path} is broken or holds more than tensors ({reason}).") from None
    if not isinstance(state, dict) or "state_dict" not in state:
        raise UserError(f"the checkpoint {path} has no 'state_dict'. Give one written by tools/train_seg.py.")
    return state


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads every tensor; raises UserError naming the first that is missing, unknown or of another shape."""
    own = model.state_dict()
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    problems = [f"{n} is {tuple(state[n].shape)} in the file and {tuple(own[n].shape)} in the model" for n in shapes]
    problems += [f"{n} is missing in the file" for n in own if n not in state]
    problems += [f"{n} is not in the model" for n in state if n not in own]
    if problems:
        raise UserError(
            f"{source} holds another model: {problems[0]} ({len(problems)} of {len(own)} tensors differ). Use the "
            "config and size it was trained with; a classification checkpoint goes to model.backbone.weights."
        )
    model.load_state_dict(state)


def save_model(path: str | Path, model: nn.Module, cfg: Config, dataset_meta: dict[str, Any]) -> None:
    """Writes the weights, with what ``load_description`` needs to build the model in the file's metadata."""
    description = Config({"model": cfg.model, "test_pipeline": cfg.test_pipeline}).to_dict()
    # The weights that training started from need not exist any more.
    description["model"]["backbone"]["weights"] = None
    meta = {key: dataset_meta[key] for key in ("classes", "palette")}
    save_weights(path, model.state_dict(), {"task": "segmentation", "config": description, "dataset_meta": meta})


def load_description(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """The model's config and data set description from the metadata of ``save_model``."""
    metadata = read_metadata(path)
    if metadata.get("task") != "segmentation":
        raise UserError(f"{path} was not written by tools/train_seg.py; it holds no description of a segmentor.")
    description, meta = metadata.get("config"), metadata.get("dataset_meta")
    check_description(description, meta, path)
    for step in description["test_pipeline"]:
        if isinstance(step.get("scale"), list):
            step["scale"] = tuple(step["scale"])  # JSON has no tuples, and mmcv takes no list
    return Config(description), meta
