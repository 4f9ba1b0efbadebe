"""The one way an image file is read: a regular file, of a bounded number of pixels, whatever its bytes hold."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, TypeVar

from PIL import Image

from ..utils.documents import open_regular
from ..utils.errors import escaped

MAX_PIXELS = 2**28
_MAX_RATIO = 500  # of the sides: to resize the shorter to a network's input makes the longer as large

T = TypeVar("T")


class UnreadableImageError(OSError):
    """A file that cannot be decoded, or is no regular file: skipped in training, the end of an evaluation."""


def read_image(
    source: str | Path | IO[bytes], use: Callable[[Image.Image], T], max_pixels: int = MAX_PIXELS, setting: str = ""
) -> T:
    """What ``use`` makes of an image, which it decodes.

    Args:
        source: a path, or an open binary file, which is closed.
        use: takes the opened image to an array or to an image of its own.
        max_pixels: images of more are not decoded.
        setting: the name of this limit, for the message.

    Raises:
        UnreadableImageError: whatever a decoder raises on damaged bytes.
    """
    # PIL checks it as well, at twice this, also for images within images such as those of an icon.
    Image.MAX_IMAGE_PIXELS = max_pixels
    limit = f"more than {max_pixels} pixels" + (f"; raise {setting} to read it" if setting else "")
    try:
        file = open_regular(source) if isinstance(source, str | Path) else source
        with file, Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UnreadableImageError(f"{width}x{height} are {limit}")
            if max(width, height) > _MAX_RATIO * min(width, height):
                raise UnreadableImageError(f"{width}x{height} pixels are too narrow to be resized")
            return use(image)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImageError(f"it has {limit}") from None
    except Exception as error:  # decoders raise errors of any class
        text = escaped(" ".join(str(error).split()))[:200]
        kind = "" if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: "
        raise UnreadableImageError(f"{kind}{text}") from error


@cache
def _formats() -> list[str]:
    """What PIL decodes by itself: for EPS it runs another program on the file."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]
