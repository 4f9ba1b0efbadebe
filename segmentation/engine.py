"""Trains and evaluates a segmentor with mmengine's Runner, and writes what every task writes."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed, is_main_process, master_only
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from mmseg.apis import inference_model
from mmseg.utils import register_all_modules
from numpy.typing import NDArray
from torch import nn

from backbones.training.folder import CHECKPOINT, METRICS, WEIGHTS, check_use, claimed
from backbones.training.log import write_provenance
from backbones.training.measure import count_gflops, count_parameters, images_per_second, peak_memory_mb
from backbones.training.processes import agree, naming_lost_ranks
from backbones.training.state import Contract, check_length, load_model, read_checkpoint, save_model, write_checkpoint
from backbones.training.stopping import resume_command
from backbones.utils.documents import read_json
from backbones.utils.errors import UserError
from backbones.utils.files import make_folder, write_json

from . import state as files
from .config import plan_training
from .description import build_segmentor
from .hooks import ContractHook, median_iteration_seconds, metrics_hook, validation_details

# What may differ between a run and its continuation: where data and results are, how they are read and shown, for how
# long it trains, and what is kept.
ALLOWED = (
    "work_dir",
    "data_root",
    "*.data_root",
    "*.num_workers",
    "*.persistent_workers",
    "*.max_pixels",
    "schedule.epochs",
    "schedule.max_iters",
    "schedule.val_epochs",
    "default_hooks.checkpoint.*",
    "default_hooks.logger.*",
    "custom_hooks.*.interval",
    "custom_hooks.*.operators",
    "log_*",
    "launcher",
    "env_cfg.*",
    "load_from",
    "resume",
    "model.backbone.weights*",
)


class SegmentationRunner(Runner):
    """mmengine's Runner, whose checkpoints are whole or absent, sealed, and read without unpickling objects."""

    contract: Contract | None = None

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)  # it runs on GPUs only
        return super().wrap_model(model_wrapper_cfg, model)

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        save = super().save_checkpoint
        write_checkpoint(Path(out_dir) / filename, lambda part: save(out_dir, part.name, *args, **kwargs))

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **kwargs: Any) -> dict:
        state = files.read(filename)
        self.call_hook("after_load_checkpoint", checkpoint=state)
        files.load_into(_unwrap(self.model), state["state_dict"], filename)
        self._has_loaded = True
        return state

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Goes where the checkpoint stopped; tells which settings differ from it and may.

        Raises:
            UserError: for a damaged checkpoint, and one of other settings, data or processes.
        """
        path = Path(filename)
        state = read_checkpoint(path)
        changed = self.contract.check(state, ALLOWED, path)
        done = state["meta"]["iter"]
        check_length(path, done, self.max_iters, "schedule.epochs or schedule.max_iters")
        super().resume(filename, *args, **kwargs)
        self._advance_schedulers(done)
        self.train_dataloader.dataset.skips.mark(state["skipped"])
        metrics_hook(self).restore(state["tally"])
        if is_main_process():
            lines = "".join(f"\n  changed: {line}" for line in changed)
            print(f"continuing after iteration {done} of {path.parent}{lines}", flush=True)

    def _advance_schedulers(self, iterations: int) -> None:
        """Learning rates as this run's schedule has them, which a longer run's checkpoint does not."""
        for group in self.optim_wrapper.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        self.param_schedulers = self.build_param_scheduler(self.cfg.param_scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no step of the optimizer came before these
            for _ in range(iterations):
                for scheduler in self.param_schedulers:
                    scheduler.step()

    def save_model(self, name: str) -> None:
        """Writes the weights, and what builds them again, into the run's folder."""
        model = _unwrap(self.model)
        meta = self.val_dataloader.dataset.metainfo
        save_model(Path(self.work_dir) / name, model.state_dict(), files.header(self.cfg, model, meta))


def train(cfg: Config, resume: bool = False) -> dict[str, Any]:
    """Trains as ``cfg`` says, evaluates, and writes model.safetensors, metrics.json, metrics.jsonl and run.json.

    Args:
        cfg: from ``load_config``.
        resume: continue from the checkpoint in ``cfg.work_dir``.

    Returns:
        What metrics.json holds.

    Raises:
        UserError: for data, settings or weights that do not fit, a folder that holds another run, a non-finite loss.
        SystemExit: after SIGTERM or SIGINT, when the step is done and saved.
    """
    settings, folder = cfg.to_dict(), Path(cfg.work_dir)
    check_use(folder, resume, "--work-dir")
    _prepare(cfg)
    if resume:
        cfg.load_from, cfg.resume, cfg.model.backbone.weights = str(folder / CHECKPOINT), True, None
    plan, data = plan_training(cfg)
    with claimed(folder, resume, "--work-dir", is_main_process()), naming_lost_ranks(resume_command()):
        if is_main_process():
            print("derived  " + "  ".join(f"{name} {value:g}" for name, value in plan.items()))
            write_provenance(folder, cfg.to_dict(), cfg.randomness.seed, {"data_root": cfg.data_root, **plan})
        runner = _build_runner(cfg)
        runner.contract = Contract(files.TASK, settings, data)
        _train(runner)
        metrics = _measure(runner, cfg) if is_main_process() else {}
        seconds = median_iteration_seconds(runner)
        if not is_main_process():
            return {}
        runner.save_model(WEIGHTS)
        if seconds is not None:
            metrics["train_images_per_s"] = plan["batch_size"] / seconds
        metrics["skipped_images"] = runner.train_dataloader.dataset.skips.count
        return _write_metrics(folder, metrics)


