"""Rows of whole networks: images per second forward and in training steps, side by side."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import create_backbone
from backbones.config import BackboneConfig
from backbones.models.presets import preset_config
from backbones.training.measure import count_parameters
from backbones.utils.documents import parse_yaml
from backbones.utils.errors import UserError

from .options import DTYPES
from .timing import interleaved, peak_mib, summary

CLASSES = 1000
LEARNING_RATE = 1e-4


def parse_network(text: str, maps: int | None = None) -> BackboneConfig:
    """A preset with settings, as ``karat_nano_patch8_64+window_size=8+attention.order=phi_w``.

    Args:
        maps: pixels of the images that it makes maps of, as the backbone of a detector: without class token, classifier
            and last norm. None = a classifier at its own size.

    Raises:
        UserError: for an unknown preset or setting, and a value that does not fit.
    """
    arch, *settings = text.split("+")
    config = preset_config(arch).merged({"num_classes": CLASSES})
    if maps is not None:
        config = config.merged({"img_size": maps, "num_classes": 0, "class_token": False, "final_norm": False})
    merged: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)?", key):
            raise UserError(f"{text!r} holds {setting!r}; settings are +KEY=VALUE, such as +attention.order=phi_w.")
        section, _, name = key.rpartition(".")
        (merged.setdefault(section, {}) if section else merged)[name] = parse_yaml(value, f"{text!r}: {key}")
    return config.merged(merged)


class Trainee:
    """A network with its optimizer, on one batch of random images; what makes maps learns to make them small."""

    def __init__(self, arch: BackboneConfig, batch: int, dtype: str, device: torch.device, compiled: bool, seed: int):
        torch.manual_seed(seed)
        self.network = create_backbone(arch).to(device)
        if not arch.num_classes:
            self.network.forward = lambda images: self.network.forward_maps(images)[-1]
        self.run: Any = torch.compile(self.network) if compiled else self.network
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, fused=fused)
        self.images = torch.randn(batch, 3, *self.network.config.img_size, device=device)
        self.targets = torch.randint(CLASSES, (batch,), device=device)
        self.precision = None if dtype == "fp32" else DTYPES[dtype]
        self.losses: list[Tensor] = []

    def forward(self, _: Any = None) -> Tensor:
        """Logits, or maps, of the evaluated network."""
        self.network.eval()
        with torch.no_grad():
            return self._logits()

    def step(self, _: Any = None) -> None:
        """Forward, cross entropy (of maps: their mean square), backward, AdamW."""
        self.network.train()
        out = self._logits().float()
        loss = F.cross_entropy(out, self.targets) if self.network.config.num_classes else out.square().mean()
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
    archs: list[str],
    batch: int,
    dtype: str,
    device: torch.device,
    compiled: bool,
    rounds: int,
    seed: int,
    maps: int | None = None,
) -> list[dict[str, Any]]:
    """One row per network; a row without speeds has ``problem``, the reason. Ratios are to the first.

    Args:
        archs, maps: see ``parse_network``.
    """
    rows, trainees = [], {}
    for arch in archs:
        row: dict[str, Any] = {"arch": arch, "batch": batch, "dtype": dtype, "compiled": compiled, "problem": None}
        rows.append(row)
        try:
            trainee, peak = _started(parse_network(arch, maps), batch, dtype, device, compiled, seed)
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
    arch: BackboneConfig, batch: int, dtype: str, device: torch.device, compiled: bool, seed: int
) -> tuple[Trainee, float | None]:
    """A trainee after its first step, and the MiB that the network, its optimizer and a whole step took."""
    made: list[Trainee] = []

    def start() -> None:
        made.append(Trainee(arch, batch, dtype, device, compiled, seed))
        made[0].step()
        made[0].step()  # with the optimizer's state in place

    peak = peak_mib(start, device)
    return made[0], peak
