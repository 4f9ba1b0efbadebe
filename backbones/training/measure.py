"""Parameters, GFLOPs, images per second and peak memory, measured the same way for every task."""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, each shared one counted once."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def count_gflops(run: Callable[[], Any]) -> float:
    """Billions of multiply-accumulates of the matrix products, convolutions and attention in ``run()``.

    One multiply-accumulate is one FLOP, as in the vision papers. Elementwise work (softmax, sin, cos) is not counted.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2 / 1e9


@torch.no_grad()
def images_per_second(run: Callable[[], Any], batch_size: int, seconds: float = 2.0) -> float:
    """Images per second of ``run()``, which handles ``batch_size`` images: median of at least three timed calls."""
    run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        _synchronize()
        before = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - before)
    return batch_size / sorted(times)[len(times) // 2]


def peak_memory_mb() -> float:
    """Peak memory in MiB so far: allocated on the GPU when there is one, else resident of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**10 if sys.platform == "linux" else peak / 2**20


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
