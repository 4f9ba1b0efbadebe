"""Rows of whole networks: images per second forward and in training steps, side by side."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import create_backbone
from backbones.utils.measure import count_parameters

from .options import DTYPES
from .timing import interleaved, peak_mib, summary

CLASSES = 1000
LEARNING_RATE = 1e-4


class Trainee:
    """A network with its optimizer, on one batch of random images."""

    def __init__(self, arch: str, batch: int, dtype: str, device: torch.device, compiled: bool, seed: int):
        torch.manual_seed(seed)
        self.network = create_backbone(arch, num_classes=CLASSES).to(device)
        self.run: Any = torch.compile(self.network) if compiled else self.network
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=fused)
        self.images = torch.randn(batch, 3, *self.network.config.img_size, device=device)
        self.targets = torch.randint(CLASSES, (batch,), device=device)
        self.precision = None if dtype == "fp32" else DTYPES[dtype]
        self.losses: list[Tensor] = []

    def forward(self, _: Any = None) -> Tensor:
        """Logits of the evaluated network."""
        self.network.eval()
        with torch.no_grad():
            return self._logits()

    def step(self, _: Any = None) -> None:
        """Forward, cross entropy, backward, AdamW."""
        self.network.train()
        loss = F.cross_entropy(self._logits().float(), self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def _logits(self) -> Tensor:
        with torch.autocast(self.images.device.type, dtype=self.precision, enabled=self.precision is not None):
            return self.run(self.images)


def check_gradients(network: nn.Module) -> str | None:
    """What is wrong with the gradients of the last step, or None."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            return f"wrong: {name} got no gradient"
        if not parameter.grad.isfinite().all():
            return f"wrong: the gradient of {name} is not finite"
    return None


def run_models(
    archs: list[str], batch: int, dtype: str, device: torch.device, compiled: bool, rounds: int, seed: int
) -> list[dict[str, Any]]:
    """One row per preset; a row without speeds has ``problem``, the reason. Ratios are to the first preset."""
    rows, trainees = [], {}
    for arch in archs:
        row: dict[str, Any] = {"arch": arch, "batch": batch, "dtype": dtype, "compiled": compiled, "problem": None}
        rows.append(row)
        try:
            trainee, peak = _started(arch, batch, dtype, device, compiled, seed)
        except torch.OutOfMemoryError:
            row["problem"] = "out of memory"
            continue
        row["params"] = count_parameters(trainee.network)
        row["problem"] = check_gradients(trainee.network)
        if row["problem"] is None:
            row["peak_mib"] = peak
            trainees[arch] = trainee
    times = interleaved({arch: [t.forward, t.step] for arch, t in trainees.items()}, device, rounds, warmup=2)
    for row in rows:
        if row["arch"] in trainees:
            losses = torch.stack(trainees[row["arch"]].losses).tolist()
            row |= {"loss_first": losses[0], "loss_last": losses[-1]}
            if not torch.tensor(losses).isfinite().all():
                row |= {"problem": "wrong: a loss is not finite", "peak_mib": None}
    for row in rows:
        if row["problem"] is None:
            forward, step = map(summary, times[row["arch"]])
            first = times.get(archs[0]) if rows[0]["problem"] is None else None
            row |= {
                "forward_img_per_s": 1e3 * batch / forward["ms"],
                "train_img_per_s": 1e3 * batch / step["ms"],
                "train_spread": step["spread"],
                "forward_ratio": summary(first[0])["ms"] / forward["ms"] if first else None,
                "train_ratio": summary(first[1])["ms"] / step["ms"] if first else None,
            }
    return rows


def _started(
    arch: str, batch: int, dtype: str, device: torch.device, compiled: bool, seed: int
) -> tuple[Trainee, float | None]:
    """A trainee after its first step, and the MiB that the network, its optimizer and a whole step took."""
    made: list[Trainee] = []

    def start() -> None:
        made.append(Trainee(arch, batch, dtype, device, compiled, seed))
        made[0].step()
        made[0].step()  # with the optimizer's state in place

    peak = peak_mib(start, device)
    return made[0], peak
