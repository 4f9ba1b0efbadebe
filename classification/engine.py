"""Training and evaluation of a classifier, read from top to bottom: build, resume, epochs, evaluation, results."""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import BackboneConfig, create_backbone
from backbones.checkpoint import load_weights, read_metadata, save_backbone
from backbones.training.groups import describe_rates, parameter_groups
from backbones.training.log import MetricsLog, write_provenance
from backbones.training.measure import count_gflops, count_parameters, images_per_second, peak_memory_mb
from backbones.training.monitor import OperatorMonitor
from backbones.training.nonfinite import first_nonfinite_module
from backbones.training.rng import random_state, seed_everything, set_random_state
from backbones.training.skips import SkipCounter
from backbones.utils.errors import UserError
from backbones.utils.files import atomic_path, make_folder, write_json

from .config import Recipe
from .data import TRAIN_NAMES, VAL_NAMES, Source, open_split, start_epoch, train_loader, val_loader

WEIGHTS, STATE = "model.safetensors", "checkpoint.pt"


def train(recipe: Recipe, resume: bool = False, device: str | None = None) -> dict[str, Any]:
    """Trains by ``recipe`` and writes weights, logs and metrics.json into ``recipe.output``; returns the metrics.

    Raises:
        UserError: for data, settings or weights that do not fit, a folder that holds another run, a non-finite loss.
    """
    world = _Processes(device)
    options = recipe.train
    output = Path(recipe.output)
    _check_output(output, resume)
    make_folder(output)
    seed_everything(options.seed)

    source = open_split(recipe.data.root, recipe.data.train, TRAIN_NAMES)
    held_out = open_split(recipe.data.root, recipe.data.val, VAL_NAMES, source.classes)
    skips = SkipCounter(len(source))
    network = create_backbone({**recipe.model, "num_classes": len(source.classes)}).to(world.device)
    seed_everything(options.seed, world.rank)  # the same weights everywhere, other dropout and mixup
    size = network.config.img_size
    batches = train_loader(recipe, source, skips, size, world.device, world.size)
    val_batches = val_loader(recipe, held_out, size, world.device, world.rank, world.size)

    steps, batch = len(batches), options.batch_size * world.size
    optimizer, scheduler = _schedule(recipe, network, steps, batch)
    ema = ModelEmaV3(network, decay=options.ema_decay, use_warmup=True) if options.ema_decay else None
    model = nn.parallel.DistributedDataParallel(network) if world.size > 1 else network
    mixup, precision = _mixup(recipe, len(source.classes)), _precision(options.precision, world.device)

    start = _load_state(output / STATE, network, ema, optimizer) if resume else 0
    monitor = OperatorMonitor(network, network, optimizer) if world.is_main and options.log_operators else None
    log = MetricsLog(output, resume_step=start * steps if resume else None) if world.is_main else None
    if world.is_main:
        _announce(recipe, network, source, held_out, steps, batch, f"{precision or 'fp32'} on {world.device}")

    seen, busy = 0, 0.0
    metrics: dict[str, Any] = {}
    for epoch in range(start, options.epochs):
        began = time.perf_counter()
        loss = _train_epoch(
            epoch, recipe, model, ema, optimizer, scheduler, mixup, batches, precision, world, log, monitor, skips
        )
        busy += time.perf_counter() - began
        seen += steps * batch
        last = epoch + 1 == options.epochs
        if (epoch + 1) % options.eval_every == 0 or last:
            metrics = evaluate(ema.module if ema else network, val_batches, precision, world, source.classes)
            if log:
                log.write((epoch + 1) * steps, epoch + 1, "val", _scalars(metrics))
        if world.is_main:
            shown = "".join(f" {k} {v:.2f}" for k, v in _scalars(metrics).items())
            print(
                f"epoch {epoch + 1}/{options.epochs}  train loss {loss:.3f} {shown}  {seen / busy:.0f} images/s",
                flush=True,
            )
            _save_state(output / STATE, network, ema, optimizer, epoch + 1)
    if not metrics:  # resumed after its last epoch
        metrics = evaluate(ema.module if ema else network, val_batches, precision, world, source.classes)

    final = ema.module if ema else network
    if world.is_main:
        save_backbone(
            output / WEIGHTS, final, classes=source.classes, mean=recipe.data.mean, std=recipe.data.std, task="classify"
        )
        metrics |= _measure(final, size, options.batch_size, world.device)
        metrics |= {"train_images_per_s": seen / busy if busy else 0.0, "skipped_images": skips.count}
        write_json(output / "metrics.json", metrics)
        log.close()
    world.close()
    return metrics


