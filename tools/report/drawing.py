"""How the report draws: colours, labels that stay literal, text on pictures, and PNG and JPEG bytes."""

import colorsys
import io
import math
import re
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from backbones.utils.errors import escaped

mpl.use("Agg")
Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
DPI = 180
_ROWS = ["#4c72b0", "#c44e52", "#55a868", "#8172b2", "#dd8452", "#937860", "#da8bc3", "#5f6b6d", "#b5a642", "#2f9fb5"]
_DASHES = ["-", "--", "-.", ":"]
_CLASSES = plt.get_cmap("tab20")
_GOLDEN = (math.sqrt(5) - 1) / 2


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the row at ``index``; forty differ."""
    return {"color": _ROWS[index % len(_ROWS)], "linestyle": _DASHES[index // len(_ROWS) % len(_DASHES)]}


def class_color(index: int) -> Color:
    """RGB of 0 to 255 of a class counted from 0."""
    if index < 20:  # ten hues, then their pale forms
        red, green, blue = _CLASSES(2 * index % 20 + index // 10)[:3]
    else:
        red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN % 1, 0.65, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def literal(text: str) -> str:
    """``text`` as Matplotlib draws it letter by letter: a dollar sign begins no formula."""
    return escaped(text).replace("$", r"\$")


def file_name(text: str) -> str:
    """``text`` with what a file name should not hold replaced by ``_``."""
    return re.sub(r"[^A-Za-z0-9.@-]+", "_", text)


def legend_below(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """A legend under the axes, which gives the figure the height that it takes."""
    columns = 3 if max(map(len, labels)) <= 14 else 2 if max(map(len, labels)) <= 24 else 1
    lines = math.ceil(len(labels) / columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.19 * lines + 0.1)
    shown = [literal(label) for label in labels]
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def image_bytes(image: Image.Image, kind: str) -> bytes:
    """A picture as ``png``, or as ``jpeg`` small enough that dozens fit in one page."""
    buffer = io.BytesIO()
    options = {"quality": 85, "subsampling": 0} if kind == "jpeg" else {}
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, which is on every machine."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def write_label(draw: ImageDraw.ImageDraw, box: Box, text: str, color: Color, size: int, taken: list[Box]) -> None:
    """``text`` on a bar of ``color`` above ``box``, or below, or within, wherever it first covers no other label.

    Args:
        box: x0, y0, x1, y1 in pixels.
        taken: the bars drawn before, to which this one is added.
    """
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font(size))
    width, height = right - left + 8, bottom - top + 8
    limit = (draw.im.size[0] - width, draw.im.size[1] - height)
    places = [(box[0], box[1] - height), (box[0], box[3]), (box[2] - width, box[1] - height), (box[2] - width, box[3])]
    places += [(box[0], box[1]), (box[0], box[3] - height)]
    corners = [tuple(max(0.0, min(value, most)) for value, most in zip(place, limit, strict=True)) for place in places]
    bars = [(x, y, x + width, y + height) for x, y in corners]
    bar = next((bar for bar in bars if not any(_overlap(bar, other) for other in taken)), bars[0])
    taken.append(bar)
    draw.rectangle(bar, fill=color)
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    ink = (0, 0, 0) if light else (255, 255, 255)
    draw.text((bar[0] + 4 - left, bar[1] + 4 - top), text, fill=ink, font=font(size))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def write_line(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, width: int, color: Color, size: int
) -> None:
    """``text`` with its upper left corner at ``place``, cut where it is wider than ``width`` pixels."""
    if font(size).getlength(text) > width:
        while text and font(size).getlength(text + "…") > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, fill=color, font=font(size))


def montage(lines: list[list[tuple[str, Image.Image]]], width: int = 320) -> Image.Image:
    """Lines of captioned pictures on white, each picture ``width`` pixels wide at its own aspect."""
    gap, size = 8, 22
    bar = size + 10
    scaled = [
        [(text, image.resize((width, round(image.height * width / image.width)))) for text, image in line]
        for line in lines
    ]
    heights = [bar + gap + max(image.height for _, image in line) for line in scaled]
    sheet = Image.new("RGB", (max(map(len, lines)) * (width + gap) + gap, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for line, height in zip(scaled, heights, strict=True):
        for column, (text, image) in enumerate(line):
            x = gap + column * (width + gap)
            write_line(draw, (x, y), text, width, (0, 0, 0), size)
            sheet.paste(image, (x, y + bar))
        y += height
    return sheet
