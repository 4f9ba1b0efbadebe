"""One function that carries coefficients over tokens to another token grid, for loading and for running alike."""

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


def resample_tokens(t: Tensor, old: Grid, new: Grid, old_prefix: int, new_prefix: int, keep_sum: bool) -> Tensor:
    """Resamples the last axis, one value per token, as a 2-D grid with prefix (class) tokens apart.

    The mean over the grid is kept exactly, so that an operator's output on a constant image does not change.

    Args:
        t: (..., old_prefix + old_h·old_w).
        old, new: (rows, columns) of the grids.
        old_prefix, new_prefix: number of prefix tokens; a missing one starts as the grid's mean.
        keep_sum: scale the grid by N_old/N_new, so that sums over its tokens keep their size.

    Returns:
        (..., new_prefix + new_h·new_w)
    """
    if old == new and old_prefix == new_prefix:
        return t
    lead = t.shape[:-1]
    prefix, grid = t[..., :old_prefix], t[..., old_prefix:]
    mean = grid.mean(-1, keepdim=True)
    if old != new:
        maps = grid.reshape(-1, 1, *old).to(torch.promote_types(t.dtype, torch.float32))
        maps = F.interpolate(maps, size=new, mode="bicubic", align_corners=False)
        maps = maps.reshape(*lead, new[0] * new[1]).to(t.dtype)
        maps = maps - maps.mean(-1, keepdim=True) + mean
        grid = maps * (old[0] * old[1] / (new[0] * new[1])) if keep_sum else maps
    if new_prefix > old_prefix:
        missing = mean.expand(*lead, new_prefix - old_prefix)
        prefix = torch.cat([prefix, missing], -1)
    return torch.cat([prefix[..., :new_prefix], grid], -1)
