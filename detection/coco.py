"""What each field of a COCO JSON may hold, checked before any library decodes or computes with it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from backbones.utils.errors import UserError, check_name, shown

_SIDE = 2**20  # pixels
_AREA = 2**31
_IDS = 2**53  # COCO's evaluation keeps ids in float64
_OUTLINE = 2**25  # steps of a polygon's outline, of which pycocotools takes five per pixel


def check_entries(dataset: Mapping[str, Any], json_file: str) -> None:
    """Raises UserError for the first field of another type or out of range.

    Args:
        dataset: with lists of images, categories and annotations.
        json_file: its path, for messages.
    """
    for key, required, check in (
        ("images", ("id", "file_name", "height", "width"), _check_image),
        ("categories", ("id", "name"), _check_category),
        ("annotations", ("id", "image_id", "category_id", "bbox"), _check_annotation),
    ):
        what = "category" if key == "categories" else key[:-1]
        for position, entry in enumerate(dataset[key]):
            missing = [field for field in required if not isinstance(entry, dict) or field not in entry]
            if missing:
                raise UserError(f"{json_file}: {what} number {position} has no {missing[0]!r}. Repair the file.")
            check(entry, f"{what} {shown(entry['id'])} of {json_file}")
        _check_unique([entry["id"] for entry in dataset[key]], f"{key} of {json_file}")
    _check_unique([c["name"] for c in dataset["categories"]], f"names of categories of {json_file}", "name")


def check_masks_fit(dataset: Mapping[str, Any], json_file: str) -> None:
    """Raises UserError for the first mask that is not one of its image; every annotation must belong to an image."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        mask = annotation.get("segmentation")
        if not mask:
            continue
        where, size = f"annotation {annotation['id']} of {json_file}", sizes[annotation["image_id"]]
        if isinstance(mask, dict):
            _check_rle(mask, size, where)
        else:
            _check_polygons(mask, size, where)


def rle_counts(text: str, pixels: int) -> list[int] | None:
    """The run lengths in COCO's compressed text, in linear time; None unless they are of exactly ``pixels`` pixels."""
    counts: list[int] = []
    value = shift = total = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        total += value
        if value < 0 or total > pixels:
            return None
        counts.append(value)
        value = shift = 0
    return counts if total == pixels and not shift else None


def _check_image(image: dict[str, Any], where: str) -> None:
    _check_id(image["id"], where, "id", (int, str))
    for key in ("height", "width"):
        _check(
            type(image[key]) is int and 0 < image[key] <= _SIDE, image, key, where, f"a number of pixels, 1 to {_SIDE}"
        )
    if image["height"] * image["width"] > _AREA:
        raise UserError(f"{where} has {image['width']}x{image['height']} pixels, more than {_AREA}. Repair the file.")
    name = image["file_name"]
    check_name(f"{where}: file_name", name, 4096)
    if PurePosixPath(name).is_absolute() or _climbs(name):
        raise UserError(
            f"{where} has the file_name {shown(name)}, outside the folder of images. Give names relative to the folder."
        )


def _climbs(name: str) -> bool:
    depth = 0
    for part in PurePosixPath(name).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def _check_category(category: dict[str, Any], where: str) -> None:
    _check_id(category["id"], where, "id", (int,))
    check_name(f"{where}: name", category["name"])


def _check_annotation(annotation: dict[str, Any], where: str) -> None:
    _check_id(annotation["id"], where, "id", (int,))
    _check_id(annotation["image_id"], where, "image_id", (int, str))
    _check_id(annotation["category_id"], where, "category_id", (int,))
    box = annotation["bbox"]
    if not (_are_numbers(box, _SIDE) and len(box) == 4 and box[2] >= 0 and box[3] >= 0):
        raise UserError(f"{where} has the box {shown(box)}; it must be [x, y, width, height] in pixels.")
    crowd = annotation.get("iscrowd", 0)
    _check(isinstance(crowd, int) and crowd in (0, 1), annotation, "iscrowd", where, "0 or 1")
    area = annotation.get("area", 0)
    _check(_are_numbers([area], float(_SIDE) ** 2) and area >= 0, annotation, "area", where, "a number of pixels")
    _check(annotation.get("ignore", 0) in (0, False), annotation, "ignore", where, "0: others are not supported")
    keypoints = annotation.get("keypoints") or []
    _check(_are_numbers(keypoints, _SIDE), annotation, "keypoints", where, "a list of numbers")
    mask = annotation.get("segmentation")
    _check(mask is None or isinstance(mask, list | dict), annotation, "segmentation", where, "polygons or RLE")


def _check_id(value: Any, where: str, key: str, kinds: tuple[type, ...]) -> None:
    valid = type(value) in kinds and (len(value) <= 256 if isinstance(value, str) else abs(value) < _IDS)
    if not valid:
        kind = " or ".join({int: "a whole number", str: "a text"}[k] for k in kinds)
        raise UserError(f"{where} has the {key} {shown(value)}; it must be {kind}. Repair the file.")


def _check(valid: bool, entry: Mapping[str, Any], key: str, where: str, what: str) -> None:
    if not valid:
        raise UserError(f"{where} has the {key} {shown(entry.get(key))}; it must be {what}. Repair the file.")


def _are_numbers(values: Any, limit: float) -> bool:
    """Whether ``values`` is a list of finite numbers of at most ``limit``; an NaN fails a comparison or the sum."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        return False
    return not values or (-limit <= min(values) and max(values) <= limit and math.isfinite(sum(values)))


def _check_unique(values: Iterable[Any], where: str, what: str = "id") -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise UserError(f"the {what} {shown(value)} appears twice among the {where}. Each must be unique.")
        seen.add(value)


def _check_rle(mask: Mapping[str, Any], size: tuple[int, int], where: str) -> None:
    stated, counts, pixels = mask.get("size"), mask.get("counts"), size[0] * size[1]
    if not isinstance(stated, list) or [type(s) for s in stated] != [int, int] or tuple(stated) != size:
        raise UserError(
            f"{where} has a mask of the size {shown(stated)}; its image has {list(size)}, height and width. Repair it."
        )
    if isinstance(counts, list):
        valid = set(map(type, counts)) <= {int} and min(counts, default=0) >= 0 and sum(counts) == pixels
    else:
        valid = isinstance(counts, str) and rle_counts(counts, pixels) is not None
    if not valid:
        raise UserError(f"{where} has a mask whose run lengths are not those of {pixels} pixels. Repair the file.")


def _check_polygons(polygons: Sequence[Any], size: tuple[int, int], where: str) -> None:
    for number, polygon in enumerate(polygons):
        # Later polygons of a point or two are in published data; Detectron2 leaves them out.
        if not _are_numbers(polygon, _SIDE) or len(polygon) % 2 or len(polygon) < (2 if number else 6):
            raise UserError(
                f"{where} has the polygon {shown(polygon)}; it must be x, y, x, y, ... of at least 3 points in pixels."
            )
        span = max(max(polygon) - min(polygon), 1)
        if len(polygon) * span > _OUTLINE and _outline(polygon) > _OUTLINE:
            raise UserError(f"{where} has a polygon whose outline is longer than any of {size[1]}x{size[0]} pixels.")


def _outline(polygon: Sequence[float]) -> float:
    """Steps of the outline as pycocotools draws it: five per pixel along the longer axis of each edge."""
    x, y = polygon[::2], polygon[1::2]
    edges = zip(x, y, [*x[1:], x[0]], [*y[1:], y[0]], strict=True)
    return 5 * sum(max(abs(a - c), abs(b - d)) for a, b, c, d in edges)
