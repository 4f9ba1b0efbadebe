"""How scenes are written: an image folder (classification), COCO JSON (detection), ADE20K masks (segmentation)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from .relations import KINDS, RELATIONS
from .scenes import CLASSES, SCENE_SIZE, Instance, Scene, make_object, make_scene

# Not contiguous, as in COCO itself.
CATEGORY_IDS = (1, 2, 3, 5, 6, 8, 9, 11, 13, 14)
SEGMENTATION_CLASSES = ("background", *CLASSES)  # mask values 1, 2, ...; 0 is unlabelled
SPLITS = ("train", "val")
_ADE_SPLIT = {"train": "training", "val": "validation"}
_MIN_AREA = 20  # pixels; smaller remnants are not annotated


def generator(seed: int, split: str, kind: int, index: int) -> np.random.Generator:
    """One stream per image: image ``index`` is the same whatever the number of images."""
    return np.random.default_rng([seed, SPLITS.index(split), kind, index])


def write_classification(folder: Path, split: str, seed: int, per_class: int) -> None:
    """``folder/split/class/00000.jpg``: ``per_class`` images of an object, and as many of each kind of a relation."""
    for label, name in enumerate(CLASSES):
        target = folder / split / name
        target.mkdir(parents=True)
        for index in range(per_class * (len(KINDS) if name in RELATIONS else 1)):
            _save_jpeg(make_object(split, label, generator(seed, split, 1 + label, index)), target / f"{index:05d}.jpg")


def write_scenes(out: Path, split: str, seed: int, count: int) -> None:
    """Writes the same scenes for detection and for segmentation."""
    detection_images = out / "detection" / split
    images = out / "segmentation" / "images" / _ADE_SPLIT[split]
    masks = out / "segmentation" / "annotations" / _ADE_SPLIT[split]
    annotations = out / "detection" / "annotations"
    for folder in (detection_images, images, masks, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    scenes: list[tuple[str, Scene]] = []
    for index in range(count):
        name = f"{split}_{index:05d}"
        scene = make_scene(split, generator(seed, split, 0, index))
        _save_jpeg(scene.image, detection_images / f"{name}.jpg")
        (images / f"{name}.jpg").write_bytes((detection_images / f"{name}.jpg").read_bytes())
        Image.fromarray(segmentation_mask(scene)).save(masks / f"{name}.png")
        scenes.append((f"{name}.jpg", scene))
    text = json.dumps(coco_dataset(scenes))
    (annotations / f"{split}.json").write_text(text, encoding="utf-8")
    (out / "segmentation" / "classes.json").write_text(json.dumps(SEGMENTATION_CLASSES, indent=1), encoding="utf-8")


def segmentation_mask(scene: Scene) -> NDArray:
    """Values (H, W) uint8: 0 unlabelled (borders, some objects), 1 background, 2 onwards the classes."""
    values = np.ones(scene.image.shape[:2], np.uint8)
    border = np.zeros(values.shape, bool)
    for instance in scene.instances:
        if instance.label is None:
            continue
        values[instance.mask] = 0 if instance.unlabelled else 2 + instance.label
        inside = instance.mask.astype(np.uint8)
        border |= cv2.erode(inside, np.ones((3, 3), np.uint8), borderValue=1).astype(bool) != instance.mask
    values[border] = 0
    return values


def coco_dataset(scenes: Iterable[tuple[str, Scene]]) -> dict[str, Any]:
    """A COCO instances dataset: polygons where they are exact, RLE for shapes with holes, crowds as RLE."""
    images, annotations = [], []
    for image_id, (file_name, scene) in enumerate(scenes, start=1):
        images.append({"id": image_id, "file_name": file_name, "height": SCENE_SIZE, "width": SCENE_SIZE})
        for instance in scene.instances:
            if instance.label is None or instance.mask.sum() < _MIN_AREA:
                continue
            number = len(annotations) + 1
            annotations.append(
                {"id": number, "image_id": image_id, **_annotation(instance, compressed=number % 2 == 0)}
            )
    categories = [
        {"id": i, "name": name, "supercategory": "shape"} for i, name in zip(CATEGORY_IDS, CLASSES, strict=True)
    ]
    info = {"description": "drawn objects on photographs from scikit-image"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _annotation(instance: Instance, compressed: bool) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(instance.mask.astype(np.uint8)))
    polygons = None if instance.crowd else _polygons(instance.mask)
    if polygons is not None:
        segmentation: Any = polygons
    elif compressed:
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    else:
        segmentation = {"size": rle["size"], "counts": _run_lengths(instance.mask)}
    return {
        "category_id": CATEGORY_IDS[instance.label],
        "segmentation": segmentation,
        "bbox": [float(x) for x in coco_mask.toBbox(rle)],
        "area": float(coco_mask.area(rle)),
        "iscrowd": int(instance.crowd),
    }


def _polygons(mask: NDArray) -> list[list[float]] | None:
    """Outlines in COCO's form, or None when the mask has holes, which polygons cannot say."""
    # Twice the size and back: an outline through pixel centres would lose half a pixel on each side.
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(large, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if any(parent >= 0 for parent in hierarchy[0][:, 3]):
        return None
    polygons = [((c.reshape(-1, 2) + 0.5) / 2).flatten().round(2).tolist() for c in contours if len(c) >= 4]
    return polygons or None


def _run_lengths(mask: NDArray) -> list[int]:
    """Uncompressed RLE: column by column, runs of zeros and ones in turn, beginning with zeros."""
    pixels = mask.flatten(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(pixels)) + 1), pixels.size]).tolist()
    return [0, *runs] if pixels[0] else runs


def _save_jpeg(image: NDArray, path: Path) -> None:
    Image.fromarray(image).save(path, quality=92)
