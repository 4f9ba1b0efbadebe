"""The parts of a detection run, built and checked: ready for its first step, or for the next one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from backbones.training.folder import CHECKPOINT
from backbones.training.processes import random_states
from backbones.training.rng import seed_everything, set_random_state
from backbones.training.skips import SkipCounter
from backbones.training.state import Contract, check_length, read_checkpoint, save_checkpoint
from backbones.utils.errors import UserError

from .datasets import CocoSummary, register_datasets
from .loader import training_loader, training_records
from .solver import Schedule, make_optimizer, make_schedule
from .state import TASK, config_values, load_detector

# What may differ between a run and its continuation: where data and results are, how they are read and shown, for how
# long it trains, and what is kept.
ALLOWED = (
    "OUTPUT_DIR",
    "DATASETS.*",
    "DATALOADER.NUM_WORKERS",
    "INPUT.MAX_PIXELS",
    "MODEL.DEVICE",
    "MODEL.VIT.weights*",
    "MODEL.WEIGHTS",
    "SOLVER.EPOCHS",
    "SOLVER.CHECKPOINT_*",
    "SOLVER.KEEP_EPOCHS",
    "SOLVER.LOG_STEPS",
    "SOLVER.LOG_OPERATORS",
    "TEST.EVAL_EPOCHS",
)


@dataclass
class Run:
    """The parts of a training run; ``done`` steps are behind it."""

    cfg: CfgNode
    folder: Path
    training_set: CocoSummary
    test_set: CocoSummary
    records: list[dict[str, Any]]
    model: nn.Module
    network: nn.Module  # the model, wrapped when there are several processes
    optimizer: Optimizer
    schedule: Schedule
    skips: SkipCounter
    contract: Contract
    done: int = 0

    @property
    def is_main(self) -> bool:
        return comm.is_main_process()

    @property
    def total(self) -> int:
        return self.schedule.total_steps

    def save(self, tally: dict[str, Any]) -> None:
        """Writes the checkpoint; every process must call it, the main one writes.

        Args:
            tally: plain values that ``load`` gives back.
        """
        state = {
            **self.contract.to_dict(),
            "step": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_states(),
            "tally": tally,
            "skipped": self.skips.marked,
        }
        if self.is_main:
            save_checkpoint(self.folder / CHECKPOINT, state)

    def load(self) -> tuple[list[str], dict[str, Any]]:
        """Goes where the checkpoint stopped; returns the settings that differ from it and may, and what was counted.

        Raises:
            UserError: for a damaged checkpoint, and one of other settings, data or processes.
        """
        path = self.folder / CHECKPOINT
        state = read_checkpoint(path)
        changed = self.contract.check(state, ALLOWED, path)
        check_length(path, state["step"], self.total, "SOLVER.EPOCHS")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]
        self.skips.mark(state["skipped"])
        set_random_state(state["random"][comm.get_rank()])
        return changed, state["tally"]

    def batches(self) -> DataLoader:
        """The batches from the next step to the last."""
        return training_loader(self.cfg, self.records, self.skips, self.done, self.total)


def prepare(cfg: CfgNode, resume: bool = False) -> Run:
    """Checks the data and builds everything a run needs, at its first step.

    Args:
        resume: the weights will come from a checkpoint, so that none are read here.
    """
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not divisible by {world} processes.")
    training_set, test_set = register_datasets(cfg)
    records = training_records(training_set.name, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    data = {"classes": training_set.classes, "images": len(records), "digest": training_set.digest}
    contract = Contract(TASK, config_values(cfg), data)
    if resume:
        cfg.MODEL.VIT.weights, cfg.MODEL.WEIGHTS = None, ""
    seed_everything(cfg.SEED, comm.get_rank())
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_detector(model, cfg.MODEL.WEIGHTS, strict=False)
    # A model on the CPU must name no device to DistributedDataParallel.
    devices = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
    return Run(
        cfg=cfg,
        folder=Path(cfg.OUTPUT_DIR),
        training_set=training_set,
        test_set=test_set,
        records=records,
        model=model,
        network=create_ddp_model(model, broadcast_buffers=False, **devices),
        optimizer=make_optimizer(cfg, model),
        schedule=make_schedule(cfg, len(records)),
        skips=SkipCounter(len(records)),
        contract=contract,
    )
