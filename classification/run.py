"""The parts of a classification run, built and checked: ready for its first step, or for the next one."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

from backbones import create_backbone
from backbones.training.folder import CHECKPOINT
from backbones.training.groups import parameter_groups
from backbones.training.processes import Processes, autocast_type, random_states
from backbones.training.rng import seed_everything, set_random_state
from backbones.training.skips import SkipCounter
from backbones.training.state import Contract, check_length, read_checkpoint, save_checkpoint
from backbones.utils.errors import UserError

from .config import Recipe
from .data import TRAIN_NAMES, VAL_NAMES, Source, open_split, train_loader, val_loader
from .state import TASK

# What may differ between a run and its continuation: where data and results are, how they are read and shown, for how
# long it trains, and what is kept.
ALLOWED = (
    "output",
    "data.root",
    "data.train",
    "data.val",
    "data.workers",
    "data.max_pixels",
    "model.weights",
    "model.weights_min_match",
    "train.epochs",
    "train.eval_every",
    "train.log_every",
    "train.log_operators",
    "train.save_minutes",
    "train.save_steps",
    "train.keep_every",
)


@dataclass
class Tally:
    """What a run has counted since it began, or since its last line in the log."""

    loss: float = 0.0  # sum over this epoch's steps
    grad_norm_max: float = 0.0  # since the last line
    seconds: float = 0.0  # spent on training steps
    images: int = 0  # trained on in that time


@dataclass
class Run:
    """The parts of a training run; ``done`` steps are behind it."""

    recipe: Recipe
    folder: Path
    world: Processes
    source: Source
    held_out: Source
    network: nn.Module
    model: nn.Module  # the network, wrapped when there are several processes
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    mixup: Mixup | None
    precision: torch.dtype | None
    batches: DataLoader
    val_batches: DataLoader
    skips: SkipCounter
    contract: Contract
    done: int = 0
    tally: Tally = field(default_factory=Tally)

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.batches)

    @property
    def total(self) -> int:
        return self.steps * self.recipe.train.epochs

    @property
    def batch(self) -> int:
        """Images in a step, of all processes."""
        return self.recipe.train.batch_size * self.world.size

    @property
    def final(self) -> nn.Module:
        """The network that is evaluated and saved: the average over steps where there is one."""
        return self.ema.module if self.ema else self.network

    def save(self) -> None:
        """Writes the checkpoint; every process must call it, the main one writes."""
        state = {
            **self.contract.to_dict(),
            "step": self.done,
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(),
            "tally": asdict(self.tally),
            "skipped": self.skips.marked,
        }
        if self.is_main:
            save_checkpoint(self.folder / CHECKPOINT, state)

    def load(self) -> list[str]:
        """Goes where the checkpoint stopped; returns the settings that differ from it and may.

        Raises:
            UserError: for a damaged checkpoint, and one of other settings, data or processes.
        """
        path = self.folder / CHECKPOINT
        state = read_checkpoint(path)
        changed = self.contract.check(state, ALLOWED, path)
        check_length(path, state["step"], self.total, "train.epochs")
        self.network.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.tally = state["step"], Tally(**state["tally"])
        self.skips.mark(state["skipped"])
        set_random_state(state["random"][self.world.rank])
        return changed


def prepare(recipe: Recipe, resume: bool, world: Processes) -> Run:
    """Checks data and settings and builds everything that a run needs, at its first step."""
    options = recipe.train
    source = open_split(recipe.data.root, recipe.data.train, TRAIN_NAMES)
    held_out = open_split(recipe.data.root, recipe.data.val, VAL_NAMES, source.classes)
    seed_everything(options.seed)
    start = {"weights": None} if resume else {}
    network = create_backbone({**recipe.model, "num_classes": len(source.classes), **start}).to(world.device)
    seed_everything(options.seed, world.rank)  # the same weights everywhere, other dropout and mixup
    skips, size = SkipCounter(len(source)), network.config.img_size
    batches = train_loader(recipe, source, skips, size, world)
    optimizer, scheduler = make_schedule(recipe, network, len(batches), options.batch_size * world.size)
    data = {"classes": source.classes, "images": len(source), "digest": source.digest()}
    return Run(
        recipe=recipe,
        folder=Path(recipe.output),
        world=world,
        source=source,
        held_out=held_out,
        network=network,
        model=nn.parallel.DistributedDataParallel(network) if world.size > 1 else network,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ModelEmaV3(network, decay=options.ema_decay, use_warmup=True) if options.ema_decay else None,
        mixup=_mixup(recipe, len(source.classes)),
        precision=autocast_type(options.precision, world.device),
        batches=batches,
        val_batches=val_loader(recipe, held_out, size, world),
        skips=skips,
        contract=Contract(TASK, recipe.to_dict(), data),
    )


def make_schedule(recipe: Recipe, network: nn.Module, steps: int, batch: int) -> tuple[torch.optim.Optimizer, Any]:
    """Optimizer and per-step cosine schedule, their rates scaled from the reference batch to ``batch``."""
    options, scale = recipe.train, batch / recipe.train.reference_batch
    groups = parameter_groups(
        network,
        network,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        operator_lr=options.operator_lr,
    )
    try:
        optimizer = create_optimizer_v2(
            groups,
            opt=options.optimizer,
            lr=options.lr * scale,
            weight_decay=options.weight_decay,
            betas=tuple(options.betas),
            eps=options.eps,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"train.optimizer {options.optimizer!r}: {error}. Take one of timm's, such as adamw.") from None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr * scale,
        min_lr=options.min_lr * scale,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return optimizer, scheduler


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    augment = recipe.augment
    if not augment.mixup and not augment.cutmix:
        return None
    if recipe.train.batch_size % 2:
        raise UserError(f"mixup needs an even train.batch_size, got {recipe.train.batch_size}.")
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=num_classes)
