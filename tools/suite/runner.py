"""Running the jobs of a comparison: several at a time, each in a process, continuing what was interrupted."""

import ctypes
import os
import signal
import subprocess
import sys
import time

from backbones.training.folder import wait_until_free
from backbones.utils.documents import read_json
from backbones.utils.files import make_folder

from .plan import ROOT, Job

LOG = "log.txt"
_LOG_LINES = 5
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_SHOWN = {
    "classification": ("top1",),
    "detection": ("box_ap50", "box_ap", "mask_ap"),
    "segmentation": ("miou",),
}


def default_jobs() -> int:
    """Runs at a time: one per GPU; without a GPU one per core, at most four."""
    import torch

    return torch.cuda.device_count() or min(4, os.cpu_count() or 1)


def run_jobs(jobs: list[Job], slots: int) -> dict[str, str]:
    """Runs every job that is not done, pretraining before what starts from it.

    Returns:
        For each job that failed, by name: how its log ends, or the pretraining that it waited for.
    """
    waiting = [job for job in jobs if not job.is_done()]
    for job in jobs:
        if job.is_done():
            print(f"[done before] {job.name}: {_figures(job)}", flush=True)
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}  # by slot
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for slot in sorted(set(range(slots)) - set(running)):
                job = _next(waiting, jobs)
                if job:
                    waiting.remove(job)
                    running[slot] = (job, _start(job, slot, slots), time.monotonic())
            if not running:  # what is left waits for a pretraining that failed
                break
            time.sleep(0.2)
            for slot in [slot for slot, (_, process, _) in running.items() if process.poll() is not None]:
                job, process, began = running.pop(slot)
                if not _ended_well(job, process.returncode, time.monotonic() - began, jobs):
                    failed[job.name] = _end_of_log(job)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed | {job.name: f"the pretraining of {job.pretraining!r} is missing." for job in waiting}


def _ended_well(job: Job, code: int, seconds: float, jobs: list[Job]) -> bool:
    """Prints how a run ended."""
    well = code == 0 and job.is_done()
    done = sum(other.is_done() for other in jobs)
    outcome = (
        f"[{done}/{len(jobs)}] {job.name}: {_figures(job)}" if well else f"[failed] {job.name}, see {job.folder / LOG}"
    )
    print(f"{outcome} ({seconds:.0f} s)", flush=True)
    return well


def _end_of_log(job: Job) -> str:
    log = (job.folder / LOG).read_text(encoding="utf-8", errors="replace")
    return "\n".join(log.strip().splitlines()[-_LOG_LINES:])


def _next(waiting: list[Job], jobs: list[Job]) -> Job | None:
    """The first job whose pretraining is done."""

    def ready(job: Job) -> bool:
        return job.task == "classification" or any(job.starts_from(other) and other.is_done() for other in jobs)

    return next(filter(ready, waiting), None)


def _start(job: Job, slot: int, slots: int) -> subprocess.Popen:
    wait_until_free(make_folder(job.folder))  # a run of a killed suite ends its step first
    resume = ["--resume"] if job.resumable() else []
    threads = max(1, (os.cpu_count() or 1) // slots)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTORCH_JIT": "0", "PYTHONUNBUFFERED": "1"}
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot)
    command = [*job.command[:2], *resume, *job.command[2:]]
    with (job.folder / LOG).open("a", encoding="utf-8") as log:
        log.write("$ " + " ".join(command) + "\n")
        log.flush()
        print(f"[started] {job.name}{' again' if resume else ''}", flush=True)
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            preexec_fn=_die_with_the_suite if _LIBC else None,  # noqa: PLW1509
        )


def _die_with_the_suite() -> None:
    """Ends a run when the suite was killed: two runs in one folder, the old and its continuation, would spoil it.

    Called between fork and exec; the suite has one thread, so no lock can be held then.
    """
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _figures(job: Job) -> str:
    metrics = read_json(job.folder / "metrics.json", "metrics")
    return ", ".join(f"{name} {metrics[name]:.1f}" for name in _SHOWN[job.task] if name in metrics)
