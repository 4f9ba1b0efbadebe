"""Times of several contestants in interleaved rounds, so that noise and clock changes hit all alike.

A contestant is a list of stages; each gets what the stage before returned and is timed on its own. A forward and a
backward stage therefore time the same graph, built anew in each round: no difference of two noisy times, no graph kept
for several backward passes. On a GPU, events take the times and the L2 cache is overwritten before every stage.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Stage = Callable[[Any], Any]
_FLUSH_BYTES = 512 * 2**20  # several times any L2, and long enough to write that launches get ahead of the GPU


def interleaved(
    runs: Mapping[str, Sequence[Stage]], device: torch.device, rounds: int, warmup: int = 3
) -> dict[str, list[list[float]]]:
    """Milliseconds of each stage: ``times[name][stage]`` has one value per round."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    times = {name: [[] for _ in stages] for name, stages in runs.items()}
    for index in range(warmup + rounds):
        order = list(runs) if index % 2 == 0 else list(runs)[::-1]
        for name in order:
            for stage, value in enumerate(_run(runs[name], flush)):
                if index >= warmup:
                    times[name][stage].append(value)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median of the rounds and their spread: the distance of the quartiles over the median."""
    ordered, middle = sorted(values), median(values)
    return {"ms": middle, "spread": (ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]) / middle}


def peak_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Calls ``run()``; MiB that it took at most beyond what was in use before.

    On a GPU, what PyTorch allocated; on Linux, what the process had in memory; None elsewhere.
    """
    if device.type != "cuda":
        return _process_peak_mib(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _process_peak_mib(run: Callable[[], Any]) -> float | None:
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed would be taken again without a trace
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_kib("VmRSS")
    except (OSError, AttributeError):
        run()
        return None
    run()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _run(stages: Sequence[Stage], flush: Tensor | None) -> list[float]:
    value, marks = None, []
    for stage in stages:
        if flush is None:
            before = time.perf_counter()
            value = stage(value)
            marks.append((before, time.perf_counter()))
        else:
            flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            value = stage(value)
            after.record()
            marks.append((before, after))
    if flush is None:
        return [1e3 * (after - before) for before, after in marks]
    torch.cuda.synchronize(flush.device)
    return [before.elapsed_time(after) for before, after in marks]
