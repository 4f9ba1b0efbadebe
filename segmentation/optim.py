"""Which parameters get weight decay, and how the learning rate falls from the head to the patch embedding."""

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from backbones.training.groups import DERIVED, parameter_groups
from backbones.utils.errors import UserError

from .backbone import KarvisBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class KarvisOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for a segmentor with a KarvisBackbone.

    No weight decay on norms, biases and what ``no_weight_decay()`` of the backbone names. ``paramwise_cfg`` may hold
    ``layer_decay=r``, layer i of a backbone of depth d has its learning rate times r^(d+1-i), and ``operator_lr``, see
    ``backbones.training.groups.operator_rates``.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        if is_model_wrapper(module):
            module = module.module
        unknown = set(self.paramwise_cfg) - {"layer_decay", "operator_lr"}
        if unknown:
            raise UserError(f"paramwise_cfg has no key {sorted(unknown)[0]!r} here. Valid: layer_decay, operator_lr.")
        if not isinstance(module.backbone, KarvisBackbone):
            raise UserError(f"{type(self).__name__} needs a KarvisBackbone, got {type(module.backbone).__name__}.")
        groups = parameter_groups(
            module,
            module.backbone.net,
            "backbone.net.",
            weight_decay=self.base_wd,
            layer_decay=self.paramwise_cfg.get("layer_decay", 1.0),
            operator_lr=self.paramwise_cfg.get("operator_lr", DERIVED),
        )
        for group in groups:
            params.append({"lr": self.base_lr * group.pop("lr_scale"), **group})