def _train(runner: SegmentationRunner) -> None:
    """mmengine's loop, and an evaluation when the run was resumed after its last."""
    hook = next(hook for hook in runner.hooks if isinstance(hook, ContractHook))
    with hook.pace:
        try:
            runner.train()
        except RuntimeError:
            if not hook.pace.signal:  # a signal to the whole group of processes ends the data loader's workers too
                raise
            hook.save(runner, runner.iter)
    if not agree(int(validation_details(runner) is not None))[0]:
        runner.val_loop.run()


def evaluate(cfg: Config) -> dict[str, Any]:
    """Evaluates the weights ``cfg.load_from``, else those of the run in ``cfg.work_dir``, and writes metrics.json.

    Without either, the model is evaluated as it is initialized (from ``model.backbone.weights`` if set), which it says.
    """
    folder = make_folder(cfg.work_dir)
    _prepare(cfg)
    weights = cfg.load_from or next((p for p in (folder / WEIGHTS, folder / CHECKPOINT) if p.exists()), None)
    cfg.load_from = None
    for name in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        cfg[name] = None
    cfg.default_hooks.checkpoint = None
    runner = _build_runner(cfg)
    if weights:
        runner.load_checkpoint(str(weights))
    if is_main_process():
        print(f"evaluating {weights}" if weights else f"{folder} holds no weights; evaluating an untrained head")
        if not (folder / "run.json").exists():
            write_provenance(folder, cfg.to_dict(), cfg.randomness.seed, {"data_root": cfg.data_root})
    runner.val()
    return _write_metrics(folder, _measure(runner, cfg)) if is_main_process() else {}


def load_trained(run_dir: str | Path, device: str | torch.device | None = None) -> nn.Module:
    """The segmentor of a finished run, in evaluation mode, as mmseg's ``inference_model`` takes it.

    Raises:
        UserError: when ``run_dir`` holds no model.safetensors of a segmentation run.
    """
    path = Path(run_dir) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} does not exist. Train with tools/train_seg.py --work-dir {run_dir} first.")
    register_all_modules(init_default_scope=True)
    description, meta = files.load_description(path)
    model = revert_sync_batchnorm(build_segmentor(description, path))
    files.load_into(model, load_model(path), path)
    model.cfg, model.dataset_meta = description, meta
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def predict(run_dir: str | Path, image_paths: Sequence[str | Path]) -> list[NDArray[np.uint8]]:
    """Class maps (H, W) at each image's own size, with the values of mask files: k is class k of the data, from 1."""
    model = load_trained(run_dir)
    results = [inference_model(model, str(path)) for path in image_paths]
    return [(r.pred_sem_seg.data[0].cpu().numpy() + 1).astype(np.uint8) for r in results]


def _prepare(cfg: Config) -> None:
    """What depends on this machine: process group, precision."""
    cuda = torch.cuda.is_available()
    cfg.env_cfg.dist_cfg = {"backend": "nccl" if cuda else "gloo"}
    if cfg.get("launcher", "none") != "none" and not is_distributed():
        if cuda:
            init_dist(cfg.launcher, **cfg.env_cfg.dist_cfg)
        else:
            # mmengine's init_dist and its default wrapper select a GPU; torchrun has set what a CPU needs.
            torch.distributed.init_process_group(**cfg.env_cfg.dist_cfg)
            cfg.model_wrapper_cfg = {"device_ids": None, "broadcast_buffers": False}
    if cfg.amp and cuda and torch.cuda.is_bf16_supported():
        # bf16 has the range of fp32: no loss scale.
        cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=1.0)


def _build_runner(cfg: Config) -> SegmentationRunner:
    # mmengine keeps one log, message hub and visualizer per name and process.
    cfg.experiment_name = f"{Path(cfg.work_dir).name}_{time.time_ns()}"
    cfg.visualizer.name = cfg.experiment_name
    return SegmentationRunner.from_cfg(cfg)


def _measure(runner: SegmentationRunner, cfg: Config) -> dict[str, Any]:
    """The last evaluation's figures, and size and speed of the network on one crop."""
    model = _unwrap(runner.model).eval()
    image = torch.zeros(1, 3, cfg.crop_size, cfg.crop_size, device=next(model.parameters()).device)

    def forward() -> Any:
        return model(image, mode="tensor")

    return {
        **(validation_details(runner) or {}),
        "parameters": count_parameters(model),
        "gflops": count_gflops(forward),
        "images_per_s": images_per_second(forward, 1),
        "measured_image_size": cfg.crop_size,
        "peak_memory_mb": peak_memory_mb(),
        "validation_images": len(runner.val_dataloader.dataset),
        "data_root": cfg.data_root,
    }


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Writes metrics.json; figures of an earlier run in the folder that this one has no word on stay."""
    path = folder / METRICS
    metrics = {**(read_json(path, "metrics") if path.exists() else {}), **metrics}
    write_json(path, metrics)
    print(f"wrote {path}: mIoU {metrics['miou']:.2f} (most frequent class {metrics['miou_most_frequent_class']:.2f})")
    return metrics


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
