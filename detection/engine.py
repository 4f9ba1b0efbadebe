"""The detection run, top to bottom: data, model, optimizer, the loop, evaluation, what is written."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from backbones.training.monitor import OperatorMonitor
from backbones.training.nonfinite import first_nonfinite, first_nonfinite_module
from backbones.training.rng import seed_everything, set_random_state
from backbones.training.skips import SkipCounter
from backbones.utils.errors import UserError
from backbones.utils.files import make_folder, read_json, write_json

from .backbone import find_trunk
from .config import load_config
from .datasets import CocoSummary, check_same_classes, register_datasets
from .evaluation import evaluate, measure_cost, predict
from .journal import Clock, Journal
from .loader import training_loader, training_records
from .solver import Schedule, make_optimizer, make_schedule
from .state import (
    CHECKPOINT,
    WEIGHTS,
    load_checkpoint,
    load_detector,
    load_trained,
    save_checkpoint,
    save_model,
)

__all__ = ["evaluate_run", "load_config", "load_trained", "predict", "train"]


@dataclass
class Run:
    """The parts of a training run, ready for the step ``start``."""

    cfg: CfgNode
    folder: Path
    training_set: CocoSummary
    test_set: CocoSummary
    model: nn.Module
    network: nn.Module  # the model, wrapped when there are several processes
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loader: DataLoader
    skips: SkipCounter
    start: int
    saved: dict[str, Any] | None  # the checkpoint that it continues from


def train(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Trains a detector, evaluates it and writes its folder; returns the figures of metrics.json.

    Args:
        cfg: from ``load_config``; OUTPUT_DIR takes model.safetensors, checkpoint.pth, metrics.jsonl, TensorBoard
            events, run.json and metrics.json.
        resume: continue from OUTPUT_DIR's checkpoint.
    """
    run = prepare(cfg, resume)
    schedule = run.schedule
    journal = Journal(run) if comm.is_main_process() else None
    _, trunk = find_trunk(run.model)
    monitor = OperatorMonitor(run.model, trunk, run.optimizer) if journal and cfg.SOLVER.LOG_OPERATORS else None
    clock = Clock(run.saved["extra"]["speed"] if run.saved else [])
    batches = iter(run.loader)
    run.network.train()
    if run.saved:
        set_random_state(run.saved["random"])

    figures: dict[str, Any] = {}
    with EventStorage(run.start):
        for step in range(run.start, schedule.total_steps):
            lr = schedule.lr(step)
            done = step + 1
            last = done == schedule.total_steps
            logged = done % cfg.SOLVER.LOG_STEPS == 0 or last
            if logged and monitor:
                monitor.watch()
            losses, grad_norm = train_step(run, next(batches), lr, step)

            clock.tick()
            if journal:
                journal.add(losses, grad_norm)
            if logged:
                clock.close_stretch()
                if journal:
                    journal.train(done, {"lr": lr} | (monitor.values() if monitor else {}), clock)
            if last or (schedule.eval_steps and done % schedule.eval_steps == 0):
                figures = evaluate(cfg, run.model, run.test_set.name)
                run.network.train()
                if journal:
                    journal.val(done, figures)
                clock.restart()
            if comm.is_main_process() and (last or done % schedule.checkpoint_steps == 0):
                save_checkpoint(run.folder, done, run.model, run.optimizer, cfg, {"speed": clock.speed})
                clock.restart()

    if run.start == schedule.total_steps:
        figures = evaluate(cfg, run.model, run.test_set.name)
    if not journal:
        return {}
    journal.close()
    save_model(run.folder, run.model, cfg, run.training_set.categories)
    figures |= measure_cost(cfg, run.model, run.test_set.name)
    figures["train_images_per_s"] = round(schedule.batch_size / clock.seconds_per_step, 2)
    figures["skipped_images"] = run.skips.count
    write_json(run.folder / "metrics.json", figures)
    return figures


