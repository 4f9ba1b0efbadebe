"""The CPU kernel: ``native.cpp`` built on first use by the C++ compiler at hand, and called without copies.

The folder of built libraries is KARVIS_CACHE, or ``karvis`` in the user's cache; KARVIS_NATIVE=0 turns the kernel off.
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

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-std=c++17"]
_CHUNK = 32  # rows whose coefficient gradients share one partial sum: their data stays within the caches
DTYPES = (torch.float32, torch.bfloat16)


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, form: str) -> Tensor:
    """F(x) for contiguous x (rows, C); arguments as in ``group_rational``."""
    library = _library(numerator.shape[1] - 1, denominator.shape[1], form == "abs_sum", x.dtype == torch.bfloat16)
    a, b, groups = _coefficients(numerator, denominator, form)
    out = torch.empty_like(x)
    sizes = (x.shape[0], groups, x.shape[1] // groups, _CHUNK, torch.get_num_threads())
    library.rational_forward(*map(_pointer, (x, a, b, out)), *_integers(sizes))
    return out


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dnumerator, ddenominator) for contiguous grad and x (rows, C)."""
    library = _library(numerator.shape[1] - 1, denominator.shape[1], form == "abs_sum", x.dtype == torch.bfloat16)
    a, b, groups = _coefficients(numerator, denominator, form)
    dx = torch.empty_like(x)
    sums = torch.empty(-(-x.shape[0] // _CHUNK), groups, a.shape[1] + b.shape[1])
    sizes = (x.shape[0], groups, x.shape[1] // groups, _CHUNK, torch.get_num_threads())
    library.rational_backward(*map(_pointer, (grad, x, a, b, dx, sums)), *_integers(sizes))
    da, db = sums.sum(0, dtype=torch.float64).split([a.shape[1], b.shape[1]], 1)
    if form == "sum_abs":
        db = torch.where(denominator < 0, -db, db)
    return dx, _shared(da, numerator), _shared(db, denominator)


def available(x: Tensor, degrees: tuple[int, int]) -> bool:
    """Whether the kernel can be used for x; builds it when it has not been built yet."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or os.environ.get("KARVIS_NATIVE") == "0":
        return False
    return _library(*degrees, False, x.dtype == torch.bfloat16) is not None


@cache
def _library(degree_p: int, degree_q: int, signed: bool, bf16: bool) -> ctypes.CDLL | None:
    """The built kernel, or None when there is no working compiler (a failing one is reported once)."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    defines = {"DEGREE_P": degree_p, "DEGREE_Q": degree_q, "SIGNED": int(signed), "BF16": int(bf16)}
    command = [*compiler.split(), *_FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
    try:
        return ctypes.CDLL(str(_build(command)))
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        warnings.warn(f"the CPU kernel was not built, the slower eager form runs instead: {reason}", stacklevel=2)
        return None


def _build(command: list[str]) -> Path:
    key = "\0".join([_SOURCE.read_text(), *command, platform.machine(), _processor()])
    path = _folder() / f"rational-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{path.parent} belongs to another user; set KARVIS_CACHE to a folder of yours")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed whole: several processes may build
            built = Path(folder, "built.so")
            full = [*command, "-shared", "-fPIC", str(_SOURCE), "-o", str(built)]
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


def _coefficients(numerator: Tensor, denominator: Tensor, form: str) -> tuple[Tensor, Tensor, int]:
    groups = max(len(numerator), len(denominator))
    a, b = (c.detach().float().expand(groups, -1).contiguous() for c in (numerator, denominator))
    return a, b.abs() if form == "sum_abs" else b, groups


def _shared(sums: Tensor, coefficient: Tensor) -> Tensor:
    return (sums.sum(0, keepdim=True) if len(coefficient) == 1 else sums).to(coefficient.dtype)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _integers(sizes: tuple[int, int, int, int, int]) -> tuple:
    rows, groups, width, chunk, threads = sizes
    return ctypes.c_int64(rows), groups, width, ctypes.c_int64(chunk), threads
