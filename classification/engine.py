"""Training and evaluation of a classifier, read from top to bottom: the loop, a step, evaluation, what is written."""

import math
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from backbones.training.folder import BEST, METRICS, WEIGHTS, check_use, claimed, keep
from backbones.training.groups import describe_rates
from backbones.training.log import MetricsLog, write_provenance
from backbones.training.measure import count_gflops, count_parameters, images_per_second, peak_memory_mb
from backbones.training.monitor import OperatorMonitor
from backbones.training.nonfinite import first_nonfinite, first_nonfinite_module
from backbones.training.processes import Processes, agree, autocast_type, naming_lost_ranks
from backbones.training.state import save_model
from backbones.training.stopping import Pace, resume_command
from backbones.utils.errors import UserError
from backbones.utils.files import make_folder, write_json

from .config import Recipe
from .data import VAL_NAMES, open_split, start_epoch, val_loader
from .run import Run, prepare
from .state import header, load_trained

__all__ = ["evaluate", "evaluate_only", "load_trained", "train"]


def train(recipe: Recipe, resume: bool = False, device: str | None = None) -> dict[str, Any]:
    """Trains by ``recipe`` and writes weights, logs and metrics.json into ``recipe.output``; returns the metrics.

    Raises:
        UserError: for data, settings or weights that do not fit, a folder that holds another run, a non-finite loss.
        SystemExit: after SIGTERM or SIGINT, when the step is done and saved.
    """
    world, setting = Processes(device), "output=FOLDER"
    try:
        check_use(recipe.output, resume, setting)
        run = prepare(recipe, resume, world)
        with claimed(run.folder, resume, setting, run.is_main), naming_lost_ranks(resume_command()):
            _announce(run, run.load() if resume else [])
            return _train(run)
    finally:
        world.close()


def _train(run: Run) -> dict[str, Any]:
    """The loop, from where the run stands."""
    options = run.recipe.train
    log = MetricsLog(run.folder, resume_step=run.done or None) if run.is_main else None
    monitor = OperatorMonitor(run.network, run.network, run.optimizer) if log and options.log_operators else None
    metrics: dict[str, Any] = {}
    with closing(log) if log else nullcontext(), Pace(options.save_minutes, options.save_steps) as pace:
        if _evaluation_is_due(run) and not agree(int(log is not None and log.has("val", run.done)))[0]:
            metrics = _evaluate_epoch(run, log)  # the run stopped between the checkpoint and this
        for epoch in range(run.done // run.steps, options.epochs):
            metrics = {}
            _train_epoch(run, epoch, pace, log, monitor)
            if _evaluation_is_due(run):
                metrics = _evaluate_epoch(run, log)
        metrics = metrics or evaluate(run.final, run.val_batches, run.precision, run.world, run.source.classes)
        return _finish(run, metrics)


def _train_epoch(run: Run, epoch: int, pace: Pace, log: MetricsLog | None, monitor: OperatorMonitor | None) -> None:
    """One pass over the data, from where the run stands in it; saves at its end and whenever it is time."""
    options, tally = run.recipe.train, run.tally
    first = run.done - epoch * run.steps
    start_epoch(run.batches, options.seed, epoch, first)
    run.model.train()
    title, hidden = f"epoch {epoch + 1}", None if run.is_main else True  # None: without a terminal
    batches, began = iter(run.batches), time.perf_counter()
    with tqdm(total=run.steps, initial=first, desc=title, leave=False, disable=hidden) as shown:
        while run.done < (epoch + 1) * run.steps:
            try:
                images, targets = next(batches)
            except RuntimeError:
                if not pace.signal:  # a signal to the whole group of processes ends the workers too
                    raise
                _save(run, log, pace)
            run.scheduler.step_update(run.done)
            logged = log and (run.done + 1) % options.log_every == 0
            if logged and monitor:
                monitor.watch()
            loss, grad_norm = train_step(run, images, targets)
            run.done += 1
            shown.update()
            tally.loss += loss
            tally.grad_norm_max = max(tally.grad_norm_max, grad_norm)
            if logged:
                rate = max(group["lr"] for group in run.optimizer.param_groups)
                values = {"loss": loss, "lr": rate, "grad_norm": grad_norm, "grad_norm_max": tally.grad_norm_max}
                log.write(run.done, run.done / run.steps, "train", values | (monitor.values() if monitor else {}))
                tally.grad_norm_max = 0.0
            tally.images += run.batch
            if pace.after_step(run.done) or run.done % run.steps == 0:
                tally.seconds += time.perf_counter() - began
                _save(run, log, pace)
                began = time.perf_counter()
    run.skips.check()


def train_step(run: Run, images: Tensor, targets: Tensor) -> tuple[float, float]:
    """One update; returns the loss and the norm of the gradient before clipping."""
    options, device = run.recipe.train, run.world.device
    images, targets = images.to(device), targets.to(device)
    if run.mixup:
        images, targets = run.mixup(images, targets)
    with torch.autocast(device.type, dtype=run.precision, enabled=run.precision is not None):
        logits = run.model(images)
    loss = _loss(logits.float(), targets, run.recipe.augment.smoothing)
    value = loss.item()
    if not math.isfinite(value):
        module = first_nonfinite_module(run.model, lambda: run.model(images)) or "the loss"
        raise UserError(_diverged(run.done, f"the loss is {value}; the first non-finite output is that of {module}"))
    run.optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), options.clip_grad or float("inf")).item()
    if not math.isfinite(grad_norm):
        where = first_nonfinite((name, p.grad) for name, p in run.network.named_parameters())
        raise UserError(_diverged(run.done, f"the gradient of {where} is not finite"))
    run.optimizer.step()
    if run.ema:
        run.ema.update(run.network, step=run.done + 1)
    return value, grad_norm


