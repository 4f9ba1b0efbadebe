"""What a run tells while it trains: lines on the terminal, metrics.jsonl and TensorBoard, run.json, its speed."""

import time
from typing import Any

import torch
from torch import Tensor

from backbones.training.groups import describe_rates
from backbones.training.log import MetricsLog, write_provenance

from .backbone import find_trunk
from .run import Run
from .state import config_values


class Clock:
    """Seconds per training step, measured over stretches without evaluation and checkpoints."""

    def __init__(self, speed: list[float]):
        self.speed = list(speed)  # seconds per step of each stretch
        self.restart()

    def restart(self) -> None:
        self._start, self._steps = time.perf_counter(), 0

    def tick(self) -> None:
        self._steps += 1

    def close_stretch(self) -> None:
        self.speed.append((time.perf_counter() - self._start) / max(1, self._steps))
        self.restart()

    @property
    def seconds_per_step(self) -> float:
        """The median over the stretches."""
        return sorted(self.speed)[len(self.speed) // 2] if self.speed else float("nan")


class Journal:
    """The log of a run, held by the main process.

    Args:
        run: at the step that it begins or continues with.
        changed: settings that differ from the checkpoint's and may.
        tally: what ``tally`` returned when the checkpoint was written.
    """

    def __init__(self, run: Run, changed: list[str], tally: dict[str, Any]):
        self.schedule = run.schedule
        self._steps: int = tally.get("steps", 0)  # since the last line of the log
        self._sums: dict[str, Tensor | float] = {n: torch.tensor(v) for n, v in tally.get("sums", {}).items()}
        self._norms = [torch.tensor(norm) for norm in tally.get("norms", [])]
        self.log = MetricsLog(run.folder, resume_step=run.done or None)
        write_provenance(run.folder, config_values(run.cfg), run.cfg.SEED, _protocol(run))
        rates = describe_rates(find_trunk(run.model)[1], run.cfg.SOLVER.OPERATOR_LR)
        print(f"{run.cfg.MODEL.VIT.arch}: {run.schedule}{rates}", flush=True)
        if run.done:
            lines = "".join(f"\n  changed: {line}" for line in changed)
            print(f"continuing after step {run.done} of {run.folder}{lines}", flush=True)

    def tally(self) -> dict[str, Any]:
        """What was counted since the last line of the log, as plain values."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"steps": self._steps, "sums": sums, "norms": [float(norm) for norm in self._norms]}

    def add(self, losses: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Counts a step's losses into the mean that the next line of the log shows, and the gradient's norm."""
        self._steps += 1
        self._norms.append(grad_norm.detach())
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach()

    def train(self, done: int, others: dict[str, float], clock: Clock) -> None:
        values = {name: float(total) / self._steps for name, total in self._sums.items()}
        norms = {"grad_norm": float(self._norms[-1]), "grad_norm_max": float(max(self._norms))}
        self._steps, self._sums, self._norms = 0, {}, []
        images_per_s = self.schedule.batch_size / clock.speed[-1]
        values = {"loss": sum(values.values()), **values, **norms, **others, "images_per_s": images_per_s}
        self.log.write(done, self.schedule.epoch(done), "train", values)
        minutes = (self.schedule.total_steps - done) * clock.seconds_per_step / 60
        print(
            f"step {done}/{self.schedule.total_steps}  epoch {self.schedule.epoch(done):.2f}  "
            f"loss {values['loss']:.3f}  lr {values['lr']:.2e}  {images_per_s:.1f} images/s  {minutes:.1f} min left",
            flush=True,
        )

    def val(self, done: int, figures: dict[str, Any]) -> None:
        scores = {name: value for name, value in figures.items() if isinstance(value, float)}
        self.log.write(done, self.schedule.epoch(done), "val", scores)
        print("  ".join(f"{name} {value:.2f}" for name, value in scores.items()), flush=True)

    def close(self) -> None:
        self.log.close()


def _protocol(run: Run) -> dict[str, Any]:
    sets = {"train": run.training_set, "test": run.test_set}
    described = {
        name: {"json": s.json_file, "images": s.images, "annotations": s.annotations, "classes": s.classes}
        for name, s in sets.items()
    }
    return {**described, "image_size": run.cfg.INPUT.IMAGE_SIZE, "masks": run.cfg.MODEL.MASK_ON}
