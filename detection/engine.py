"""The detection run, top to bottom: data, model, optimizer, the loop, evaluation, what is written."""

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from backbones.training.folder import BEST, METRICS, WEIGHTS, check_use, claimed, keep
from backbones.training.monitor import OperatorMonitor
from backbones.training.nonfinite import first_nonfinite, first_nonfinite_module
from backbones.training.processes import agree, autocast_type, naming_lost_ranks
from backbones.training.state import save_model
from backbones.training.stopping import Pace, resume_command
from backbones.utils.documents import read_json
from backbones.utils.errors import UserError
from backbones.utils.files import make_folder, write_json

from .backbone import find_trunk
from .config import load_config
from .datasets import check_same_classes, register_datasets
from .evaluation import evaluate, measure_cost, predict
from .journal import Clock, Journal
from .run import Run, prepare
from .state import header, load_detector, load_trained

__all__ = ["evaluate_run", "load_config", "load_trained", "predict", "train"]


def train(cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Trains a detector, evaluates it and writes its folder; returns the figures of metrics.json.

    Args:
        cfg: from ``load_config``; OUTPUT_DIR takes model.safetensors, checkpoint.pth, metrics.jsonl, TensorBoard
            events, run.json and metrics.json.
        resume: continue from OUTPUT_DIR's checkpoint.

    Raises:
        UserError: for data, settings or weights that do not fit, a folder that holds another run, a non-finite loss.
        SystemExit: after SIGTERM or SIGINT, when the step is done and saved.
    """
    check_use(cfg.OUTPUT_DIR, resume, "OUTPUT_DIR")
    run = prepare(cfg, resume)
    with claimed(run.folder, resume, "OUTPUT_DIR", run.is_main), naming_lost_ranks(resume_command()):
        changed, tally = run.load() if resume else ([], {})
        journal = Journal(run, changed, tally) if run.is_main else None
        with closing(journal) if journal else nullcontext():
            return _train(run, journal, Clock(tally.get("speed", [])))


def _train(run: Run, journal: Journal | None, clock: Clock) -> dict[str, Any]:
    """The loop, from where the run stands."""
    cfg, schedule = run.cfg, run.schedule
    _, trunk = find_trunk(run.model)
    monitor = OperatorMonitor(run.model, trunk, run.optimizer) if journal and cfg.SOLVER.LOG_OPERATORS else None
    batches = iter(run.batches())
    run.network.train()
    figures: dict[str, Any] | None = None
    with EventStorage(run.done), Pace(cfg.SOLVER.CHECKPOINT_MINUTES, cfg.SOLVER.CHECKPOINT_STEPS) as pace:
        if _evaluation_is_due(run) and not agree(int(journal is not None and journal.log.has("val", run.done)))[0]:
            figures = _evaluate(run, journal)  # the run stopped between the checkpoint and this
            clock.restart()
        while run.done < run.total:
            try:
                batch = next(batches)
            except RuntimeError:
                if not pace.signal:  # a signal to the whole group of processes ends the workers too
                    raise
                _save(run, journal, clock, pace)
            lr, logged = schedule.lr(run.done), _is_logged(run)
            if logged and monitor:
                monitor.watch()
            losses, grad_norm = train_step(run, batch, lr)
            run.done += 1
            clock.tick()
            if journal:
                journal.add(losses, grad_norm)
            if logged:
                clock.close_stretch()
                if journal:
                    journal.train(run.done, {"lr": lr} | (monitor.values() if monitor else {}), clock)
            evaluated = _evaluation_is_due(run)
            if pace.after_step(run.done) or evaluated or run.done % schedule.checkpoint_steps == 0:
                _save(run, journal, clock, pace)
            if evaluated:
                figures = _evaluate(run, journal)
                clock.restart()
    if figures is None:
        figures = evaluate(cfg, run.model, run.test_set.name)
    return _finish(run, figures, clock) if run.is_main else {}


def _is_logged(run: Run) -> bool:
    """Whether the step that comes now gets a line in the log."""
    return (run.done + 1) % run.cfg.SOLVER.LOG_STEPS == 0 or run.done + 1 == run.total


def _evaluation_is_due(run: Run) -> bool:
    every = run.schedule.eval_steps
    return run.done == run.total or bool(run.done and every and run.done % every == 0)


def _evaluate(run: Run, journal: Journal | None) -> dict[str, Any]:
    """Evaluates, tells, and keeps the weights when they are the best so far."""
    figures = evaluate(run.cfg, run.model, run.test_set.name)
    run.network.train()
    if journal:
        best = max(journal.log.values("val", "box_ap"), default=-1.0)
        journal.val(run.done, figures)
        if figures["box_ap"] > best:
            _save_model(run, BEST)
    return figures


def _save(run: Run, journal: Journal | None, clock: Clock, pace: Pace) -> None:
    """Writes the checkpoint, keeps every k-th, and ends the program when a signal asked for it."""
    if journal:
        journal.log.sync()
    run.save({"speed": clock.speed, **(journal.tally() if journal else {})})
    pace.saved()
    clock.restart()
    every = run.schedule.keep_steps
    if run.is_main and every and run.done % every == 0:
        keep(run.folder, run.done)
    if pace.signal:
        pace.stop(run.done)


def _save_model(run: Run, name: str) -> None:
    save_model(run.folder / name, run.model.state_dict(), header(run.cfg, run.model, run.training_set.categories))


def _finish(run: Run, figures: dict[str, Any], clock: Clock) -> dict[str, Any]:
    _save_model(run, WEIGHTS)
    figures |= measure_cost(run.cfg, run.model, run.test_set.name)
    figures["train_images_per_s"] = round(run.schedule.batch_size / clock.seconds_per_step, 2)
    figures["skipped_images"] = run.skips.count
    write_json(run.folder / METRICS, figures)
    return figures


def train_step(run: Run, batch: list[dict[str, Any]], lr: float) -> tuple[dict[str, Tensor], Tensor]:
    """One update; returns the losses and the norm of the gradient before clipping."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    losses = _losses(run.cfg, run.network, batch, run.done)
    run.optimizer.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.cfg.SOLVER.CLIP_NORM or float("inf"))
    if not torch.isfinite(grad_norm):
        where = first_nonfinite((name, p.grad) for name, p in run.model.named_parameters())
        raise UserError(_diverged(run.done, f"the gradient of {where} is not finite", batch))
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
    kind = autocast_type("auto" if cfg.SOLVER.AMP.ENABLED else "fp32", cfg.MODEL.DEVICE)
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=kind) if kind else nullcontext()


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
    path = make_folder(folder) / METRICS
    before = read_json(path, "metrics") if own and path.is_file() else {}
    write_json(path, {**before, **figures})
    return figures
