"""The state of every random generator: saved for an exact resume, set for one sample."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_STARTS = (random.seed, np.random.seed, torch.manual_seed)


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators, as tensors and plain values that torch.load allows."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators where ``random_state`` found them; the GPUs' only when there are as many."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(*key: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators by one or more numbers."""
    for seed, start in zip(np.random.SeedSequence(key).generate_state(3), _STARTS, strict=True):
        start(int(seed))


@contextmanager
def sample_seed(*key: int) -> Iterator[None]:
    """Seeds the generators by ``key`` for one sample, so that workers and resumes do not matter; then restores them."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_everything(*key)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
