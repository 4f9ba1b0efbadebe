"""Runs a function of queries a block at a time, recomputed in the backward pass: memory grows with N, not with N²."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What one block may hold, in numbers: within a core's share of the cache, or enough to fill a GPU.
_BLOCK = {"cpu": 2**20}
_BLOCK_GPU = 2**25


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor, row_size: int, random: bool = False) -> Tensor:
    """``function(x)`` for a function that treats each query alone, a block of queries at a time.

    What fits into one block is not recomputed.

    Args:
        function: (B, h, m, c) to (B, h, m, c') for any m.
        x: (B, h, M, c).
        row_size: numbers that the function makes for one query of one head of one image.
        random: the function draws random numbers, which recomputation must repeat.
    """
    batch, heads = x.shape[:2]
    limit = _BLOCK.get(x.device.type, _BLOCK_GPU)
    parts = x.split(max(1, limit // max(1, batch * heads * row_size)), 2)
    if len(parts) == 1:
        return function(x)
    if torch.is_grad_enabled():
        parts = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=random) for part in parts]
    else:
        parts = [function(part) for part in parts]
    return torch.cat(parts, 2)
