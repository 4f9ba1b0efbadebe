"""How does a C++ kernel of this package come to run? Built on first use by the compiler at hand, kept in a cache.

The folder of built libraries is KARVIS_CACHE, or ``karvis`` in the user's cache; KARVIS_NATIVE=0 turns the kernels off.
Only what nobody else can have written is loaded: folder and file are this user's, no links, writable by no one else,
and the file ends in the digest of what was built. Anything else is built again.
"""

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from torch import Tensor

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-std=c++17"]
_DIGEST = hashlib.sha256().digest_size


def enabled() -> bool:
    return os.environ.get("KARVIS_NATIVE") != "0"


@cache
def library(source: Path, **defines: int) -> ctypes.CDLL | None:
    """The built ``source``, or None when there is no working compiler (a failing one is reported once)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    command = [*compiler.split(), *_FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
    try:
        return _load(source, command)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        warnings.warn(f"the CPU kernel was not built, the slower eager form runs instead: {reason}", stacklevel=2)
        return None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _load(source: Path, command: list[str]) -> ctypes.CDLL:
    key = "\0".join([source.read_text(), *command, platform.machine(), _processor()])
    name = f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    with _own_folder() as folder:
        try:
            return _open(name, folder)
        except OSError:  # absent, not ours, damaged, or of another machine
            _write(_build(source, command), name, folder)
            return _open(name, folder)


@contextmanager
def _own_folder() -> Iterator[int]:
    """The cache's folder, opened; a private one that lasts as long as this when others can write to it."""
    path = _folder()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        problem = "is a link, or no folder of this user"
    else:
        try:
            problem = _foreign(os.fstat(folder))
            if problem is None:
                yield folder
                return
        finally:
            os.close(folder)
    warnings.warn(
        f"the cache {path} {problem}, so that others may have put a library there: the CPU kernel is built again in "
        "each process. Set KARVIS_CACHE to a folder of yours with mode 700.",
        stacklevel=2,
    )
    with tempfile.TemporaryDirectory() as private:
        folder = os.open(private, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield folder
        finally:
            os.close(folder)


def _foreign(info: os.stat_result) -> str | None:
    """Why a file or folder may hold what someone else wrote; None when it cannot."""
    if info.st_uid != os.getuid():
        return "belongs to another user"
    return "can be written by other users" if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _open(name: str, folder: int) -> ctypes.CDLL:
    """Loads a library through the descriptor whose owner, mode and content were checked; raises OSError if not ours."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or _foreign(info):
            raise PermissionError(f"{name} is not a file of this user alone")
        with os.fdopen(os.dup(file), "rb") as reader:
            data = reader.read()
        if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
            raise OSError(f"{name} is damaged")  # the loader would die of a bus error
        # The descriptor stays open: the loader takes an equal name for a library that it has.
        return ctypes.CDLL(f"{'/proc/self' if sys.platform == 'linux' else '/dev'}/fd/{file}")
    except BaseException:
        os.close(file)
        raise


def _build(source: Path, command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder, "built.so")
        full = [*command, "-shared", "-fPIC", str(source), "-o", str(built)]
        subprocess.run(full, check=True, capture_output=True, text=True, timeout=120)
        return built.read_bytes()


def _write(library: bytes, name: str, folder: int) -> None:
    """Writes a library with its digest under a name of its own, then renames it: several processes may build."""
    temporary = f".{name}.{secrets.token_hex(8)}.part"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(library + hashlib.sha256(library).digest())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _folder() -> Path:
    if os.environ.get("KARVIS_CACHE"):
        return Path(os.environ["KARVIS_CACHE"])
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if os.access(base if base.exists() else base.parent, os.W_OK):
        return base / "karvis"
    return Path(tempfile.gettempdir(), f"karvis-{os.getuid()}")


def _processor() -> str:
    """What -march=native depends on: a cache shared by different machines holds one library for each."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))
