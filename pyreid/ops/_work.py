"""How a long op is done: which rows are this process's, and who is told how far it has come."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pyreid import _native, distributed

Progress = Callable[[str, int, int], object]  # stage, rows done, of how many

_FEWEST, _BLOCKS = 16384, 16  # rows of a block, and blocks of a pass: each clears arrays of N


class Work:
    """Rows 0, ..., size - 1, in stages, each of them in parts.

    Args:
        size: N.
        divided: rows are split over the processes of torch.distributed.
        progress: is told of each stage's beginning and end, and now and then between.
        begun: is called with a stage's name and an array that the stage before has made.
    """

    def __init__(
        self,
        size: int,
        *,
        divided: bool = False,
        progress: Progress | None = None,
        begun: Callable[[str, Any], object] | None = None,
    ):
        self.size = size
        self.divided = divided and distributed.world_size() > 1
        self._progress, self._begun = progress, begun
        self._stage: str | None = None
        self._told = -1
        self._before, self._weight = 0.0, 0.0  # parts that are done, and the one at hand: of 1

    @property
    def listened(self) -> bool:
        return self._progress is not None

    def share(self, count: int, step: int = 1) -> range:
        """This process's of `count` rows, beginning at a multiple of `step`."""
        if not self.divided:
            return range(count)
        steps = distributed.share(-(-count // step))
        return range(min(steps.start * step, count), min(steps.stop * step, count))

    def check_alike(self, op: str, name: str, norms: Any) -> None:
        """A ValueError on all processes that divide the work, unless they have the same norms of rows."""
        if not self.divided:
            return
        host = _native.to_numpy(norms)
        own = np.array([[len(host), zlib.crc32(host.tobytes())]])
        found = _native.to_numpy(gathered(_native.from_numpy(norms, own)))
        if (found != own).any():
            raise ValueError(
                f"{op}: {name} must be the same on all processes that divide the work, got others"
            )

    def gather(self, rows: Any) -> Any:
        """The rows of all processes, in their order."""
        return gathered(rows) if self.divided else rows

    def begin(self, stage: str, after: Any = None) -> None:
        self.end()
        self._stage, self._told, self._before, self._weight = stage, -1, 0.0, 0.0
        if self._begun is not None:
            self._begun(stage, after)
        self.tell(0)

    def part(self, weight: float) -> None:
        """Begins the next part of the stage, `weight` of it."""
        self._before += self._weight
        self._weight = weight

    def tell(self, done: float) -> None:
        """So much of the part is done, of 1."""
        rows = min(int(self.size * (self._before + self._weight * done)), self.size)
        if self._progress is not None and self._stage is not None and rows > self._told:
            self._told = rows
            self._progress(self._stage, rows, self.size)

    def end(self) -> None:
        """Ends the stage, if one has begun."""
        self._before, self._weight = 1.0, 0.0
        self.tell(0)
        self._stage = None

    def blocks(self, rows: range, weight: float) -> Iterator[tuple[int, slice]]:
        """(first row, place among `rows`) of blocks of them: one, unless somebody wants to hear of them."""
        self.part(weight)
        size = len(rows)
        if self.listened:
            size = max(_FEWEST, -(-size // _BLOCKS))
        for first in range(rows.start, rows.stop, max(size, 1)):
            some = slice(first - rows.start, min(first + size, rows.stop) - rows.start)
            yield first, some
            self.tell(some.stop / len(rows))


def gathered(rows: Any) -> Any:
    """The rows of all processes, in the order of their ranks; of any library."""
    if _native.is_torch(rows):
        return distributed.gather_rows(rows)
    if _native.is_cupy(rows):
        return _native.namespace(rows).from_dlpack(distributed.gather_rows(torch.from_dlpack(rows)))
    return distributed.gather_rows(torch.tensor(rows)).numpy()
