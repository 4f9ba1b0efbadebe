"""Our trunk as an MMSegmentation backbone, and a segmentor that stops on a non-finite loss."""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor

from backbones import create_backbone
from backbones.training.nonfinite import first_nonfinite_module
from backbones.utils.errors import UserError


@MODELS.register_module()
class KarvisBackbone(BaseModule):
    """A backbone of ``backbones.create_backbone`` that returns one map per index in ``out_indices``.

    A ViT's maps all have the stride of the patch; a neck such as mmseg's Feature2Pyramid makes a pyramid of them. The
    stages of a Swin Transformer are one already. An input whose sides are not multiples of the patch is padded with
    zeros at the right and the bottom, as mmseg's own preprocessor does with ``size_divisor``.

    Args:
        arch: name of a preset.
        init_cfg: mmengine's; ``weights`` is how this backbone is initialized.
        overrides: fields of BackboneConfig; None means the preset's value.
    """

    def __init__(self, arch: str, init_cfg: dict | None = None, **overrides: Any):
        super().__init__(init_cfg)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        # A dense task has no classifier, and its maps never pass the last norm.
        self.net = create_backbone(arch, num_classes=0, final_norm=False, **overrides)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (B, width, ceil(H/stride), ceil(W/stride)) of images (B, 3, H, W)."""
        patch = self.net.patch_size
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % patch, 0, -height % patch))
        return tuple(self.net.forward_maps(x))


@MODELS.register_module()
class CheckedEncoderDecoder(EncoderDecoder):
    """mmseg's EncoderDecoder; a loss that is not finite ends the run and names the module where it began."""

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The losses of a batch, checked before they reach the weights.

        Raises:
            UserError: naming the loss and the first module with a non-finite output.
        """
        losses = super().loss(inputs, data_samples)
        for name, value in losses.items():
            if "loss" in name and not torch.isfinite(value).all():
                module = first_nonfinite_module(self, lambda: EncoderDecoder.loss(self, inputs, data_samples))
                where = f"the first module with a non-finite output is {module}" if module else "every module is finite"
                raise UserError(
                    f"{name} became {value.detach().float().mean().item()}; {where}. Lower the learning rate "
                    "(optim_wrapper.optimizer.lr), or go back to the last checkpoint with --resume."
                )
        return losses
