"""A trained segmentor on disk: its weights, the header that it is built from, and checkpoints from elsewhere."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from backbones.training.state import Header, check_finite, load_model, read_header
from backbones.utils.digest import check_seal
from backbones.utils.errors import UserError

from .description import check_description

TASK = "segmentation"


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint of mmengine (.pth) or model.safetensors, as a dict with ``state_dict`` on the CPU.

    Raises:
        UserError: for a missing or broken file, and for one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist. Check the path.")
    if path.suffix == ".safetensors":
        return {"state_dict": load_model(path), "meta": {}}
    check_seal(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader raises errors of many kinds, with advice that is dangerous
        kind = type(error).__name__
        raise UserError(f"the checkpoint {path} is broken or holds more than tensors ({kind}).") from None
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
    check_finite(state, str(source))
    model.load_state_dict(state)


def header(cfg: Config, model: nn.Module, dataset_meta: dict[str, Any]) -> Header:
    """How a trained segmentor describes itself: with the configs of its model and of its test pipeline."""
    settings = Config({"model": cfg.model, "test_pipeline": cfg.test_pipeline}).to_dict()
    # The weights that training started from need not exist any more.
    settings["model"]["backbone"]["weights"] = None
    preprocessor = cfg.model.data_preprocessor
    transform = {
        "mean": [value / 255 for value in preprocessor.mean],
        "std": [value / 255 for value in preprocessor.std],
        "size": next((list(step.scale) for step in cfg.test_pipeline if "scale" in step), None),  # longest, shortest
        "interpolation": "bilinear",
        "channels": "RGB",
    }
    backbone = model.backbone.net.config.to_dict()
    extra = {"palette": dataset_meta["palette"]}
    return Header(TASK, backbone, settings, list(dataset_meta["classes"]), transform, extra)


def load_description(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """The model's config and data set description from the header that ``header`` made."""
    found = read_header(path, TASK)
    if isinstance(found, Header):
        description, meta = found.settings, {"classes": found.classes, **found.extra}
    elif found.get("task") == TASK:  # from before headers were one
        description, meta = found.get("config"), found.get("dataset_meta")
    else:
        raise UserError(f"{path} was not written by tools/train_seg.py; it holds no description of a segmentor.")
    check_description(description, meta, path)
    for step in description["test_pipeline"]:
        if isinstance(step.get("scale"), list):
            step["scale"] = tuple(step["scale"])  # JSON has no tuples, and mmcv takes no list
    return Config(description), meta
