"""Predictions beside the truth: validation images of each task with what the first rows say of them."""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from .drawing import Box, Color, class_color, montage, write_label, write_line

ROWS = 8  # in the page
MONTAGE_ROWS = 6  # in the picture beside it
WIDTH = 480  # pixels of a drawn picture: labels stay legible at 300
MIN_SCORE = 0.3
_FONT = 18
_UNLABELLED = (0, 255)  # values of a mask file


class Object(NamedTuple):
    """A box (x0, y0, x1, y1) in pixels of its image, the class, a score (None: the truth), a mask (H, W) or None."""

    box: Any
    name: str
    score: float | None
    mask: NDArray | None


@dataclass(frozen=True)
class Panel:
    """A picture, whose it is (a row, "truth" or "image"), and lines of text below it."""

    caption: str
    picture: Image.Image
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """One image of the validation set: its name and its panels, the truth first."""

    title: str
    panels: list[Panel]


@dataclass(frozen=True)
class Section:
    """A task's examples, the class names behind the colours (segmentation), and all of it as one picture."""

    task: str
    note: str
    examples: list[Example]
    montage: Image.Image
    legend: list[tuple[str, Color]] = field(default_factory=list)


def first_done(jobs: list[Any], task: str) -> list[Any]:
    """Of every row its finished run of ``task`` with the smallest seed; rows without one are left out."""
    chosen: dict[str, Any] = {}
    for job in jobs:
        if job.task == task and job.is_done() and (job.row not in chosen or job.seed < chosen[job.row].seed):
            chosen[job.row] = job
    return list(chosen.values())


def example_sections(jobs: list[Any], data: Any) -> list[Section]:
    """The sections of the tasks that have a finished run.

    Args:
        jobs: all runs.
        data: the data sets; only the tasks that have runs are read.
    """
    makers = {"classification": _classification, "detection": _detection, "segmentation": _segmentation}
    sections = []
    for task, make in makers.items():
        done = first_done(jobs, task)
        if done:
            more = f" The first {ROWS} of {len(done)} rows." if len(done) > ROWS else ""
            sections.append(make(done[:ROWS], data, more))
    return sections


def _classification(jobs: list[Any], data: Any, more: str, count: int = 8) -> Section:
    """The true class of each image and what every row calls it."""
    from classification.data import VAL_NAMES, open_split
    from classification.state import load_trained

    networks = {job.row: load_trained(job.folder) for job in jobs}
    classes = next(iter(networks.values()))[1].classes
    source = open_split(data.classification["root"], "", VAL_NAMES, classes)
    examples = []
    for index in _spread(len(source), count):
        image, target = source.load(index)
        guesses = {row: meta.classes[_guess(network, meta, image)] for row, (network, meta) in networks.items()}
        lines = [f"{'✓' if guess == classes[target] else '✗'} {row}: {guess}" for row, guess in guesses.items()]
        examples.append(Example(classes[target], [Panel(classes[target], _at_width(image), lines)]))
    note = f"Validation images under their true class, and what each row calls them.{more}"
    return Section("classification", note, examples, _captioned(examples))


@torch.no_grad()
def _guess(network: torch.nn.Module, header: Any, image: Image.Image) -> int:
    pixels = np.asarray(image.resize(network.config.img_size[::-1], Image.Resampling.BICUBIC), np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(header.transform["mean"])) / np.float32(header.transform["std"])).permute(
        2, 0, 1
    )
    return int(network(x[None]).argmax())


