"""The pictures of a report, each as PNG bytes: learning curves, predictions beside the truth, learned functions."""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from backbones.layers.gr_kan import GRKAN
from backbones.layers.karat import KArAtOperator
from backbones.ops import group_rational
from backbones.utils.runlog import read_metrics

from .plan import Data, Job

mpl.use("Agg")
COLORS = {
    "vit": "#4c72b0",
    "karat": "#c44e52",
    "kat": "#55a868",
    "karkat": "#8172b2",
    "vitkan": "#937860",
    "convit": "#64b5cd",
    "karat_convit": "#da8bc3",
    "swin": "#8c8c8c",
    "karat_swin": "#dd8452",
}
_VAL = {
    "classification": ("top1", "top-1 %"),
    "detection": ("box_ap50", "box AP50"),
    "segmentation": ("miou", "mIoU %"),
}
_PALETTE = plt.get_cmap("tab20")


def curves(jobs: list[Job]) -> bytes:
    """Training loss (above) and validation figure (below) of each task over its epochs."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.5), constrained_layout=True)
    tasks = list(_VAL)
    for job in jobs:
        rows = read_metrics(job.folder / "metrics.jsonl")
        column = tasks.index(job.task)
        for axis, split, name in ((axes[0, column], "train", "loss"), (axes[1, column], "val", _VAL[job.task][0])):
            points = [(row["epoch"], row["value"]) for row in rows if row["split"] == split and row["name"] == name]
            if points:
                style = {"marker": "o", "markersize": 4} if split == "val" else {}
                axis.plot(*zip(*points, strict=True), label=job.family, color=COLORS[job.family], **style)
    for column, task in enumerate(tasks):
        axes[0, column].set(title=task, ylabel="training loss")
        axes[1, column].set(xlabel="epoch", ylabel=f"validation {_VAL[task][1]}")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    return _png(figure)


def classification_examples(jobs: list[Job], data: Data, count: int = 8) -> bytes:
    """Validation images with the true class and what each backbone calls them."""
    from classification.data import VAL_NAMES, open_split
    from classification.engine import load_trained

    networks = {job.family: load_trained(job.folder) for job in jobs}
    classes = next(iter(networks.values()))[1]["classes"]
    source = open_split(data.classification["root"], "", VAL_NAMES, classes)
    chosen = [source.load(i) for i in np.linspace(0, len(source) - 1, count).astype(int)]
    figure, axes = plt.subplots(1, count, figsize=(1.6 * count, 2.6), constrained_layout=True)
    for axis, (image, target) in zip(axes, chosen, strict=True):
        lines = []
        for family, (network, meta) in networks.items():
            pixels = np.asarray(image.resize(network.config.img_size[::-1], Image.Resampling.BICUBIC), np.float32) / 255
            x = torch.from_numpy((pixels - np.float32(meta["mean"])) / np.float32(meta["std"])).permute(2, 0, 1)
            with torch.no_grad():
                guess = int(network(x[None]).argmax())
            lines.append(f"{'✓' if guess == target else '✗'} {family}: {classes[guess]}")
        axis.imshow(image)
        axis.set_title(classes[target], fontsize=9)
        axis.set_xlabel("\n".join(lines), fontsize=7, loc="left")
        axis.set(xticks=[], yticks=[])
    return _png(figure)


def detection_examples(jobs: list[Job], data: Data, count: int = 4) -> bytes:
    """Test images with true boxes and masks, then each detector's (score of at least 0.3)."""
    from pycocotools.coco import COCO

    from detection.engine import predict

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(data.detection["test_json"])
    records = [coco.imgs[i] for i in sorted(coco.imgs) if coco.getAnnIds(i)][:count]
    paths = [Path(data.detection["test_images"]) / record["file_name"] for record in records]
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    order = {name: i for i, name in enumerate(names[i] for i in sorted(names))}
    columns: dict[str, list[list[tuple]]] = {"truth": []}
    for record in records:
        annotations = coco.loadAnns(coco.getAnnIds(record["id"], iscrowd=False))
        columns["truth"].append(
            [
                (
                    _corners(a["bbox"]),
                    names[a["category_id"]],
                    None,
                    coco.annToMask(a) if a.get("segmentation") else None,
                )
                for a in annotations
            ]
        )
    for job in jobs:
        found = predict(job.folder, paths, min_score=0.3)
        for f in found:
            masks = [None] * len(f["names"]) if f["masks"] is None else f["masks"]
            objects = list(zip(f["boxes"], f["names"], f["scores"], masks, strict=True))
            columns.setdefault(job.family, []).append(objects)

    def draw(axis: Any, column: str, row: int) -> None:
        axis.imshow(Image.open(paths[row]).convert("RGB"))
        for box, name, score, mask in columns[column][row]:
            color = _PALETTE(order[name] % 20)
            x0, y0, x1, y1 = box
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=1.5))
            label = name if score is None else f"{name} {score:.2f}"
            axis.text(x0, y0, label, fontsize=6, color="white", backgroundcolor=(*color[:3], 0.8), va="bottom")
            if mask is not None:
                shade = np.zeros((*mask.shape, 4))
                shade[mask.astype(bool)] = (*color[:3], 0.4)
                axis.imshow(shade)

    return _table(list(columns), len(records), draw)


