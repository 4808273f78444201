"""Features that stay where they are, in host memory or in files, and come to the device a panel at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pyreid import _native

_TAKEN = 2**24  # elements of rows that are fetched together


class Shards:
    """Rows of several arrays, one array after another. What is computed from them is a torch tensor on their
    device.

    `shape`, `dtype` and `device` are those of the rows once they are there; `like` is an empty tensor there.
    """

    def __init__(self, op: str, arrays: Sequence[Any], device: Any, rows: Any = None):
        self._arrays = [a.detach() if _native.is_torch(a) else a for a in arrays]
        self.dtype, dim = _checked(op, arrays)
        self.device = torch.device(device)
        self._rows = rows  # which of all there are; None: all
        self._starts = np.cumsum([0] + [len(array) for array in arrays])
        self.shape = (int(self._starts[-1]) if rows is None else len(rows), dim)
        self.like = torch.empty(0, dtype=self.dtype, device=self.device)

    def selected(self, rows: Any) -> Shards:
        """These rows alone, in this order."""
        chosen = _native.to_numpy(rows)
        chosen = chosen if self._rows is None else self._rows[chosen]
        return Shards("", self._arrays, self.device, chosen)

    def returned(self, array: Any) -> Any:
        """A result as the features are: of their library, in host memory."""
        host = array.cpu()
        return host if _native.is_torch(self._arrays[0]) else host.numpy()

    def beside(self, array: Any) -> Any:
        """An argument where the rows will be."""
        if array is None:
            return None
        tensor = array if _native.is_torch(array) else torch.tensor(_native.to_numpy(array))
        return tensor.to(self.device)

    def panels(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows) of consecutive panels, at least one; each lasts until the next but one is asked
        for. While the device works on one, the next is read and copied."""
        stages = [_Stage(min(size, self.shape[0]), self.like, self.shape[1]) for _ in range(2)]
        for turn, first in enumerate(range(0, max(self.shape[0], 1), size)):
            stage = stages[turn % 2]
            last = min(first + size, self.shape[0])
            self._read(range(first, last), stage.to_fill(last - first))
            yield first, stage.sent(last - first)
            stage.used()

    def take(self, rows: Any) -> torch.Tensor:
        """(B, D): rows by number (NumPy or a range), on the device."""
        found = torch.empty((len(rows), self.shape[1]), dtype=self.dtype)
        self._read(rows, found)
        return found.to(self.device)

    def _read(self, rows: Any, out: torch.Tensor) -> None:
        """`rows`: a range, or numbers."""
        if isinstance(rows, range) and self._rows is None:
            for n, array in enumerate(self._arrays):
                start, stop = self._starts[n : n + 2].tolist()
                first, last = max(rows.start, start), min(rows.stop, stop)
                if first < last:
                    to = out[first - rows.start : last - rows.start]
                    _copy(array[first - start : last - start], to)
            return
        wanted = np.asarray(rows)
        if self._rows is not None:
            wanted = self._rows[wanted]
        order = np.argsort(wanted, kind="stable")  # files are read forwards
        bounds = np.searchsorted(wanted[order], self._starts)
        for n, array in enumerate(self._arrays):
            places = order[bounds[n] : bounds[n + 1]]
            for some in np.array_split(places, len(places) * self.shape[1] // _TAKEN + 1):
                numbers = wanted[some] - self._starts[n]
                if _native.is_torch(array):
                    out[torch.from_numpy(some)] = array[torch.from_numpy(numbers)]
                else:
                    _bits(out)[some] = _bits(array)[numbers]


def like(features: Any) -> Any:
    """An array of the library and on the device of what is computed from features."""
    return features.like if isinstance(features, Shards) else features


class _Stage:
    """Where a panel passes through: host memory that the device can copy from by itself, and the device's."""

    def __init__(self, rows: int, like: torch.Tensor, dim: int):
        self._on_cuda = like.is_cuda
        self._host = torch.empty((rows, dim), dtype=like.dtype, pin_memory=self._on_cuda)
        self._there = torch.empty((rows, dim), dtype=like.dtype, device=like.device)
        if self._on_cuda:
            self._copies = torch.cuda.Stream(like.device)
            self._work = torch.cuda.current_stream(like.device)
            self._copied, self._used = torch.cuda.Event(), torch.cuda.Event()
            self._there.record_stream(self._copies)
            self._used.record(self._work)

    def to_fill(self, rows: int) -> torch.Tensor:
        """The host memory, once the panel before has left it."""
        if self._on_cuda:
            self._copied.synchronize()
        return self._host[:rows]

    def sent(self, rows: int) -> torch.Tensor:
        """The panel on the device, for what the device is asked to do from now on."""
        there = self._there[:rows]
        if not self._on_cuda:
            return there.copy_(self._host[:rows])
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._used)
            there.copy_(self._host[:rows], non_blocking=True)
            self._copied.record(self._copies)
        self._work.wait_event(self._copied)
        return there

    def used(self) -> None:
        """What the device was asked to do so far is the last that needs the panel."""
        if self._on_cuda:
            self._used.record(self._work)


def _copy(array: Any, to: torch.Tensor) -> None:
    if _native.is_torch(array):
        to.copy_(array)
    else:
        _bits(to)[...] = _bits(array)


def _bits(array: Any) -> np.ndarray:
    """Memory as NumPy's integers: torch has no view of what may only be read, NumPy no bfloat16."""
    if _native.is_torch(array):
        return array.view({2: torch.int16, 4: torch.int32}[array.element_size()]).numpy()
    return array.view(f"i{array.dtype.itemsize}")


def _checked(op: str, arrays: Sequence[Any]) -> tuple[torch.dtype, int]:
    if not arrays:
        raise ValueError(f"{op}: features must hold at least one array, got none")
    found = None
    for array in arrays:
        kind = type(array).__name__
        if not _native.is_torch(array) and not isinstance(array, np.ndarray):
            raise ValueError(f"{op}: features must be arrays of torch or NumPy, got {kind}")
        if _native.on_cuda(array):
            raise ValueError(f"{op}: features must lie in host memory, got {array.device}")
        name = str(array.dtype).removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16"):  # NumPy's of a foreign byte order: ">f4"
            raise ValueError(f"{op}: features must be float32, float16 or bfloat16, got {name}")
        if array.ndim != 2:
            shape = tuple(array.shape)
            raise ValueError(f"{op}: features must have shape (any, any), got {shape}")
        if found is not None and found != (name, array.shape[1]):
            got = f"{name} of {array.shape[1]} columns beside {found[0]} of {found[1]}"
            raise ValueError(f"{op}: features must be alike in all shards, got {got}")
        found = name, array.shape[1]
    assert found is not None
    return getattr(torch, found[0]), found[1]
