"""The functions that pretrained classifiers learned: KArAt's of a score, GR-KAN's of a neuron."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt

from backbones.layers.gr_kan import GRKAN
from backbones.layers.karat import KArAtOperator
from backbones.ops import group_rational

from .drawing import literal, png

Panel = tuple[str, Callable[[Any], None]]  # title, and what draws it into given axes
MOST_ROWS = 8
_SIZE = (3.0, 2.1)  # inches of one panel


def function_panels(jobs: Iterable[Any], at_most: int = MOST_ROWS) -> list[Panel]:
    """Title and drawing of the first, middle and last KArAt operator and GR-KAN of each pretrained network.

    Args:
        jobs: finished classification runs; those whose network has neither are passed over.
        at_most: networks to draw, the first ones.
    """
    drawn = islice((panels for job in jobs if (panels := _panels_of(job))), at_most)
    return sorted((panel for panels in drawn for panel in panels), key=lambda panel: panel[0].rsplit(":", 1)[1])


def panel_picture(panel: Panel) -> bytes:
    """One panel as PNG, its title left to the page."""
    figure, axis = plt.subplots(figsize=_SIZE, layout="constrained")
    _draw(axis, panel)
    return png(figure)


def learned_functions(panels: list[Panel]) -> bytes | None:
    """All panels in one PNG, three a line; None without any."""
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (1.2 * _SIZE[0] * columns, 1.2 * _SIZE[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel)
        axis.set_title(literal(panel[0]), fontsize=8.5)
    return png(figure, dpi=100)


def _panels_of(job: Any) -> list[Panel]:
    from classification.state import load_trained

    network, _ = load_trained(job.folder)
    rationals = {name: module for name, module in network.named_modules() if isinstance(module, GRKAN)}
    panels: list[Panel] = []
    for modules, what, draw in (
        (network.operators(), "φ of head 0", _draw_karat),
        (rationals, "F2 by group", _draw_rational),
    ):
        for name in dict.fromkeys(list(modules)[i] for i in (0, len(modules) // 2, -1) if modules):
            place = name.removesuffix(".mlp").removesuffix(".attn.operator")
            panels.append((f"{job.row} {place}: {what}", partial(draw, part=modules[name])))
    return panels


def _draw(axis: Any, panel: Panel) -> None:
    panel[1](axis)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _draw_karat(axis: Any, part: KArAtOperator) -> None:
    """Six of head 0's functions φ of a score, spread over tokens and ranks."""
    s = torch.linspace(-np.pi, np.pi, 200)
    _, outputs, inputs = part.phi.shape
    for output, token in zip(_spread(outputs), _spread(inputs), strict=True):
        axis.plot(s, part.phi.curve(s, 0, output, token), linewidth=1)
    axis.set_xlabel("score", fontsize=8)


def _spread(count: int) -> list[int]:
    return np.linspace(0, count - 1, 6).astype(int).tolist()


@torch.no_grad()
def _draw_rational(axis: Any, part: GRKAN) -> None:
    """F2 of every group, with the Swish it started near."""
    act = part.act2
    groups = len(act.weight_denominator)
    x = torch.linspace(-4, 4, 200)
    y = group_rational(x[:, None].repeat(1, groups), act.weight_numerator, act.weight_denominator, act.form)
    axis.plot(x, torch.nn.functional.silu(x), color="black", linestyle=":", label="Swish")
    axis.plot(x, y, linewidth=1)
    axis.legend(fontsize=7)
    axis.set_xlabel("input", fontsize=8)
