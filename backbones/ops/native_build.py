"""How does a C++ kernel of this package come to run? Built on first use by the compiler at hand, kept in a cache.

The folder of built libraries is KARVIS_CACHE, or ``karvis`` in the user's cache; KARVIS_NATIVE=0 turns the kernels off.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

from torch import Tensor

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-std=c++17"]


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
        return ctypes.CDLL(str(_build(source, command)))
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        warnings.warn(f"the CPU kernel was not built, the slower eager form runs instead: {reason}", stacklevel=2)
        return None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _build(source: Path, command: list[str]) -> Path:
    key = "\0".join([source.read_text(), *command, platform.machine(), _processor()])
    path = _folder() / f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{path.parent} belongs to another user; set KARVIS_CACHE to a folder of yours")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed whole: several processes may build
            built = Path(folder, "built.so")
            full = [*command, "-shared", "-fPIC", str(source), "-o", str(built)]
            subprocess.run(full, check=True, capture_output=True, text=True, timeout=120)
            built.replace(path)
    return path


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
