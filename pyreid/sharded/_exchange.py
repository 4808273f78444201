"""Messages between the processes that share rows: counted, and failing with words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pyreid import distributed

Piece = TypeVar("Piece")


class Exchange:
    """The processes of a group, for one call of `op`. All of them make the same calls in the same order.

    Rows go as bytes, of whatever dtype. A process by itself has nobody to write to.
    """

    def __init__(self, op: str, group: Any = None):
        self.op = op
        self.group = group
        on = distributed.is_distributed()
        self.rank = dist.get_rank(group) if on else 0
        self.size = dist.get_world_size(group) if on else 1

    def _said(self, kind: str, what: str, sent: int, received: int, call: Callable) -> Any:
        """A message; any failure of it says what was under way, and where."""
        distributed.count(kind, sent, received)
        return self._watched(kind, what, call)

    def _watched(self, kind: str, what: str, call: Callable) -> Any:
        try:
            return call()
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"{self.op}: {what} ({kind}) failed on rank {self.rank} of {self.size}: another rank has "
                f"ended, or did not come within the group's timeout: {reason}"
            ) from error

    def numbers(self, what: str, mine: list[int], like: torch.Tensor) -> list[list[int]]:
        """The same few numbers of every process."""
        if self.size == 1:
            return [mine]
        own = torch.tensor(mine, device=like.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        others = own.nbytes * (self.size - 1)
        self._said(
            "all_gather",
            what,
            others,
            others,
            lambda: dist.all_gather(found, own, group=self.group),
        )
        return torch.stack(found).tolist()

    def gather(
        self, what: str, rows: torch.Tensor, counts: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """The rows of all processes, in the order of ranks, and how many each has."""
        if counts is None:
            counts = [count for (count,) in self.numbers(what, [len(rows)], rows)]
        if self.size == 1:
            return rows, counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        sent = [_bytes(part) for part in found]
        others = padded.nbytes * (self.size - 1)
        self._said(
            "all_gather",
            what,
            others,
            others,
            lambda: dist.all_gather(sent, _bytes(padded), group=self.group),
        )
        return torch.cat([p[:count] for p, count in zip(found, counts, strict=True)]), counts

    def swap(
        self, what: str, rows: torch.Tensor, counts: list[int], theirs: list[int]
    ) -> torch.Tensor:
        """The next `counts[r]` of these rows go to rank r; `theirs[r]` come from it, rank 0's first."""
        if self.size == 1:
            return rows
        came = rows.new_empty((sum(theirs), *rows.shape[1:]))
        width = rows.shape[1:].numel() * rows.element_size()
        out, back = ([count * width for count in some] for some in (counts, theirs))
        self._said(
            "all_to_all",
            what,
            sum(out) - out[self.rank],
            sum(back) - back[self.rank],
            lambda: dist.all_to_all_single(_bytes(came), _bytes(rows), back, out, group=self.group),
        )
        return came

    def sent_back(self, what: str, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """(P, own, ...): of rows made here for everybody's queries, `counts[r]` of rank r, each gets its own,
        from all."""
        own = counts[self.rank]
        came = self.swap(what, rows.contiguous(), counts, [own] * self.size)
        return came.view(self.size, own, *rows.shape[1:])

    def reduce_(self, what: str, values: torch.Tensor, kind: str = "SUM") -> torch.Tensor:
        """Replaces values by their sum, largest or smallest over processes."""
        if self.size > 1:
            moved = 2 * values.nbytes * (self.size - 1) // self.size
            self._said(
                "all_reduce",
                what,
                moved,
                moved,
                lambda: dist.all_reduce(values, getattr(dist.ReduceOp, kind), group=self.group),
            )
        return values

    def spread(self, what: str, rows: torch.Tensor, source: int) -> Callable[[], object]:
        """Begins to copy the rows of rank `source` to all; what it returns waits for them."""
        if self.size == 1:
            return lambda: None
        own = self.rank == source
        of_all = source if self.group is None else dist.get_global_rank(self.group, source)
        flat = _bytes(rows)
        work = self._said(
            "broadcast",
            what,
            rows.nbytes if own else 0,
            0 if own else rows.nbytes,
            lambda: dist.broadcast(flat, of_all, group=self.group, async_op=True),
        )
        return lambda: self._watched("broadcast", what, work.wait)

    def together(self, pieces: Iterable[Piece], like: torch.Tensor) -> Iterator[Piece | None]:
        """The pieces of this process, then None until the others have gone through theirs."""
        left = iter(pieces)
        while True:
            piece = next(left, None)
            more = self.numbers("rounds", [int(piece is not None)], like)
            if not any(flag for (flag,) in more):
                return
            yield piece


class Places(NamedTuple):
    """Who has which rows: rank r those from starts[r] to starts[r + 1]."""

    starts: list[int]
    rank: int

    @classmethod
    def of(cls, exchange: Exchange, rows: torch.Tensor) -> Places:
        """A ValueError on all, unless rows are alike on all."""
        own = [len(rows), rows.shape[1:].numel(), rows.element_size()]
        found = exchange.numbers("numbers of rows", own, rows)
        if len({(columns, size) for _, columns, size in found}) > 1:
            each = ", ".join(f"{columns} of {size} bytes" for _, columns, size in found)
            raise ValueError(
                f"{exchange.op}: features must have the same columns on all ranks, got {each}"
            )
        starts = [0]
        for count, *_ in found:
            starts.append(starts[-1] + count)
        return cls(starts, exchange.rank)

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def own(self) -> range:
        return range(self.starts[self.rank], self.starts[self.rank + 1])


class Route:
    """The way from rows by number, of all, to those who have them, and back.

    `ids`: (E,) in [0, N), any order. `asked`: (A,) which of its own rows this process is asked for, by rank 0
    first; each rank's in the order of its ids.
    """

    def __init__(self, exchange: Exchange, places: Places, name: str, ids: torch.Tensor):
        self._exchange = exchange
        starts = torch.tensor(places.starts, device=ids.device)
        outside = (ids < 0) | (ids >= places.total)
        owners = torch.searchsorted(starts[1:-1].contiguous(), ids, right=True)
        counts = torch.bincount(owners, minlength=exchange.size).tolist()
        wrong = bool(outside.any())
        # Who has a wrong id tells the others, or they would wait for him.
        table = exchange.numbers(f"counts of {name}", [-1] * len(counts) if wrong else counts, ids)
        for rank, row in enumerate(table):
            if row[0] < 0:
                got = int(ids[outside][0]) if wrong else f"another on rank {rank}"
                raise ValueError(
                    f"{exchange.op}: {name} must lie in [0, {places.total}), got {got}"
                )
        self._counts = counts
        self._theirs = [row[exchange.rank] for row in table]
        in_order = bool((owners[1:] >= owners[:-1]).all())
        self._order = None if in_order else torch.argsort(owners, stable=True)
        self.asked = self.tell(name, (ids - starts[owners]).int()).long()

    def tell(self, what: str, values: torch.Tensor) -> torch.Tensor:
        """(E, ...) values beside the ids, to those who have the rows: (A, ...) beside `asked`."""
        if self._order is not None:
            values = values[self._order]
        return self._exchange.swap(what, values.contiguous(), self._counts, self._theirs)

    def answer(self, what: str, values: torch.Tensor) -> torch.Tensor:
        """(A, ...) values beside `asked`, to those who have asked: (E, ...) beside their ids."""
        came = self._exchange.swap(what, values.contiguous(), self._theirs, self._counts)
        if self._order is None:
            return came
        back = torch.empty_like(came)
        back[self._order] = came
        return back

    def fetch(self, what: str, table: torch.Tensor) -> torch.Tensor:
        """(E, ...): the rows, of which each process gives its own as `table`."""
        return self.answer(what, table[self.asked])

    def fetch_sparse(self, what: str, rows: tuple) -> tuple:
        """(starts, ids, values) of the rows, of which each process gives its own. For ids that ascend."""
        assert self._order is None
        starts, columns, values = rows
        first = starts[self.asked]
        counts = starts[self.asked + 1] - first
        entries = spans(first, counts)
        found = self.answer(what, counts.int()).long()
        sizes = [
            [int(part.sum()) for part in some.split(lengths)]
            for some, lengths in ((counts, self._theirs), (found, self._counts))
        ]
        columns, values = (
            self._exchange.swap(what, part[entries], *sizes) for part in (columns, values)
        )
        return starts_of(found), columns, values


def spans(first: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """first[0], first[0] + 1, ..., `counts[0]` of them, then those from first[1], and so on."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    shift = torch.repeat_interleave(first - (ends - counts), counts, output_size=total)
    return torch.arange(total, device=first.device) + shift


def starts_of(counts: torch.Tensor) -> torch.Tensor:
    """(n + 1,) int64: where each row begins, and the end."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(-1).view(torch.uint8)
