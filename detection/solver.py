"""Learning rates: per parameter (layer decay, no decay of norms) and over time (warm-up, then steps or a cosine)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers.batch_norm import LayerNorm as ChannelLayerNorm
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn

from .backbone import find_trunk

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, ChannelLayerNorm)


@dataclass(frozen=True)
class Schedule:
    """A run's length and learning rates, derived for its batch size from epochs and a reference."""

    batch_size: int
    images: int
    base_lr: float
    total_steps: int
    checkpoint_steps: int
    eval_steps: int  # 0 = at the end only
    factor: Callable[[float], float]  # of base_lr, over progress 0..1

    def lr(self, step: int) -> float:
        return self.base_lr * self.factor(step / self.total_steps)

    def epoch(self, step: int) -> float:
        return step * self.batch_size / self.images

    def __str__(self) -> str:
        return (
            f"{self.images} images, batch {self.batch_size}: {self.total_steps} steps "
            f"({self.epoch(self.total_steps):.1f} epochs), peak learning rate {self.base_lr:.3g}"
        )


def make_schedule(cfg: CfgNode, images: int) -> Schedule:
    """SOLVER's epochs and reference learning rate for ``images`` training images and the batch at hand."""
    solver = cfg.SOLVER
    batch = solver.IMS_PER_BATCH
    total = max(1, math.ceil(solver.EPOCHS * images / batch))
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        after = CosineParamScheduler(1.0, 0.0)
    else:
        fractions = list(solver.STEP_FRACTIONS)
        values = [solver.GAMMA**k for k in range(len(fractions) + 1)]
        after = MultiStepParamScheduler(values, milestones=[round(f * 10**6) for f in fractions], num_updates=10**6)
    warmup = min(1.0, solver.WARMUP_EPOCHS / solver.EPOCHS)
    return Schedule(
        batch_size=batch,
        images=images,
        base_lr=solver.REFERENCE_LR * batch / solver.REFERENCE_BATCH,
        total_steps=total,
        checkpoint_steps=max(1, round(solver.CHECKPOINT_EPOCHS * images / batch)),
        eval_steps=round(cfg.TEST.EVAL_EPOCHS * images / batch),
        factor=WarmupParamScheduler(after, solver.WARMUP_FACTOR, warmup) if warmup else after,
    )


def make_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999); each group's ``lr_scale`` multiplies the schedule's learning rate.

    The backbone's block i learns at LAYER_DECAY^(depth + 1 - i); norms and what the backbone names take no decay.
    """
    prefix, trunk = find_trunk(model)
    undecayed = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    undecayed |= {f"{prefix}.{name}" for name in trunk.no_weight_decay()}

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith(f"{prefix}."):
            layer = trunk.layer_id(name.removeprefix(f"{prefix}."))
            scale = cfg.SOLVER.LAYER_DECAY ** (trunk.depth + 1 - layer)
        decay = 0.0 if name in undecayed else cfg.SOLVER.WEIGHT_DECAY
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()],
        lr=cfg.SOLVER.REFERENCE_LR,
        betas=(0.9, 0.999),
        fused=True,
    )
