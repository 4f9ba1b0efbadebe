"""What an object of each class looks like: its outline, its texture and its range of hues."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SUPERSAMPLE = 4
HUE_SPREAD = 0.09  # half width of a class's hues; neighbours lie 1/8 apart, so the ranges overlap


def _polar(angles: NDArray, radii: NDArray | float) -> NDArray:
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _regular(sides: int) -> NDArray:
    return _polar(np.arange(sides) * 2 * np.pi / sides - np.pi / 2, 1.0)


def _star() -> NDArray:
    return _polar(np.arange(10) * np.pi / 5 - np.pi / 2, np.where(np.arange(10) % 2, 0.42, 1.0))


def _cross() -> NDArray:
    a, b = 0.32, 0.95
    corners = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return np.array(corners)


def _heart() -> NDArray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], axis=1) / 17


def _arrow() -> NDArray:
    return np.array([(1, 0), (0.15, -0.8), (0.15, -0.3), (-0.95, -0.3), (-0.95, 0.3), (0.15, 0.3), (0.15, 0.8)])


_CIRCLE = _regular(48)

# A list of closed curves per class, filled by the even-odd rule, inside the unit circle.
OUTLINES: dict[str, list[NDArray]] = {
    "disc": [_CIRCLE * 0.92],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [_star()],
    "ring": [_CIRCLE * 0.97, _CIRCLE * 0.5],
    "cross": [_cross()],
    "heart": [_heart()],
    "arrow": [_arrow()],
}
OBJECTS: tuple[str, ...] = tuple(OUTLINES)


def _wave(x: NDArray) -> NDArray:
    """A square wave with soft edges, 0 to 1."""
    return 0.5 + 0.5 * np.tanh(3 * np.sin(2 * np.pi * x))


# How much of the second colour each point takes, 0 to 1. x and y: the object's own frame; u and v: in periods, shifted.
TEXTURES: dict[str, Callable[..., NDArray]] = {
    "disc": lambda x, y, u, v: 1 / (1 + np.exp(2 - 6 * np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v))),  # dots
    "square": lambda x, y, u, v: np.abs(_wave(u / 1.4) - _wave(v / 1.4)),  # checker
    "triangle": lambda x, y, u, v: _wave(v),  # stripes
    "star": lambda x, y, u, v: np.clip(np.hypot(x, y) * 1.3 - 0.1, 0, 1),  # another centre
    "ring": lambda x, y, u, v: _wave(np.arctan2(y, x) * 4 / np.pi),  # spokes
    "cross": lambda x, y, u, v: np.maximum(np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)).clip(0, 1) ** 4,  # lattice
    "heart": lambda x, y, u, v: _wave(x * 0.25),  # two halves
    "arrow": lambda x, y, u, v: _wave(u + 0.7 * np.abs(np.mod(v, 1) * 2 - 1)),  # zigzag
}


@dataclass
class Drawn:
    """One object on the canvas: opacity (H, W) in 0..1 and colour (H, W, 3) in 0..1, valid where opacity > 0."""

    opacity: NDArray
    colour: NDArray
    row: int
    column: int


def draw(label: int, centre: tuple[float, float], radius: float, rng: np.random.Generator) -> Drawn:
    """Draws an object of class ``label`` around ``centre`` (x, y) on a patch of its own size.

    Args:
        label: index into OBJECTS.
        centre: pixels; the patch's top-left corner is returned as ``row``, ``column`` and may lie outside the scene.
        radius: half the object's size, pixels.
    """
    name = OBJECTS[label]
    angle = rng.uniform(0, 2 * np.pi)
    stretch = rng.uniform(0.85, 1.18)
    column, row = int(np.floor(centre[0] - radius * 1.2)) - 1, int(np.floor(centre[1] - radius * 1.2)) - 1
    size = int(np.ceil(radius * 2.4)) + 3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    offset = np.array([centre[0] - column, centre[1] - row])
    curves = [
        np.round(((points * (stretch, 1 / stretch)) @ turn.T * radius + offset) * SUPERSAMPLE).astype(np.int32)
        for points in OUTLINES[name]
    ]
    fine = np.zeros((size * SUPERSAMPLE, size * SUPERSAMPLE), np.uint8)
    cv2.fillPoly(fine, curves, 255)
    opacity = cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) + 0.5
    # (size, size) each, in the object's own frame.
    x, y = np.moveaxis(np.stack([xs - offset[0], ys - offset[1]], axis=-1) @ turn / radius, -1, 0)
    period, phase = rng.uniform(0.45, 0.65), rng.uniform(0, 1)
    mix = TEXTURES[name](x, y, x / period + phase, y / period + phase)
    first, second = _colours(label, rng)
    colour = first * (1 - mix[..., None]) + second * mix[..., None]
    # Shading: light from one side, over the whole object.
    light = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(light) * (xs - offset[0]) + np.sin(light) * (ys - offset[1])) / radius
    colour = colour * (rng.uniform(0.75, 1.1) + rng.uniform(0.05, 0.3) * slope)[..., None]
    return Drawn(opacity, colour.clip(0, 1).astype(np.float32), row, column)


def _colours(label: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    hue = (label / len(OBJECTS) + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1
    first = rgb(hue, rng.uniform(0.45, 0.95), rng.uniform(0.65, 1.0))
    # The texture's second colour is much darker or much paler than the first.
    if rng.random() < 0.6:
        return first, rgb(hue, rng.uniform(0.4, 0.9), rng.uniform(0.12, 0.35))
    return first, rgb(hue, rng.uniform(0.0, 0.2), rng.uniform(0.85, 1.0))


def rgb(hue: float, saturation: float, value: float) -> NDArray:
    """The colour (3,) of a hue in turns, saturation and value, all 0 to 1."""
    channel = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value * (1 - saturation * np.clip(np.minimum(channel, 4 - channel), 0, 1))
