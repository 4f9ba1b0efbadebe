"""Cutting a token map into square windows and back, with the padding that makes it divisible."""

import torch
from torch import Tensor
from torch.nn import functional as F


def window_partition(x: Tensor, size: int, offset: int = 0) -> tuple[Tensor, Tensor | None]:
    """Cuts (B, H, W, C) into windows, padded with zeros at the right and bottom, and ``offset`` at the left and top.

    Swin's windows shifted by s are those of the offset size − s: a window that its cyclic shift fills with tokens of
    several borders, masked from each other, is here several padded windows with the same tokens in the same places.

    Returns:
        windows (B·nH·nW, size², C), and a bool mask (B·nH·nW, size²), True = real token, or None without padding.
    """
    batch, height, width, _ = x.shape
    pad_h, pad_w = -(height + offset) % size, -(width + offset) % size
    windows = _cut(F.pad(x, (0, 0, offset, pad_w, offset, pad_h)), size)
    if not (offset or pad_h or pad_w):
        return windows, None
    real = torch.ones(1, height, width, 1, dtype=torch.bool, device=x.device)
    real = F.pad(real, (0, 0, offset, pad_w, offset, pad_h))
    return windows, _cut(real, size).squeeze(-1).repeat(batch, 1)


def window_unpartition(windows: Tensor, size: int, height: int, width: int, offset: int = 0) -> Tensor:
    """The inverse of ``window_partition``: (B·nH·nW, size², C) to (B, height, width, C)."""
    rows, columns = -(-(height + offset) // size), -(-(width + offset) // size)
    x = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))  # (B, nH, nW, s, s, C)
    x = x.transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return x[:, offset : offset + height, offset : offset + width]


def _cut(x: Tensor, size: int) -> Tensor:
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, nH, s, nW, s, C)
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)
