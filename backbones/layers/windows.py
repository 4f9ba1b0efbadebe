"""Cutting a token map into square windows and back, with the padding that makes it divisible."""

import torch
from torch import Tensor
from torch.nn import functional as F


def window_partition(x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Cuts (B, H, W, C) into windows, padded with zeros at the right and bottom.

    Returns:
        windows (B·nH·nW, size², C), and a bool mask (B·nH·nW, size²), True = real token, or None without padding.
    """
    batch, height, width, _ = x.shape
    pad_h, pad_w = -height % size, -width % size
    windows = _cut(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)), size)
    if not pad_h and not pad_w:
        return windows, None
    real = torch.zeros(1, height + pad_h, width + pad_w, 1, dtype=torch.bool, device=x.device)
    real[:, :height, :width] = True
    return windows, _cut(real, size).squeeze(-1).repeat(batch, 1)


def window_unpartition(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of ``window_partition``: (B·nH·nW, size², C) to (B, height, width, C)."""
    rows, columns = -(-height // size), -(-width // size)
    x = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))  # (B, nH, nW, s, s, C)
    return x.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :height, :width]


def _cut(x: Tensor, size: int) -> Tensor:
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, nH, s, nW, s, C)
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)