def _save(run: Run, log: MetricsLog | None, pace: Pace) -> None:
    """Writes the checkpoint, keeps every k-th epoch's, and ends the program when a signal asked for it."""
    if log:
        log.sync()
    run.save()
    pace.saved()
    every = run.recipe.train.keep_every * run.steps
    if run.is_main and every and run.done % every == 0:
        keep(run.folder, run.done)
    if pace.signal:
        pace.stop(run.done)


def _evaluation_is_due(run: Run) -> bool:
    epoch, rest = divmod(run.done, run.steps)
    return bool(run.done) and not rest and (epoch % run.recipe.train.eval_every == 0 or run.done == run.total)


def _evaluate_epoch(run: Run, log: MetricsLog | None) -> dict[str, Any]:
    """Evaluates, tells, and keeps the weights when they are the best so far."""
    metrics = evaluate(run.final, run.val_batches, run.precision, run.world, run.source.classes)
    if log:
        values, epoch, tally = _scalars(metrics), run.done // run.steps, run.tally
        best = max(log.values("val", "top1"), default=-1.0)
        log.write(run.done, epoch, "val", values)
        if metrics["top1"] > best:
            _save_model(run, BEST)
        shown = "".join(f" {name} {value:.2f}" for name, value in values.items())
        print(
            f"epoch {epoch}/{run.recipe.train.epochs}  train loss {tally.loss / run.steps:.3f} {shown}  "
            f"{tally.images / tally.seconds:.0f} images/s",
            flush=True,
        )
    run.tally.loss = 0.0
    return metrics


def _save_model(run: Run, name: str) -> None:
    save_model(run.folder / name, run.final.state_dict(), header(run.recipe, run.final, run.source.classes))


