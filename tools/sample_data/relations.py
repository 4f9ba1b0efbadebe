"""White shapes that look alike and are named by something far away: what a network without attention cannot know.

A target is ``warm`` or ``cold`` by the colour of its cue, which lies farther away than a window of attention reaches.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .objects import OUTLINES, SUPERSAMPLE, Drawn, rgb

_RIM = 0.04  # grey of the rim of a key
# Name to hues, in turns, that a cue of that name can have.
HUES = {"warm": (0.0, 0.09), "cold": (0.53, 0.63)}
RELATIONS = tuple(HUES)


@dataclass(frozen=True)
class Kind:
    """White targets, and a coloured cue that names them.

    Args:
        target: outline of the targets (key of OUTLINES).
        cue: outline of the cue.
        count: number of targets of one cue, at least.
        decoys: parts that look like a cue, but for its dark rim, and name nothing.
    """

    target: str
    cue: str
    count: int = 1
    decoys: int = 0


KINDS: dict[str, Kind] = {
    "pair": Kind("square", "disc"),  # the second member of a pair decides the name of the first
    "key": Kind("ring", "disc", decoys=2),  # a key, known by its rim among parts like it, names the target
    "odd": Kind("triangle", "triangle", count=2),  # equals, named by the odd one out
    "apart": Kind("cross", "cross"),  # two parts of one thing, of which the one names the other
}


@dataclass
class Placed:
    """One part around ``centre`` (x, y), pixels; a target has the name, cues and decoys have none."""

    drawn: Drawn
    is_target: bool


def place(
    kind: str,
    name: str,
    size: int,
    radius: float,
    apart: float,
    rng: np.random.Generator,
    copies: int = 1,
) -> list[Placed]:
    """The parts of a relation at random places of a square image, none upon another.

    Args:
        kind: key of KINDS.
        name: what the cue makes of the targets, one of RELATIONS.
        size: side of the image, pixels.
        radius: mean half size of a part, pixels.
        apart: least distance of every target from its cue, pixels.
        copies: how many times the kind's number of targets there are.
    """
    made = KINDS[kind]
    targets = made.count * copies
    count = targets + 1 + made.decoys
    while True:
        radii = radius * rng.uniform(0.8, 1.25, count)
        centres = rng.uniform(radii[:, None] + 1, size - radii[:, None] - 1, (count, 2))
        gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)
        np.fill_diagonal(gaps, np.inf)
        if (gaps > 1.2 * (radii[:, None] + radii)).all() and (gaps[:targets, targets] >= apart).all():
            break
    parts = []
    for index, (centre, r) in enumerate(zip(centres, radii, strict=True)):
        is_target, is_cue = index < targets, index == targets
        says = name if is_cue else str(rng.choice(RELATIONS))
        hue = None if is_target else float(rng.choice(HUES[says]))
        rim = is_cue and made.decoys > 0
        parts.append(Placed(_draw(made.target if is_target else made.cue, hue, rim, centre, r, rng), is_target))
    return parts


def _draw(form: str, hue: float | None, rim: bool, centre: NDArray, radius: float, rng: np.random.Generator) -> Drawn:
    """A part of one colour (``hue`` None: white), turned by up to a tenth of a turn, on a patch of its own."""
    corner = np.floor(centre - 1.5 * radius).astype(int) - 1
    size = int(np.ceil(3 * radius)) + 3
    angle = rng.uniform(-0.6, 0.6)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inner = _fill(form, turn, centre - corner, radius, size)
    if hue is None:
        colour = np.full(3, rng.uniform(0.9, 1.0))
    else:
        colour = rgb((hue + rng.uniform(-0.03, 0.03)) % 1, rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0))
    opacity, shade = inner, np.broadcast_to(colour, (size, size, 3))
    if rim:
        opacity = _fill(form, turn, centre - corner, 1.35 * radius, size)
        shade = shade * inner[..., None] + _RIM * (1 - inner[..., None])
    return Drawn(opacity, shade.astype(np.float32), int(corner[1]), int(corner[0]))


def _fill(form: str, turn: NDArray, centre: NDArray, radius: float, size: int) -> NDArray:
    """Opacity (size, size) of an outline, 0 to 1."""
    curves = [np.round((c @ turn.T * radius + centre) * SUPERSAMPLE).astype(np.int32) for c in OUTLINES[form]]
    fine = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.uint8)
    cv2.fillPoly(fine, curves, 255)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
