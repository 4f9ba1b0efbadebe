"""mmengine hooks: randomness that survives a restart, checkpoints and stops, and the metrics of a run."""

import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmseg.registry import HOOKS

from backbones.training.folder import BEST, CHECKPOINT, keep
from backbones.training.groups import DERIVED, describe_rates
from backbones.training.log import MetricsLog
from backbones.training.monitor import OperatorMonitor
from backbones.training.processes import agree
from backbones.training.rng import seed_everything
from backbones.training.stopping import Pace
from backbones.utils.errors import UserError
from backbones.utils.files import FORMAT

from .datasets import ITERATION_SEED

_TIMES = 1000  # of iterations, that a checkpoint keeps


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Makes dropout and drop path a function of seed, iteration and process, so that a resumed run equals one piece."""

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(ITERATION_SEED, runner.seed, runner.iter, runner.rank)


@HOOKS.register_module()
class ContractHook(Hook):
    """Saves what a run continues from, before each evaluation and when it is time, and stops it between two steps.

    Args:
        interval: iterations from one checkpoint to the next.
        minutes: also save when this long has passed; 0 = not for the time.
        keep: keep the checkpoint of every so many iterations beside the last; 0 = the last alone.
    """

    priority = "VERY_LOW"  # after what changes the weights, the learning rate and the log

    def __init__(self, interval: int, minutes: float = 30.0, keep: int = 0):
        for name, value in (("interval", interval), ("minutes", minutes), ("keep", keep)):
            if not isinstance(value, int | float) or value < (name == "interval"):
                raise UserError(f"default_hooks.checkpoint.{name} is {value!r}; it must be a number, 0 or more.")
        self.interval, self.keep = interval, keep
        self.pace = Pace(minutes, interval)  # entered around mmengine's loop

    def before_train(self, runner) -> None:
        due = runner.iter and (runner.iter % runner.train_loop.val_interval == 0 or runner.iter == runner.max_iters)
        told = metrics_hook(runner).has_evaluated(runner.iter)
        if due and not agree(int(told))[0]:  # the run stopped between the checkpoint and this
            runner.val_loop.run()

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        done = runner.iter + 1
        evaluates = done % runner.train_loop.val_interval == 0 or done == runner.max_iters
        if self.pace.after_step(done) or evaluates:
            self.save(runner, done)

    def save(self, runner, done: int) -> None:
        """Writes the checkpoint of ``done`` iterations, and ends the program when a signal asked for it."""
        meta = {"epoch": runner.epoch, "iter": done}
        runner.save_checkpoint(runner.work_dir, CHECKPOINT, by_epoch=False, save_param_scheduler=False, meta=meta)
        self.pace.saved()
        if is_main_process() and self.keep and done % self.keep == 0:
            keep(Path(runner.work_dir), done)
        if self.pace.signal:
            self.pace.stop(done)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        # Histories of logged scalars are objects of mmengine; metrics.jsonl keeps the values.
        info = checkpoint["message_hub"]["runtime_info"]
        plain = {key: value for key, value in info.items() if _is_plain(value)}
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": plain, "resumed_keys": {}}
        skipped = runner.train_dataloader.dataset.skips.marked
        checkpoint |= {"format": FORMAT, **runner.contract.to_dict(), "skipped": skipped}
        checkpoint["tally"] = metrics_hook(runner).tally()

    def before_val_epoch(self, runner) -> None:
        # Plain batch norms have statistics of their own in each process; those of the main one are saved.
        for buffer in runner.model.buffers():
            broadcast(buffer)

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        details = validation_details(runner)
        if runner.train_loop is None or not is_main_process() or details is None:
            return
        if metrics_hook(runner).is_best:
            runner.save_model(BEST)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


@HOOKS.register_module()
class MetricsHook(Hook):
    """Writes metrics.jsonl and TensorBoard events, and prints a line every ``interval`` iterations.

    Args:
        interval: iterations.
        operators: log scores, outputs and steps of KArAt's operators, and gradients by part.
    """

    def __init__(self, interval: int = 50, operators: bool = True):
        self.interval, self.operators = interval, operators
        self._monitor: OperatorMonitor | None = None
        self._norms: list[float] = []
        self.iteration_seconds: list[float] = []
        self._log: MetricsLog | None = None
        self._before = 0.0
        self.is_best = False  # the last evaluation

    def tally(self) -> dict[str, list[float]]:
        """What was counted since the last line of the log, which is on the disk then, and the times of iterations."""
        if self._log is not None:
            self._log.sync()
        return {"norms": self._norms, "seconds": self.iteration_seconds[-_TIMES:]}

    def restore(self, tally: dict[str, list[float]]) -> None:
        """Goes on with what ``tally`` gave."""
        self._norms, self.iteration_seconds = list(tally["norms"]), list(tally["seconds"])

    def has_evaluated(self, iteration: int) -> bool:
        """Whether the log has the evaluation of an iteration; only the main process knows."""
        return self._log is not None and self._log.has("val", iteration)

    def before_train(self, runner) -> None:
        if is_main_process():
            self._log = MetricsLog(runner.work_dir, resume_step=runner.iter or None)
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            operator_lr = (runner.cfg.optim_wrapper.get("paramwise_cfg") or {}).get("operator_lr", DERIVED)
            print(f"{runner.max_iters} iterations{describe_rates(model.backbone.net, operator_lr)}", flush=True)
            if self.operators:
                self._monitor = OperatorMonitor(model, model.backbone.net, runner.optim_wrapper.optimizer)
        self._start, self._first = time.perf_counter(), runner.iter
        self._before = self._start

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._monitor and self._is_logged(runner):
            self._monitor.watch()

    def _is_logged(self, runner) -> bool:
        """Whether the iteration that runs now gets a line."""
        step = runner.iter + 1
        return step % self.interval == 0 or step == runner.max_iters

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None) -> None:
        now = time.perf_counter()
        self.iteration_seconds.append(now - self._before)
        self._before = now
        if "train/grad_norm" in runner.message_hub.log_scalars:
            self._norms.append(float(runner.message_hub.get_scalar("train/grad_norm").current()))
        if self._log is None or not self._is_logged(runner):
            return
        step = runner.iter + 1
        values = {name: torch.as_tensor(value).item() for name, value in (outputs or {}).items()}
        values["lr"] = max(lr for lrs in runner.optim_wrapper.get_lr().values() for lr in lrs)
        if self._norms:
            values |= {"grad_norm": self._norms[-1], "grad_norm_max": max(self._norms)}
            self._norms.clear()
        watched = self._monitor.values() if self._monitor else {}
        self._log.write(step, self._epoch(runner, step), "train", values | watched)
        left = (now - self._start) / (step - self._first) * (runner.max_iters - step)
        print(
            f"iteration {step}/{runner.max_iters}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  {left:.0f} s left"
        )

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self._before = time.perf_counter()  # an evaluation is no part of an iteration
        details = validation_details(runner)
        if not is_main_process() or details is None:
            return
        values = {name: details[name] for name in ("miou", "macc", "aacc")}
        if self._log is not None:
            self.is_best = values["miou"] > max(self._log.values("val", "miou"), default=-1.0)
            self._log.write(runner.iter, self._epoch(runner, runner.iter), "val", values)
        print("validation  " + "  ".join(f"{name} {value:.2f}" for name, value in values.items()))

    def after_train(self, runner) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    @staticmethod
    def _epoch(runner, step: int) -> float:
        loader = runner.train_dataloader
        return step * loader.batch_size * runner.world_size / len(loader.dataset)


def metrics_hook(runner) -> MetricsHook:
    """The run's MetricsHook, which every config of this project has."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, MetricsHook)), None)
    if hook is None:
        raise UserError("custom_hooks has no MetricsHook; start from a config of segmentation/configs.")
    return hook


def validation_details(runner) -> dict[str, Any] | None:
    """What DetailedIoUMetric found in the last evaluation; None before one, and outside the main process."""
    for metric in runner.val_evaluator.metrics:
        if getattr(metric, "details", None) is not None:
            return metric.details
    return None


def median_iteration_seconds(runner) -> float | None:
    """Median time of a training iteration with its data; None when none was run."""
    seconds = metrics_hook(runner).iteration_seconds
    return torch.tensor(seconds).median().item() if seconds else None
