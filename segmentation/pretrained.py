"""Weights that mmengine loads by itself (``init_cfg=dict(type="Pretrained")``, ``pretrained``): read by our reader.

mmengine's own loaders unpickle a file with ``weights_only=False`` when it holds more than tensors, and so run it.
"""

from typing import Any

from mmengine.runner import CheckpointLoader
from torch import Tensor

from backbones.checkpoint import read_state
from backbones.utils.errors import UserError, shown


def load_from_file(filename: str, map_location: Any = None) -> dict[str, dict[str, Tensor]]:
    """The state dict of a safetensors file, or of a .pth with tensors only, on the CPU.

    Args:
        filename: a local path.
        map_location: mmengine's; tensors are copied to the model's device anyway.

    Raises:
        UserError: for an address, a missing or broken file, and one that holds more than tensors.
    """
    if "://" in str(filename):
        raise UserError(f"the checkpoint {shown(filename)} is not a local file. Download it, and give its path.")
    return {"state_dict": read_state(filename)}


for _prefix in list(CheckpointLoader._schemes):
    CheckpointLoader.register_scheme(prefixes=_prefix, loader=load_from_file, force=True)
