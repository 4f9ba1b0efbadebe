"""Unreadable training images: each is named once, counted across workers, and past 1 % of the data the run stops."""

import math
import multiprocessing
import sys
from multiprocessing import sharedctypes

from ..utils.errors import UserError, escaped


class SkipCounter:
    """Counts the distinct images that could not be read, in memory shared with data-loading workers.

    Args:
        total: number of images in the data set.
        limit: largest share of them that may be unreadable.
    """

    def __init__(self, total: int, limit: float = 0.01):
        self.total = total
        self.limit = limit
        self._flags = sharedctypes.RawArray("B", max(total, 1))
        self._lock = multiprocessing.Lock()

    def skip(self, index: int, path: str, error: BaseException) -> None:
        """Marks image ``index`` as unreadable and names it on standard error the first time; raises past the limit."""
        with self._lock:
            seen, self._flags[index] = self._flags[index], 1
        if not seen:
            print(escaped(f"warning: skipped unreadable image {path} ({error})"), file=sys.stderr, flush=True)
        self.check(path)

    @property
    def count(self) -> int:
        """The number of distinct unreadable images so far."""
        return sum(self._flags)

    @property
    def marked(self) -> list[int]:
        """The images that could not be read."""
        return [index for index, flag in enumerate(self._flags) if flag]

    def mark(self, images: list[int]) -> None:
        """Counts images that an earlier part of the run could not read."""
        for index in images:
            self._flags[index] = 1

    def check(self, example: str = "named above") -> None:
        """Raises UserError when more than ``limit`` of the images (and more than one) were unreadable."""
        allowed = max(1, math.floor(self.limit * self.total))
        if self.count > allowed:
            raise UserError(
                f"{self.count} of {self.total} training images are unreadable, more than {self.limit:.0%} "
                f"(last: {example}). Repair or remove the images named above."
            )
