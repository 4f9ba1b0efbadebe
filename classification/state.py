"""A trained classifier on disk: its weights, and the header that they are built from."""

from pathlib import Path

from torch import nn

from backbones import BackboneConfig, create_backbone
from backbones.checkpoint import load_weights
from backbones.header import check_fits
from backbones.training.folder import WEIGHTS
from backbones.training.state import Header, read_header
from backbones.utils.errors import UserError

from .config import Recipe

TASK = "classification"


def header(recipe: Recipe, network: nn.Module, classes: list[str]) -> Header:
    """How a trained classifier describes itself."""
    data = recipe.data
    transform = {
        "mean": data.mean,
        "std": data.std,
        "size": list(network.config.img_size),
        "crop_pct": data.crop_pct,
        "interpolation": "bicubic" if data.interpolation == "random" else data.interpolation,
        "channels": "RGB",
    }
    return Header(TASK, network.config.to_dict(), recipe.to_dict(), classes, transform)


def load_trained(path: str | Path, device: str = "cpu") -> tuple[nn.Module, Header]:
    """A trained classifier in eval mode and the header of its file.

    Args:
        path: a run's folder or its model.safetensors.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    found = read_header(path, TASK)
    if isinstance(found, dict):  # from before headers were one
        if "config" not in found or "classes" not in found:
            raise UserError(f"{path} is not a classifier trained here: its header names no config and classes.")
        transform = {key: found[key] for key in ("mean", "std") if key in found}
        found = Header(TASK, found["config"], {}, found["classes"], transform)
    config = BackboneConfig.from_dict(found.backbone)
    check_fits(config, path)
    network = create_backbone(config, weights=None)
    load_weights(network, path, min_match=1.0, quiet=True)
    return network.to(device).eval(), found