def _finish(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    if run.is_main:
        _save_model(run, WEIGHTS)
        metrics |= _measure(run.final, run.network.config.img_size, run.recipe.train.batch_size, run.world.device)
        speed = run.tally.images / run.tally.seconds if run.tally.seconds else 0.0
        metrics |= {"train_images_per_s": speed, "skipped_images": run.skips.count}
        write_json(run.folder / METRICS, metrics)
    return metrics


def _announce(run: Run, changed: list[str]) -> None:
    """Prints what was derived from the recipe, and writes it with the data protocol into run.json.

    Args:
        changed: settings that differ from the checkpoint's and may.
    """
    if not run.is_main:
        return
    recipe, options, network = run.recipe, run.recipe.train, run.network
    lr = options.lr * run.batch / options.reference_batch
    derived = {"batch": run.batch, "lr": lr, "steps_per_epoch": run.steps, "steps": run.total}
    protocol = {
        "root": recipe.data.root,
        "train_images": len(run.source),
        "val_images": len(run.held_out),
        "classes": run.source.classes,
        "img_size": network.config.img_size,
        "crop_pct": recipe.data.crop_pct,
    }
    config = {**recipe.to_dict(), "backbone": network.config.to_dict(), "derived": derived}
    write_provenance(run.folder, config, options.seed, protocol)
    print(
        f"{network.config.arch}: {count_parameters(network) / 1e6:.2f}M parameters, {len(run.source)} images, "
        f"{len(run.source.classes)} classes\nlr {options.lr:g} at batch {options.reference_batch} -> {lr:g} at batch "
        f"{run.batch}; {options.epochs} epochs = {run.total} steps; {run.precision or 'fp32'} on {run.world.device}"
        f"{describe_rates(network, options.operator_lr)}",
        flush=True,
    )
    if run.done:
        print(f"continuing after step {run.done}", "".join(f"\n  changed: {line}" for line in changed), flush=True)


def evaluate_only(recipe: Recipe, device: str | None = None) -> dict[str, Any]:
    """Evaluates ``output``'s weights (or model.weights) on the validation images and writes metrics.json."""
    world = Processes(device)
    trained = Path(recipe.output) / WEIGHTS
    path = Path(recipe.model.get("weights") or trained)
    if not path.is_file():
        raise UserError(f"no weights to evaluate: {path} does not exist. Train first, or give model.weights=FILE.")
    network, found = load_trained(path, str(world.device))
    source = open_split(recipe.data.root, recipe.data.val, VAL_NAMES, found.classes)
    batches = val_loader(recipe, source, network.config.img_size, world)
    precision = autocast_type(recipe.train.precision, world.device)
    metrics = evaluate(network, batches, precision, world, found.classes)
    metrics |= _measure(network, network.config.img_size, recipe.train.batch_size, world.device)
    if world.is_main:
        write_json(make_folder(recipe.output) / METRICS, metrics)
        print(" ".join(f"{name} {value:.2f}" for name, value in _scalars(metrics).items()))
    world.close()
    return metrics


@torch.no_grad()
def evaluate(
    network: nn.Module, batches, precision: torch.dtype | None, world: Processes, classes: list[str]
) -> dict[str, Any]:
    """top1 and top5 in percent and the cross-entropy over all processes' images, and top1 of each class's images.

    A class without images has None there.

    Raises:
        UserError: when the loss is not finite.
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
    if not math.isfinite(loss):
        raise UserError("the network's outputs on the validation images are not finite: its weights are of no use.")
    shares = (100 * by_class[0] / by_class[1]).tolist()
    return {
        "top1": 100 * by_class[0].sum().item() / images,
        "top5": 100 * top5 / images,
        "loss": loss / images,
        "top1_per_class": {n: None if math.isnan(s) else s for n, s in zip(classes, shares, strict=True)},
    }


def _scalars(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, float)}


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy; mixup's soft targets are smoothed already."""
    return F.cross_entropy(logits, targets, label_smoothing=smoothing if targets.dim() == 1 else 0.0)


def _diverged(step: int, what: str) -> str:
    return (
        f"training diverged at step {step}: {what}. Lower train.lr, set train.clip_grad=1.0, or use "
        "train.precision=fp32. The last checkpoint is kept."
    )


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
