"""Files that are whole or absent: written under a temporary name, then renamed."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import digest
from .errors import UserError

FORMAT = 2  # of checkpoints and weights: with one header, and with a digest that must be there


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its name on success and is removed on failure.

    Raises:
        OSError: ENOSPC naming ``path`` when the disk is full, whatever the writing library made of it.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
        _to_disk(path.parent)
    except Exception as error:
        if _disk_is_full(error, path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of files, would survive the machine's death."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without it, for folders
            raise
    finally:
        os.close(file)


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for want of space; safetensors and torch.save report it as errors of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or shutil.disk_usage(folder).free < 2**16


def make_folder(path: str | Path) -> Path:
    """Creates a folder and its parents; a file in the way is a UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"cannot make the folder {path}: a file is in the way. Choose another output folder.") from None
    return path


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; NaN and infinity, which JSON has not, as null."""
    write_text(path, json.dumps(_finite(value), indent=2, sort_keys=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_weights(path: str | Path, state: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Writes tensors as safetensors, with ``metadata`` (JSON values), the format and a digest in the header."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    metadata = {**(metadata or {}), "karvis_format": FORMAT}
    header = {key: json.dumps(value, default=str) for key, value in metadata.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={**header, digest.KEY: "0" * 64})
        digest.seal_weights(temporary)
