"""Which parameters get weight decay, and how the learning rate falls from the head to the patch embedding."""

from collections import defaultdict

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from backbones.utils.errors import UserError

from .backbone import KarvisBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class KarvisOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups for a segmentor with a KarvisBackbone.

    No weight decay on norms, biases and what ``no_weight_decay()`` of the backbone names. With
    ``paramwise_cfg=dict(layer_decay=r)``, layer i of a backbone of depth d has its learning rate times r^(d+1-i).
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        if is_model_wrapper(module):
            module = module.module
        unknown = set(self.paramwise_cfg) - {"layer_decay"}
        if unknown:
            raise UserError(f"paramwise_cfg has no key {sorted(unknown)[0]!r} here. Valid: layer_decay.")
        if not isinstance(module.backbone, KarvisBackbone):
            raise UserError(f"{type(self).__name__} needs a KarvisBackbone, got {type(module.backbone).__name__}.")
        net = module.backbone.net
        rate = self.paramwise_cfg.get("layer_decay", 1.0)
        undecayed = {f"backbone.net.{name}" for name in net.no_weight_decay()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = 1.0
            if name.startswith("backbone.net."):
                scale = rate ** (net.depth + 1 - net.layer_id(name.removeprefix("backbone.net.")))
            decay = 0.0 if parameter.ndim <= 1 or name in undecayed else self.base_wd
            groups[scale, decay].append(parameter)
        for (scale, decay), parameters in groups.items():
            params.append({"params": parameters, "lr": self.base_lr * scale, "weight_decay": decay})