def _schedule(recipe: Recipe, network: nn.Module, steps: int, batch: int):
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


def _announce(
    recipe: Recipe, network: nn.Module, source: Source, held_out: Source, steps: int, batch: int, where: str
) -> None:
    """Prints what was derived from the recipe, and writes it with the data protocol into run.json."""
    options = recipe.train
    lr = options.lr * batch / options.reference_batch
    derived = {"batch": batch, "lr": lr, "steps_per_epoch": steps, "steps": steps * options.epochs}
    protocol = {
        "root": recipe.data.root,
        "train_images": len(source),
        "val_images": len(held_out),
        "classes": source.classes,
        "img_size": network.config.img_size,
        "crop_pct": recipe.data.crop_pct,
    }
    config = {**recipe.to_dict(), "backbone": network.config.to_dict(), "derived": derived}
    write_provenance(recipe.output, config, options.seed, protocol)
    print(
        f"{network.config.arch}: {count_parameters(network) / 1e6:.2f}M parameters, {len(source)} images, "
        f"{len(source.classes)} classes\nlr {options.lr:g} at batch {options.reference_batch} -> {lr:g} at batch "
        f"{batch}; {options.epochs} epochs = {steps * options.epochs} steps; {where}"
        f"{describe_rates(network, options.operator_lr)}",
        flush=True,
    )


