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

from backbones.training.groups import parameter_groups

from .backbone import find_trunk


@dataclass(frozen=True)
class Schedule:
    """A run's length and learning rates, derived for its batch size from epochs and a reference."""

    batch_size: int
    images: int
    base_lr: float
    total_steps: int
    checkpoint_steps: int
    keep_steps: int  # 0 = the last checkpoint alone
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
        keep_steps=round(solver.KEEP_EPOCHS * images / batch),
        eval_steps=round(cfg.TEST.EVAL_EPOCHS * images / batch),
        factor=WarmupParamScheduler(after, solver.WARMUP_FACTOR, warmup) if warmup else after,
    )


def make_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999); each group's ``lr_scale`` multiplies the schedule's learning rate.

    The backbone's block i learns at LAYER_DECAY^(depth + 1 - i), its operators by OPERATOR_LR; norms and what the
    backbone names take no decay.
    """
    prefix, trunk = find_trunk(model)
    solver = cfg.SOLVER
    groups = parameter_groups(
        model,
        trunk,
        f"{prefix}.",
        weight_decay=solver.WEIGHT_DECAY,
        layer_decay=solver.LAYER_DECAY,
        operator_lr=solver.OPERATOR_LR,
        decay_biases=True,
        norms=(ChannelLayerNorm,),
    )
    return torch.optim.AdamW(groups, lr=solver.REFERENCE_LR, betas=(0.9, 0.999), fused=True)