def prepare(cfg: CfgNode, resume: bool) -> Run:
    """Checks the data and builds everything a run needs, at its first step or at its checkpoint."""
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by {world} processes.")
    folder = Path(cfg.OUTPUT_DIR)
    _check_output(folder, resume)
    training_set, test_set = register_datasets(cfg)
    records = training_records(training_set.name, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    schedule = make_schedule(cfg, len(records))
    make_folder(folder)
    if resume:
        cfg.MODEL.VIT.weights, cfg.MODEL.WEIGHTS = None, ""

    seed_everything(cfg.SEED, comm.get_rank())
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_detector(model, cfg.MODEL.WEIGHTS, strict=False)
    optimizer = make_optimizer(cfg, model)
    saved = load_checkpoint(folder, model, optimizer, cfg) if resume else None
    start = saved["step"] if saved else 0
    loader, skips = training_loader(cfg, records, start, schedule.total_steps)
    # A model on the CPU must name no device to DistributedDataParallel.
    devices = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
    network = create_ddp_model(model, broadcast_buffers=False, **devices)
    return Run(cfg, folder, training_set, test_set, model, network, optimizer, schedule, loader, skips, start, saved)


def _check_output(folder: Path, resume: bool) -> None:
    exists = (folder / CHECKPOINT).is_file()
    if resume and not exists:
        raise UserError(f"nothing to resume: {folder / CHECKPOINT} does not exist. Leave out --resume to start.")
    if exists and not resume:
        raise UserError(f"{folder} holds a run already. Continue it with --resume, or choose another OUTPUT_DIR.")


def train_step(run: Run, batch: list[dict[str, Any]], lr: float, step: int) -> tuple[dict[str, Tensor], Tensor]:
    """One update; returns the losses and the norm of the gradient before clipping."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    losses = _losses(run.cfg, run.network, batch, step)
    run.optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.SOLVER.CLIP_NORM or float("inf"))
    if not torch.isfinite(grad_norm):
        where = first_nonfinite((name, p.grad) for name, p in run.model.named_parameters())
        raise UserError(_diverged(step, f"the gradient of {where} is not finite", batch))
    run.optimizer.step()
    return losses, grad_norm


def _losses(cfg: CfgNode, network: nn.Module, batch: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """The losses of one batch, all finite, or a UserError naming the first module that produced NaN or infinity."""
    try:
        with _precision(cfg):
            losses = network(batch)
        if torch.isfinite(sum(losses.values())):
            return losses
    except FloatingPointError:  # Detectron2's own check of its proposals
        pass
    with _precision(cfg):
        module = first_nonfinite_module(network, lambda: network(batch))
    raise UserError(_diverged(step, f"the first module with a non-finite output is {module or 'a loss'}", batch))


def _precision(cfg: CfgNode) -> Any:
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _diverged(step: int, what: str, batch: list[dict[str, Any]]) -> str:
    images = ", ".join(Path(x["file_name"]).name for x in batch[:4])
    return (
        f"training diverged at step {step}: {what} (images: {images}, ...). Lower SOLVER.REFERENCE_LR, raise "
        "SOLVER.WARMUP_EPOCHS, or set SOLVER.AMP.ENABLED False; the last checkpoint is untouched."
    )


def evaluate_run(cfg: CfgNode) -> dict[str, Any]:
    """Evaluates MODEL.WEIGHTS, or OUTPUT_DIR's model, on DATASETS.TEST_*; updates OUTPUT_DIR's metrics.json."""
    folder = Path(cfg.OUTPUT_DIR)
    source = Path(cfg.MODEL.WEIGHTS or folder / WEIGHTS)
    own = source.resolve() == (folder / WEIGHTS).resolve()
    if source.suffix == ".safetensors":
        model, trained, categories = load_trained(source, cfg.MODEL.DEVICE)
        trained.DATASETS, trained.DATALOADER, trained.OUTPUT_DIR = cfg.DATASETS, cfg.DATALOADER, cfg.OUTPUT_DIR
        cfg = trained
        _, test_set = register_datasets(cfg, train=False)
        check_same_classes(categories, test_set.categories, str(source), test_set.json_file)
    else:
        cfg.MODEL.VIT.weights = None
        _, test_set = register_datasets(cfg, train=False)
        model = build_model(cfg)
        load_detector(model, source)
    figures = evaluate(cfg, model, test_set.name)
    if not comm.is_main_process():
        return {}
    figures |= measure_cost(cfg, model, test_set.name)
    path = make_folder(folder) / "metrics.json"
    before = read_json(path, "metrics") if own and path.is_file() else {}
    write_json(path, {**before, **figures})
    return figures