def evaluate_only(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    """Evaluates ``output``'s weights (or model.weights) on the validation images and writes metrics.json."""
    world = _Processes(device)
    trained = Path(recipe.output) / WEIGHTS
    path = Path(recipe.model.get("weights") or trained)
    if not path.is_file():
        raise UserError(f"no weights to evaluate: {path} does not exist. Train first, or give model.weights=FILE.")
    network, metadata = load_trained(path, str(world.device))
    source = open_split(recipe.data.root, recipe.data.val, VAL_NAMES, metadata["classes"])
    batches = val_loader(recipe, source, network.config.img_size, world.device, world.rank, world.size)
    precision = _precision(recipe.train.precision, world.device)
    metrics = evaluate(network, batches, precision, world, metadata["classes"])
    metrics |= _measure(network, network.config.img_size, recipe.train.batch_size, world.device)
    if world.is_main:
        write_json(make_folder(recipe.output) / "metrics.json", metrics)
        print(" ".join(f"{name} {value:.2f}" for name, value in _scalars(metrics).items()))
    world.close()
    return metrics


def load_trained(path: str | Path, device: str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """A trained classifier in eval mode and the metadata of its file: classes, mean, std.

    Args:
        path: a run's folder or its model.safetensors.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    metadata = read_metadata(path)
    if "config" not in metadata or "classes" not in metadata:
        raise UserError(f"{path} is not a classifier trained here: its header names no config and classes.")
    config = BackboneConfig.from_dict(metadata["config"])
    network = create_backbone(config, weights=None)
    load_weights(network, path, min_match=1.0, quiet=True)
    return network.to(device).eval(), metadata


@torch.no_grad()
def evaluate(
    network: nn.Module, batches, precision: torch.dtype | None, world: "_Processes", classes: list[str]
) -> dict[str, Any]:
    """top1 and top5 in percent and the cross-entropy over all processes' images, and top1 of each class's images.

    A class without images has None there.
    """
    network.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # top-5, loss
    by_class = torch.zeros(2, len(classes), dtype=torch.float64, device=world.device)  # top-1, images
    for images, targets in batches:
        images, targets = images.to(world.device), targets.to(world.device)
        with torch.autocast(world.device.type, dtype=precision, enabled=precision is not None):
            logits = network(images)
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
        sums += torch.stack([ranked.sum(), F.cross_entropy(logits, targets, reduction="sum")])
        for row, counted in zip(by_class, (ranked[:, 0], torch.ones_like(targets)), strict=True):
            row.index_add_(0, targets, counted.to(row.dtype))
    if world.size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(by_class)
    (top5, loss), images = sums.tolist(), by_class[1].sum().item()
    shares = (100 * by_class[0] / by_class[1]).tolist()
    return {
        "top1": 100 * by_class[0].sum().item() / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "top1_per_class": {n: None if math.isnan(s) else s for n, s in zip(classes, shares, strict=True)},
    }


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _train_epoch(
    epoch, recipe, model, ema, optimizer, scheduler, mixup, batches, precision, world, log, monitor, skips
) -> float:
    """One pass over the data; returns the mean training loss."""
    options, steps = recipe.train, len(batches)
    start_epoch(batches, options.seed, epoch)
    model.train()
    total, largest = 0.0, 0.0
    for i, (images, targets) in enumerate(_progress(batches, f"epoch {epoch + 1}", world.is_main)):
        step = epoch * steps + i
        scheduler.step_update(step)
        logged = log and (step + 1) % options.log_every == 0
        if logged and monitor:
            monitor.watch()
        images, targets = images.to(world.device), targets.to(world.device)
        if mixup:
            images, targets = mixup(images, targets)
        with torch.autocast(world.device.type, dtype=precision, enabled=precision is not None):
            logits = model(images)
        loss = _loss(logits.float(), targets, recipe.augment.smoothing)
        value = loss.item()
        if not math.isfinite(value):
            _stop_nonfinite(model, images, step, value)
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad or float("inf"))
        largest = max(largest, grad_norm.item())
        optimizer.step()
        if ema:
            ema.update(getattr(model, "module", model), step=step + 1)
        total += value
        if logged:
            rate = max(group["lr"] for group in optimizer.param_groups)
            values = {"loss": value, "lr": rate, "grad_norm": grad_norm.item(), "grad_norm_max": largest}
            log.write(step + 1, (step + 1) / steps, "train", values | (monitor.values() if monitor else {}))
            largest = 0.0
    skips.check()
    return total / steps


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy; mixup's soft targets are smoothed already."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.dim() == 1 else 0.0)


def _mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    augment = recipe.augment
    if not augment.mixup and not augment.cutmix:
        return None
    if recipe.train.batch_size % 2:
        raise UserError(f"mixup needs an even train.batch_size, got {recipe.train.batch_size}.")
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.smoothing, num_classes=num_classes)


def _stop_nonfinite(model: nn.Module, images: Tensor, step: int, value: float) -> None:
    module = first_nonfinite_module(model, lambda: model(images)) or "the loss"
    raise UserError(
        f"the loss became {value} at step {step}; the first module with a non-finite output is {module}. "
        "Lower train.lr, set train.clip_grad=1.0, or use train.precision=fp32. The last checkpoint is kept."
    )


def _precision(setting: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 where asked for, or by default on GPUs that have it."""
    if setting == "bf16" or (setting == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return None


def _progress(batches, title: str, shown: bool):
    from tqdm import tqdm

    return tqdm(batches, desc=title, leave=False, disable=None if shown else True)


def _measure(network: nn.Module, size: tuple[int, int], batch_size: int, device: torch.device) -> dict[str, float]:
    network = network.eval()
    images = torch.randn(batch_size, 3, *size, device=device)
    peak = peak_memory_mb()
    return {
        "parameters": count_parameters(network),
        "gflops": count_gflops(lambda: network(images[:1])),
        "images_per_s": images_per_second(lambda: network(images), batch_size),
        "peak_memory_mb": peak,
    }


def _check_output(output: Path, resume: bool) -> None:
    if resume and not (output / STATE).is_file():
        raise UserError(f"nothing to resume: {output / STATE} does not exist. Leave out --resume to start.")
    if not resume and (output / STATE).is_file():
        raise UserError(f"{output} holds a run already. Continue it with --resume, or choose another output=FOLDER.")


def _save_state(path: Path, network: nn.Module, ema: ModelEmaV3 | None, optimizer, epoch: int) -> None:
    state = {
        "epoch": epoch,
        "model": network.state_dict(),
        "ema": ema.module.state_dict() if ema else None,
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, network: nn.Module, ema: ModelEmaV3 | None, optimizer) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state["model"])
        if ema:
            ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, KeyError, ValueError, EOFError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this recipe ({error}). Resume with the recipe the run began with."
        ) from None
    set_random_state(state["random"])
    return state["epoch"]


class _Processes:
    """This process among those torchrun started: device, rank, number."""

    def __init__(self, device: str | None):
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if chosen.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {chosen!r} was asked for, but PyTorch sees no GPU. Use --device cpu.")
        info = init_distributed_device_so(chosen, dist_backend=None)
        self.device, self.rank, self.size = torch.device(info["device"]), info["global_rank"], info["world_size"]
        self.is_main = self.rank == 0

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
