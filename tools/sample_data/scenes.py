"""How a scene is put together: a crop of a photograph, objects back to front, what stays visible of each."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbones.utils.errors import UserError

from .objects import OBJECTS, Drawn, draw
from .relations import KINDS, RELATIONS, place

SCENE_SIZE = 128
OBJECT_SIZE = 64
CLASSES = (*OBJECTS, *RELATIONS)
# Farther than a window of attention in detection (64 pixels); images for classification are half as large.
APART = 66.0
RELATION_SHARE = 0.5  # of the scenes
CROWD_SHARE = 0.16  # of the scenes with objects
UNLABELLED_SHARE = 0.05  # of the objects, in the segmentation masks only
# Photographs inside scikit-image's wheel. No photograph serves both training and validation.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "coffee.png", "motorcycle_left.png", "brick.png", "camera.png"),
    "val": ("chelsea.png", "rocket.jpg", "gravel.png", "grass.png"),
}


@dataclass
class Instance:
    """A visible object, or a group of small ones (``crowd``): its class and its visible pixels (H, W) bool.

    ``label`` indexes CLASSES; None = part of the picture that has no name.
    """

    label: int | None
    mask: NDArray
    crowd: bool = False
    unlabelled: bool = False


@dataclass
class Scene:
    """An image (H, W, 3) uint8 and the objects in it, back to front."""

    image: NDArray
    instances: list[Instance] = field(default_factory=list)


@cache
def _photograph(name: str) -> NDArray:
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        version = f"scikit-image {skimage.__version__}"
        raise UserError(f"{version} ships no {name}. Install the version pinned in requirements.lock.") from None


def background(split: str, size: int, rng: np.random.Generator) -> NDArray:
    """A random crop of one of the split's photographs, (size, size, 3) float32 in 0..1."""
    photograph = _photograph(PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))])
    height, width = photograph.shape[:2]
    side = int(rng.integers(size, min(height, width) + 1))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    crop = photograph[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    grey = crop.mean(axis=2, keepdims=True)
    return (grey + (crop - grey) * rng.uniform(0.3, 1.2)).clip(0, 1)


def _paste(canvas: NDArray, drawn: Drawn) -> NDArray:
    """Draws onto the canvas in place; returns the object's opacity on the whole canvas, (H, W)."""
    height, width = canvas.shape[:2]
    size = len(drawn.opacity)
    top, left = max(drawn.row, 0), max(drawn.column, 0)
    bottom, right = min(drawn.row + size, height), min(drawn.column + size, width)
    full = np.zeros((height, width), np.float32)
    if top >= bottom or left >= right:
        return full
    patch = slice(top - drawn.row, bottom - drawn.row), slice(left - drawn.column, right - drawn.column)
    opacity = drawn.opacity[patch]
    region = canvas[top:bottom, left:right]
    region += (drawn.colour[patch] - region) * opacity[..., None]
    full[top:bottom, left:right] = opacity
    return full


def _finish(canvas: NDArray, rng: np.random.Generator) -> NDArray:
    """Camera: brightness of the whole picture and a little noise."""
    noisy = canvas * rng.uniform(0.7, 1.2) + rng.normal(0, rng.uniform(0.005, 0.03), canvas.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)


def make_scene(split: str, rng: np.random.Generator) -> Scene:
    """A scene of SCENE_SIZE pixels: a relation, or two to six objects and now and then a crowd of small ones.

    The two never share a scene: an object's colours would pass for a cue.
    """
    canvas = background(split, SCENE_SIZE, rng)
    instances = _draw_relation(canvas, rng) if rng.random() < RELATION_SHARE else _draw_objects(canvas, rng)
    return Scene(_finish(canvas, rng), instances)


def _draw_relation(canvas: NDArray, rng: np.random.Generator) -> list[Instance]:
    name, kind = str(rng.choice(RELATIONS)), str(rng.choice(list(KINDS)))
    instances = []
    for part in place(kind, name, SCENE_SIZE, 12.0, APART, rng, copies=2):
        label = CLASSES.index(name) if part.is_target else None
        instances.append(Instance(label, _paste(canvas, part.drawn) >= 0.5))
    return instances


def _draw_objects(canvas: NDArray, rng: np.random.Generator) -> list[Instance]:
    instances = [_draw_crowd(canvas, rng)] if rng.random() < CROWD_SHARE else []
    areas = [int(instance.mask.sum()) for instance in instances]  # pixels before occlusion
    for _ in range(rng.integers(2, 7)):
        radius = float(np.exp(rng.uniform(np.log(10), np.log(30))))
        label = int(rng.integers(len(OBJECTS)))
        for _attempt in range(8):
            centre = rng.uniform(0.6 * radius, SCENE_SIZE - 0.6 * radius, size=2)
            drawn = draw(label, (centre[0], centre[1]), radius, rng)
            trial = canvas.copy()
            mask = _paste(trial, drawn) >= 0.5
            # Every object keeps at least half of its pixels in sight.
            remaining = [(i.mask & ~mask).sum() for i in instances]
            if all(left >= 0.5 * area for left, area in zip(remaining, areas, strict=True)):
                canvas[:] = trial
                for instance in instances:
                    instance.mask &= ~mask
                instances.append(Instance(label, mask, unlabelled=bool(rng.random() < UNLABELLED_SHARE)))
                areas.append(int(mask.sum()))
                break
    return instances


def _draw_crowd(canvas: NDArray, rng: np.random.Generator) -> Instance:
    label = int(rng.integers(len(OBJECTS)))
    middle = rng.uniform(30, SCENE_SIZE - 30, size=2)
    mask = np.zeros(canvas.shape[:2], bool)
    for _ in range(rng.integers(5, 9)):
        at = middle + rng.uniform(-20, 20, size=2)
        mask |= _paste(canvas, draw(label, (at[0], at[1]), rng.uniform(5, 7), rng)) >= 0.5
    return Instance(label, mask, crowd=True)


def make_object(split: str, label: int, rng: np.random.Generator) -> NDArray:
    """An image of OBJECT_SIZE pixels with one object or relation of class ``label``, (H, W, 3) uint8."""
    canvas = background(split, OBJECT_SIZE, rng)
    if label >= len(OBJECTS):
        for part in place(str(rng.choice(list(KINDS))), CLASSES[label], OBJECT_SIZE, 7.5, APART / 2, rng):
            _paste(canvas, part.drawn)
        return _finish(canvas, rng)
    radius = float(np.exp(rng.uniform(np.log(12), np.log(30))))
    slack = max(OBJECT_SIZE / 2 - radius * 0.9, 2)
    centre = OBJECT_SIZE / 2 + rng.uniform(-slack, slack, size=2)
    _paste(canvas, draw(label, (centre[0], centre[1]), radius, rng))
    if rng.random() < 0.25:
        _occlude(canvas, split, centre, radius, rng)
    return _finish(canvas, rng)


def _occlude(canvas: NDArray, split: str, centre: NDArray, radius: float, rng: np.random.Generator) -> None:
    """Lays a piece of another photograph over one side of the object, as if something stood before it."""
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[0:OBJECT_SIZE, 0:OBJECT_SIZE].astype(np.float32)
    along = (xs - centre[0]) * np.cos(angle) + (ys - centre[1]) * np.sin(angle)
    start = rng.uniform(0.2, 0.6) * radius
    inside = (along > start) & (along < start + rng.uniform(0.5, 1.0) * radius)
    canvas[inside] = background(split, OBJECT_SIZE, rng)[inside]
