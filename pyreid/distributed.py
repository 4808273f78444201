"""What data-parallel processes share, through torch.distributed. One process has nothing to share, and calls
every function here for free."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist


class Traffic:
    """What this process had to do with others, by kind of message ("all_gather", ...): how often, and how
    many bytes it sent to them and received from them.

    all_gather: what each of the others sends. all_to_all: what is for others, and from them. broadcast: the
    whole, sent by one, received by the others. all_reduce: 2 (P - 1) / P of the whole both ways, as in a ring
    of P.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()


_listening: list[Traffic] = []


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the messages of pyreid, on this process, while it is open. It sends none of its own."""
    traffic = Traffic()
    _listening.append(traffic)
    try:
        yield traffic
    finally:
        _listening.remove(traffic)


def count(kind: str, sent: int, received: int) -> None:
    """Tells who is counting of a message of `kind`, in bytes."""
    for traffic in _listening:
        traffic.calls[kind] += 1
        traffic.sent[kind] += sent
        traffic.received[kind] += received


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def share(count: int) -> range:
    """Which of `count` rows are this process's: consecutive ones, as evenly as can be."""
    first, last = (count * part // world_size() for part in (rank(), rank() + 1))
    return range(first, last)


def gather_rows(rows: torch.Tensor, *, equal: bool = False) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks. No gradient flows through.

    Args:
        rows: (N, ...); N may differ from process to process, the rest may not.
        equal: N is the same everywhere. Saves a message, and on CUDA a wait.
    """
    rows = rows.detach()
    if world_size() == 1:
        return rows
    if equal:
        counts = [len(rows)] * world_size()
    else:
        mine = torch.tensor([len(rows)], device=rows.device)
        found = [torch.empty_like(mine) for _ in range(world_size())]
        count("all_gather", *[mine.nbytes * (world_size() - 1)] * 2)
        dist.all_gather(found, mine)
        counts = torch.cat(found).tolist()
    # Collectives want equal shapes.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    count("all_gather", *[padded.nbytes * (world_size() - 1)] * 2)
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def mean_(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces floating-point tensors by their mean over processes: one message per dtype."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        count("all_reduce", *[2 * flat.nbytes * (world_size() - 1) // world_size()] * 2)
        dist.all_reduce(flat)
        flat /= world_size()
        pieces = flat.split([tensor.numel() for tensor in group])
        for tensor, piece in zip(group, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def copy_from_first_(tensors: Iterable[torch.Tensor]) -> None:
    """Replaces tensors by those of rank 0, so that all processes begin alike."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def any_of(flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    if world_size() == 1:
        return flag
    flags: list[bool] = [False] * world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)
