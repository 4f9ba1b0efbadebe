"""The folder of a run: who may write into it, and what its files are called in every task."""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..utils.errors import UserError
from ..utils.files import make_folder

WEIGHTS = "model.safetensors"  # what a finished run is for
BEST = "best.safetensors"  # the same at its best evaluation so far
CHECKPOINT = "checkpoint.pth"  # what a run continues from
METRICS = "metrics.json"
LOCK = ".lock"

_held: set[Path] = set()  # by this process, for which the system's lock is no obstacle


class Claim:
    """A folder that this process alone writes into, until ``release`` or its death.

    The lock belongs to the process, as POSIX says: data-loading workers do not inherit it, and the system frees it when
    the process dies in whatever way.

    Args:
        path: the folder; made when it does not exist.

    Raises:
        UserError: when another process, or another part of this one, holds it.
    """

    def __init__(self, path: str | Path):
        self.path = make_folder(path).resolve()
        if self.path in _held:
            raise UserError(_in_use(path, f"process {os.getpid()}"))
        self._file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(self._file, 4096, 0)
            os.close(self._file)
            raise UserError(_in_use(path, _described(holder))) from None
        _held.add(self.path)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        for part in self.path.glob(".*.part"):  # of a process that died while it wrote
            part.unlink(missing_ok=True)

    def release(self) -> None:
        if self.path in _held:
            _held.remove(self.path)
            os.ftruncate(self._file, 0)  # the file stays: one removed could be locked twice, old and new
            os.close(self._file)

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def wait_until_free(path: Path, seconds: float = 60.0) -> None:
    """Returns when no process holds a folder that exists.

    Raises:
        UserError: when one still does after so long.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            Claim(path).release()
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
        else:
            return


@contextmanager
def claimed(path: str | Path, resume: bool, setting: str, is_main: bool) -> Iterator[Path]:
    """The folder of a run while the run goes on, the main process's alone.

    Args:
        resume, setting: see ``check_use``, which a run asks first of all; here it is asked again, for another run may
            have ended while this one read its data.
    """
    if not is_main:
        yield Path(path)
        return
    with Claim(path):
        check_use(path, resume, setting)
        yield Path(path)


def check_use(path: str | Path, resume: bool, setting: str) -> None:
    """Whether a run may start in a folder, or continue there.

    Args:
        setting: how the user names the folder, such as ``output=FOLDER``.

    Raises:
        UserError: for a new run where one is already, and for a continuation where there is none.
    """
    path = Path(path)
    if resume:
        if not (path / CHECKPOINT).is_file():
            raise UserError(f"nothing to resume: {path / CHECKPOINT} does not exist. Leave out --resume to start.")
        return
    present = next((name for name in (WEIGHTS, CHECKPOINT) if (path / name).exists()), None)
    if present:
        raise UserError(
            f"{path} holds a run already ({present}). Continue it with --resume, or choose another {setting}."
        )


def keep(folder: Path, step: int) -> None:
    """Keeps the checkpoint as it is now beside those that will take its place."""
    kept = folder / f"checkpoint-{step:08d}.pth"
    kept.unlink(missing_ok=True)
    try:
        os.link(folder / CHECKPOINT, kept)
    except OSError:  # a file system without links
        shutil.copyfile(folder / CHECKPOINT, kept)


def _in_use(path: str | Path, holder: str) -> str:
    return f"{path} is in use by {holder}. Wait for it, stop it, or choose another folder."


def _described(holder: bytes) -> str:
    try:
        known: dict[str, Any] = json.loads(holder)
        return f"process {int(known['process'])} on {str(known['host'])[:80]}"
    except (ValueError, KeyError, TypeError):
        return "another process"