def segmentation_examples(jobs: list[Job], data: Data, count: int = 4) -> bytes:
    """Validation images, their true masks, then each network's."""
    from segmentation.engine import predict

    root = Path(data.segmentation["data_root"])
    masks = sorted((root / "annotations" / "validation").glob("*.png"))[:count]
    images = [next((root / "images" / "validation").glob(f"{mask.stem}.*")) for mask in masks]
    maps = {"truth": [np.asarray(Image.open(mask)) for mask in masks]}
    maps |= {job.family: predict(job.folder, images) for job in jobs}
    highest = max(int(m[m < 255].max(initial=0)) for column in maps.values() for m in column)

    def draw(axis: Any, column: str, row: int) -> None:
        if column == "image":
            axis.imshow(Image.open(images[row]).convert("RGB"))
            return
        shown = np.ma.masked_where(np.isin(maps[column][row], (0, 255)), maps[column][row])
        axis.set_facecolor("black")  # unlabelled
        axis.imshow(shown, cmap="tab20", vmin=1, vmax=max(20, highest), interpolation="nearest")

    return _table(["image", *maps], len(images), draw)


def function_panels(jobs: list[Job]) -> list[tuple[str, Callable[[Any], None]]]:
    """Title and drawing of the first, middle and last KArAt operator and GR-KAN of each pretrained network."""
    from classification.engine import load_trained

    panels: list[tuple[str, Callable[[Any], None]]] = []
    for job in jobs:
        network, _ = load_trained(job.folder)
        rationals = {name: module for name, module in network.named_modules() if isinstance(module, GRKAN)}
        for modules, what, draw in (
            (network.operators(), "φ of head 0", _draw_karat),
            (rationals, "F2 by group", _draw_rational),
        ):
            for name in dict.fromkeys(list(modules)[i] for i in (0, len(modules) // 2, -1) if modules):
                place = name.removesuffix(".mlp").removesuffix(".attn.operator")
                panels.append((f"{job.family} {place}: {what}", partial(draw, part=modules[name])))
    return sorted(panels, key=lambda panel: panel[0].rsplit(":", 1)[1])


def learned_functions(jobs: list[Job]) -> bytes | None:
    """What the pretrained KArAt and GR-KAN learned; None without either."""
    panels = function_panels(jobs)
    if not panels:
        return None
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.6 * rows), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, draw) in zip(axes.flat, panels, strict=False):
        draw(axis)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    return _png(figure)


def _draw_karat(axis: Any, part: KArAtOperator) -> None:
    """Six of head 0's functions φ of a score, spread over tokens and ranks."""
    s = torch.linspace(-np.pi, np.pi, 200)
    _, outputs, inputs = part.phi.shape
    for output, token in zip(_spread(outputs), _spread(inputs), strict=True):
        axis.plot(s, part.phi.curve(s, 0, output, token), linewidth=1)
    axis.set_xlabel("score")


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


def _table(columns: list[str], rows: int, draw: Callable[[Any, str, int], None]) -> bytes:
    size = 2.4
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(size * len(columns), size * rows), constrained_layout=True, squeeze=False
    )
    for row in range(rows):
        for axis, column in zip(axes[row], columns, strict=True):
            draw(axis, column, row)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(column, fontsize=10)
    return _png(figure)


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    plt.close(figure)
    return buffer.getvalue()
