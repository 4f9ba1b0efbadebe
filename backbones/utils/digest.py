"""A digest within each file that shows a single flipped byte: behind a checkpoint, in the header of weights."""

import hashlib
import os
import re
from pathlib import Path

from .errors import UserError

KEY = "sha256"  # of a safetensors header; the digest is taken with zeros in its place
_ZEROS = b"0" * 64
_MARK = b"\nkarvis-sha256:"
_TRAILER = len(_MARK) + 64 + 1
_CHUNK = 2**22


def _digest(path: Path, end: int, head: bytes = b"") -> bytes:
    """The hexadecimal SHA-256 of a file's first ``end`` bytes, its beginning replaced by ``head``."""
    sha = hashlib.sha256(head)
    with path.open("rb") as file:
        file.seek(len(head))
        left = end - len(head)
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            sha.update(chunk)
            left -= len(chunk)
    return sha.hexdigest().encode()


def seal(path: Path) -> None:
    """Appends the digest of what a file holds; ``torch.load`` reads past it."""
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(_MARK + digest + b"\n")


def check_seal(path: Path) -> bool:
    """Whether a file carries a digest; UserError when it is not that of its bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _TRAILER))
        trailer = file.read()
    if not (trailer.startswith(_MARK) and trailer.endswith(b"\n")):
        return False
    if trailer[len(_MARK) : -1] != _digest(path, size - _TRAILER):
        raise damaged(path)
    return True


def seal_weights(path: Path) -> None:
    """Puts the digest of a safetensors file in the place of the zeros that its header's ``sha256`` holds."""
    head = _header(path)
    place = head.index(b'"%s":"%s"' % (KEY.encode(), _ZEROS)) + len(KEY) + 4
    digest = _digest(path, path.stat().st_size, head)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest)


def check_weights(path: Path, required: bool) -> None:
    """Raises UserError when a safetensors file's digest is not that of its bytes, or ``required`` and missing."""
    head = _header(path)
    found = re.search(rb'"%s":"([^"]*)"' % KEY.encode(), head)
    if found is None and not required:
        return
    if found is None or len(found[1]) != 64:
        raise damaged(path)
    zeroed = head[: found.start(1)] + _ZEROS + head[found.end(1) :]
    if found[1] != _digest(path, path.stat().st_size, zeroed):
        raise damaged(path)


def damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: its bytes are not those that were written (its digest differs). Copy it again, or use "
        "another checkpoint of the run."
    )


def _header(path: Path) -> bytes:
    """The first bytes of a safetensors file: length and header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 <= length <= os.fstat(file.fileno()).st_size:
            raise damaged(path)
        file.seek(0)
        return file.read(8 + length)
