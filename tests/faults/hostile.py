"""Helpers of the hostile inputs: a limit of time, the one way to end, and files to damage."""

import io
import random
import signal
import struct
import tarfile
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from backbones.utils.errors import UserError

FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "TIFF",
    "WEBP",
    "BMP",
    "ICO",
    "PPM",
    "TGA",
    "PCX",
    "JPEG2000",
    "DDS",
    "SGI",
    "IM",
    "QOI",
)


@contextmanager
def refused(message=""):
    """What stands within ends with a UserError that holds ``message``, within a minute, and is no defect."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took longer than a minute"))
    signal.alarm(60)
    try:
        with pytest.raises(UserError) as caught:
            yield caught
    finally:
        signal.alarm(0)
    text = str(caught.value)
    assert message in text, text
    assert "defect" not in text and "weights_only=False" not in text and len(text) < 5000


def image_bytes(kind="PNG", size=(24, 24)):
    """A picture of noise in a format of PIL's; None for one that this PIL does not write."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    try:
        Image.fromarray(noise).save(buffer, kind)
    except (OSError, KeyError, ValueError):
        return None
    return buffer.getvalue()


def large_png(width, height):
    """A PNG whose header promises ``width`` x ``height`` pixels, and holds none."""
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def mutated(raw, seed):
    """``raw`` with a few bytes changed, most of them near its beginning, and cut short now and then."""
    rng, data = random.Random(seed), bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(data), 200) if rng.random() < 0.7 else len(data))
        data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data)


def tar_of(members):
    """Bytes of a tar file of (name, type, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = "elsewhere.png" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