def _captioned(examples: list[Example], width: int = 320, columns: int = 4) -> Image.Image:
    """Classification's picture: under each image, one line of text a row."""
    step, size = 26, 20
    rows = min(MONTAGE_ROWS, max(len(example.panels[0].lines) for example in examples))
    tall = max(example.panels[0].picture.height * width // example.panels[0].picture.width for example in examples)
    cells = []
    for example in examples:
        panel = example.panels[0]
        cell = Image.new("RGB", (width, tall + rows * step + 6), "white")
        cell.paste(panel.picture.resize((width, panel.picture.height * width // panel.picture.width)))
        draw = ImageDraw.Draw(cell)
        for place, line in enumerate(panel.lines[:rows]):
            color = (20, 110, 40) if line.startswith("✓") else (170, 30, 30)
            write_line(draw, (2, tall + 4 + place * step), line, width - 4, color, size)
        cells.append((example.title, cell))
    return montage([cells[i : i + columns] for i in range(0, len(cells), columns)], width)


def _detection(jobs: list[Any], data: Any, more: str, count: int = 4) -> Section:
    """Boxes and masks of the truth and of each row's detector."""
    from pycocotools.coco import COCO

    from detection.engine import predict

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(data.detection["test_json"])
    annotated = [coco.imgs[i] for i in sorted(coco.imgs) if coco.getAnnIds(i)]
    classes = [{a["category_id"] for a in coco.imgToAnns[record["id"]]} for record in annotated]
    records = [annotated[i] for i in most_classes(classes, count)]
    paths = [Path(data.detection["test_images"]) / record["file_name"] for record in records]
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    colors = {names[i]: class_color(order) for order, i in enumerate(sorted(names))}
    columns = {"truth": [_annotated(coco, record["id"], names) for record in records]}
    for job in jobs:
        columns[job.row] = [_found(found) for found in predict(job.folder, paths, min_score=MIN_SCORE)]
    images = [_open(path) for path in paths]
    examples = [
        Example(
            f"Test image {paths[i].name}",
            [
                Panel(caption, _draw_objects(image, column[i], colors), [] if column[i] else ["nothing found"])
                for caption, column in columns.items()
            ],
        )
        for i, image in enumerate(images)
    ]
    note = f"The truth, and each row's boxes and masks with a score of at least {MIN_SCORE}.{more}"
    return Section("detection", note, examples, _side_by_side(examples, 1))


def _annotated(coco: Any, image: int, names: dict[int, str]) -> list[Object]:
    """The true objects of an image, without crowds."""
    annotations = coco.loadAnns(coco.getAnnIds(image, iscrowd=False))
    return [
        Object(_corners(a["bbox"]), names[a["category_id"]], None, coco.annToMask(a) if a.get("segmentation") else None)
        for a in annotations
    ]


def _found(found: dict[str, Any]) -> list[Object]:
    masks = [None] * len(found["names"]) if found["masks"] is None else found["masks"]
    return [Object(*values) for values in zip(found["boxes"], found["names"], found["scores"], masks, strict=True)]


def _draw_objects(image: Image.Image, objects: list[Object], colors: dict[str, Color]) -> Image.Image:
    """Masks first, then boxes, then labels, so that no label is covered."""
    picture = _at_width(image)
    scale = picture.width / image.width
    for thing in objects:
        if thing.mask is not None:
            shade = Image.fromarray(np.asarray(thing.mask, np.uint8) * 110)
            picture.paste(colors[thing.name], (0, 0), shade.resize(picture.size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(picture)
    corners = [_scaled(thing.box, scale) for thing in objects]
    for box, thing in zip(corners, objects, strict=True):
        draw.rectangle(box, outline=colors[thing.name], width=3)
    taken: list[Box] = []
    for box, thing in zip(corners, objects, strict=True):
        label = thing.name if thing.score is None else f"{thing.name} {thing.score:.2f}"
        write_label(draw, box, label, colors[thing.name], _FONT, taken)
    return picture


def _segmentation(jobs: list[Any], data: Any, more: str, count: int = 4) -> Section:
    """The image, its true mask, and each row's."""
    from segmentation.engine import WEIGHTS, predict
    from segmentation.state import load_description

    root = Path(data.segmentation["data_root"])
    paths = sorted((root / "annotations" / "validation").glob("*.png"))
    paths = [paths[i] for i in _spread(len(paths), count)]
    images = [next((root / "images" / "validation").glob(f"{path.stem}.*")) for path in paths]
    maps = {"truth": [np.asarray(Image.open(path)) for path in paths]}
    maps |= {job.row: predict(job.folder, images) for job in jobs}
    names = load_description(jobs[0].folder / WEIGHTS)[1]["classes"]
    examples = [
        Example(
            f"Validation image {image.name}",
            [Panel("image", _at_width(_open(image)))]
            + [Panel(caption, _draw_map(column[i])) for caption, column in maps.items()],
        )
        for i, image in enumerate(images)
    ]
    present = sorted({int(k) for column in maps.values() for m in column for k in np.unique(m)} - set(_UNLABELLED))
    legend = [(names[k - 1] if k <= len(names) else str(k), class_color(k - 1)) for k in present]
    note = f"The image, its true classes (black: unlabelled), and each row's.{more}"
    return Section("segmentation", note, examples, _side_by_side(examples, 2), legend)


def _draw_map(classes: NDArray) -> Image.Image:
    """A mask (H, W), k for class k counted from 1, in the colours of its classes."""
    colors = np.zeros((256, 3), np.uint8)
    colors[1:255] = [class_color(k) for k in range(254)]
    return _at_width(Image.fromarray(colors[classes]), Image.Resampling.NEAREST)


def _side_by_side(examples: list[Example], before: int) -> Image.Image:
    """A line an example: ``before`` panels of truth, then the first rows'."""
    return montage([[(p.caption, p.picture) for p in e.panels[: before + MONTAGE_ROWS]] for e in examples])


def _open(path: Path) -> Image.Image:
    """The picture as the frameworks read it: upright, in RGB."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def _at_width(image: Image.Image, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """A copy that is WIDTH pixels wide, at its own aspect."""
    return image.convert("RGB").resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), how)


def most_classes(images: list[set[Any]], count: int) -> list[int]:
    """Indices of at most ``count`` images that together show many classes: each adds the most that are new."""
    chosen: list[int] = []
    seen: set[Any] = set()
    while len(chosen) < min(count, len(images)):
        rest = [i for i in range(len(images)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: len(images[i] - seen)))
        seen |= images[chosen[-1]]
    return sorted(chosen)


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` different indices from the first to the last."""
    return np.linspace(0, length - 1, min(count, length)).astype(int).tolist()


def _scaled(box: Any, scale: float) -> Box:
    x0, y0, x1, y1 = (float(side) * scale for side in box)
    return x0, y0, x1, y1


def _corners(box: list[float]) -> Box:
    x, y, width, height = box
    return x, y, x + width, y + height
