"""Neighbours and Jaccard distances of rows that are spread over processes.

Each stage of `ops.jaccard_graph` runs as it is, by the same kernels, on a part of the problem: some of this
process's rows, with what they need of others' fetched from where it is. Ids in a part are numbered anew in
their order, so that every sum has the order, and the bits, that it has where one process does all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from pyreid import _native
from pyreid.ops import jaccard as one
from pyreid.ops.jaccard import Neighbours
from pyreid.sharded._best import best_of
from pyreid.sharded._exchange import Exchange, Places, Route, starts_of

# Elements of rows that visit all processes together; two such panels are held. On CUDA each of them costs
# every query a second look at some hundred rows, so that they should be many.
_PANEL, _CUDA_PANEL = 2**25, 2**28
_FETCHED = 2**27  # elements of rows that are fetched together, for their weights
_ENTRIES = 2**26  # of lists, of sets and of their transpose, that are fetched together, about
_SLOTS = 64  # near rows, more than which few rows have


class ShardedGraph(NamedTuple):
    """This process's rows of a graph, compressed; columns are numbers of all rows, ascending."""

    indptr: torch.Tensor  # (n + 1,) int64, of the n rows that are here
    indices: torch.Tensor  # (entries,) int32
    distances: torch.Tensor  # (entries,) float32
    rows: range  # which of all rows are here
    shape: tuple[int, int]  # (N, N)
    max_distance: float | None = None


def knn(
    features: torch.Tensor, k: int, *, precision: str = "exact", group: Any = None
) -> Neighbours:
    """`ops.knn` of rows that are spread over processes, for those that are here.

    The rows of each process go to all others, panel by panel: at no time more than two panels of others' rows
    are here.

    Args:
        features: (n, D), this process's rows; n may differ between processes. Rows are numbered by rank.
        k, precision: of `ops.knn`.
        group: of torch.distributed; None: all processes. Each of them makes the call.

    Returns:
        Neighbours(scores, rows), both (n, k), rows by their number among all.
    """
    op = "sharded.knn"
    module, _ = _native.floor(features)
    module.knn_check(features, None, k, precision)
    exchange = Exchange(op, group)
    places = Places.of(exchange, features)
    one._squared_norms(op, "features", features)
    scores, rows, _ = _search(exchange, places, features, k, squared=False, precision=precision)
    return Neighbours(scores, rows)


def jaccard_graph(
    features: torch.Tensor,
    k1: int = 30,
    k2: int = 6,
    *,
    max_distance: float | None = None,
    variant: str = "spcl",
    group: Any = None,
) -> ShardedGraph:
    """`ops.jaccard_graph` of rows that are spread over processes: on each, the rows of the graph that are its
    own. Nothing here has the size of all rows; docs/many-gpus.md says what travels.

    Args:
        features: (n, D), this process's rows; n may differ between processes. Rows are numbered by rank.
        k1, k2, max_distance, variant: of `ops.jaccard_graph`; not "ca-jaccard".
        group: of torch.distributed; None: all processes. Each of them makes the call.
    """
    op = "sharded.jaccard_graph"
    rule = one._rule(op, variant)
    if variant == "ca-jaccard":
        raise ValueError(f"{op}: variant must be one without cameras, got {variant!r}")
    module, _ = _native.floor(features)
    columns = one._columns(rule, k1, k2)
    module.jaccard_check(op, features, k1, k2, max_distance, None, columns)
    exchange = Exchange(op, group)
    places = Places.of(exchange, features)
    if places.total >= 2**31:
        raise ValueError(f"{op}: features must have fewer than 2**31 rows, got {places.total}")
    norms = one._squared_norms(op, "features", features)
    scores, found, lowest = _search(exchange, places, features, columns, squared=rule.squared)
    high = norms - 2 * lowest if rule.column else None
    low = norms - 2 * scores[:, 0] if rule.column == "range" else None
    del scores
    lists = found.int()
    del found
    asked = min(k1 + rule.extra, columns)
    sets = _sets(exchange, places, lists[:, :asked], min(round(k1 / 2) + 1, asked))
    weights = _weights(exchange, places, features, sets, rule, (low, high))
    if k2 != 1:
        near = min(k2 if rule.extra else min(k2, k1), columns)
        weights = _means(exchange, places, lists[:, :near], weights, rule.half)
    transposed = _transpose(exchange, places, weights)
    indptr, indices, distances = _near(exchange, places, weights, transposed, max_distance, rule)
    most = None if max_distance is None else float(max_distance)
    shape = (places.total, places.total)
    return ShardedGraph(indptr, indices, distances, places.own, shape, most)


# --- neighbour lists ------------------------------------------------------------------------------


def _search(
    exchange: Exchange,
    places: Places,
    features: torch.Tensor,
    k: int,
    *,
    squared: bool,
    precision: str = "exact",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and rows (n, k) by dot(query, row), less half the squared norm of the row if `squared`, and the
    lowest of these (n,)."""
    size = len(features)
    scores = torch.full((size, k), -torch.inf, device=features.device)
    rows = torch.full((size, k), -1, device=features.device)
    lowest = torch.full((size,), torch.inf, device=features.device)
    for first, panel in _panels(exchange, places, features):
        bias = one._squared_norms(exchange.op, "features", panel) / 2 if squared else None
        best, near, least = one._search(panel, k, queries=features, bias=bias, precision=precision)
        if least is not None:
            lowest = torch.minimum(lowest, least)
        near += first * (near >= 0)
        # Panels come by ascending rows, so that of equal scores the lower row stands first.
        scores, rows = best_of(torch.cat([scores, best], 1), torch.cat([rows, near], 1), k)
    return scores, rows, lowest


def _panels(
    exchange: Exchange, places: Places, features: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of all processes, ascending. While one is worked on, the next is on its way."""
    dim = features.shape[1]
    size = max((_CUDA_PANEL if features.is_cuda else _PANEL) // max(dim, 1), 1)
    parts = [
        (rank, first, min(first + size, places.starts[rank + 1]))
        for rank in range(exchange.size)
        for first in range(places.starts[rank], places.starts[rank + 1], size)
    ]

    def begun(rank: int, first: int, last: int) -> tuple[torch.Tensor, Callable[[], object]]:
        own = slice(first - places.own.start, last - places.own.start)
        here = rank == exchange.rank
        rows = features[own] if here else features.new_empty((last - first, dim))
        return rows, exchange.spread("rows of features", rows, rank)

    coming = begun(*parts[0]) if parts else None
    for n, (_, first, _) in enumerate(parts):
        assert coming is not None
        rows, arrived = coming
        arrived()
        coming = begun(*parts[n + 1]) if n + 1 < len(parts) else None
        yield first, rows


# --- rows of weights: (starts, ids, values), ids those of all rows ------------------------------------


def _sets(exchange: Exchange, places: Places, lists: torch.Tensor, half: int) -> tuple:
    """Starts and ids of each row's reciprocal neighbours and the half-size sets that join them."""
    columns = lists.shape[1]
    reciprocal, halves = torch.empty_like(lists), torch.empty_like(lists[:, :half])
    height = max(_ENTRIES // max(columns * columns, 1), 1)
    first = places.own.start
    for some in exchange.together(_blocks(len(lists), height), lists):
        mine = lists[some or slice(0)]
        wanted = mine[mine >= 0].long().unique()
        route = Route(exchange, places, "neighbours", wanted)
        theirs = route.fetch("neighbour lists", lists)  # (W, columns)
        if some is None:
            continue
        own = torch.arange(some.start, some.stop, device=lists.device).int() + first
        of_each = _taken(theirs, _places_in(wanted, mine))  # (b, columns, columns)
        back = of_each == own[:, None, None]
        valid = mine >= 0
        reciprocal[some] = torch.where(valid & back.any(2), mine, -1)
        near = valid[:, :half] & back[:, :half, :half].any(2)
        halves[some] = torch.where(near, mine[:, :half], -1)

    starts, ids = [torch.zeros(1, dtype=torch.int64, device=lists.device)], [lists.new_empty(0)]
    for some in exchange.together(_blocks(len(lists), height), lists):
        mine = reciprocal[some or slice(0)]
        wanted = mine[mine >= 0].long().unique()
        route = Route(exchange, places, "neighbours", wanted)
        theirs = route.fetch("half-size sets", halves)
        if some is None:
            continue
        own = torch.arange(some.start, some.stop, device=lists.device) + first
        every = torch.cat([own, wanted, theirs[theirs >= 0].long()]).unique()
        part = torch.full((len(every), columns), -1, dtype=torch.int32, device=lists.device)
        part[_places_in(every, wanted), :half] = _renumbered(every, theirs)
        small = part[:, :half] >= 0
        at = int(torch.searchsorted(every, own[0]))
        rows = slice(at, at + len(own))
        # What is reciprocal in the first half of the list may not be so in the half-size set.
        small[rows] = halves[some] >= 0
        part[rows] = _renumbered(every, mine)
        masks = torch.cat([_bits(part >= 0), _bits(small)], 1)
        found = _expanded(exchange.op, part, (columns, columns, half), masks, at, len(own))
        starts.append(starts[-1][-1:] + found[0][1:])
        ids.append(every[found[1].long()].int())
    return torch.cat(starts), torch.cat(ids)


def _expanded(
    op: str, lists: torch.Tensor, rule: tuple, masks: torch.Tensor, first: int, count: int
) -> tuple:
    module, stream = _native.floor(lists)
    scratch = _native.scratch(lists)

    def write(sink: tuple) -> None:
        module.expand(op, lists, *rule, masks, first, sink, scratch, stream)

    return _two_passes(lists, count, write)


def _weights(
    exchange: Exchange,
    places: Places,
    features: torch.Tensor,
    sets: tuple,
    rule: Any,
    ends: tuple,
) -> tuple:
    """The sets with the softmax of the negative distances of their rows."""
    op = exchange.op
    module, stream = _native.floor(features)
    starts, ids = sets
    values = torch.empty(ids.shape, device=ids.device)
    first = places.own.start
    pieces = one._in_pieces(first, (starts, ids, values), _FETCHED // max(features.shape[1], 1))
    for piece in exchange.together(pieces, ids):
        top, numbers, some = piece or (first, starts[:0], (starts[:1], ids[:0], values[:0]))
        count = len(some[0]) - 1
        others = numbers[count:]
        route = Route(exchange, places, "members of sets", others)
        fetched = route.fetch("features of members", features)
        if piece is None:
            continue
        own = slice(top - first, top - first + count)
        rows = torch.cat([features[own], fetched])
        norms = one._squared_norms(op, "features", rows) if rule.squared else None
        low, high = (None if end is None else end[own] for end in ends)
        module.jaccard_weights(op, rows, norms, low, high, rule.half, some, 0, some[2], stream)
    return starts, ids, values


def _means(
    exchange: Exchange, places: Places, lists: torch.Tensor, weights: tuple, half: bool
) -> tuple:
    """The mean of the weights of each row's neighbours."""
    columns = lists.shape[1]
    module, stream = _native.floor(lists)
    of_row = len(weights[1]) // max(len(lists), 1) + 1
    height = max(_ENTRIES // max(columns * of_row, 1), 1)
    made = _Collected(lists)
    for some in exchange.together(_blocks(len(lists), height), lists):
        mine = lists[some or slice(0)]
        wanted = mine[mine >= 0].long().unique()
        route = Route(exchange, places, "neighbours", wanted)
        starts, ids, values = route.fetch_sparse("weights of neighbours", weights)
        if some is None:
            continue
        every = torch.cat([wanted, ids.long().unique()]).unique()
        counts = torch.zeros(len(every), dtype=torch.int64, device=lists.device)
        counts[_places_in(every, wanted)] = starts.diff()
        near = torch.full((max(len(every), len(mine)), columns), -1, dtype=torch.int32)
        near = near.to(lists.device)
        near[: len(mine)] = _renumbered(every, mine)
        part = (_padded(starts_of(counts), len(near)), _renumbered(every, ids), values)

        def write(sink: tuple, near: torch.Tensor = near, part: tuple = part) -> None:
            module.average(exchange.op, near, columns, part, half, 0, sink, stream)

        made.add(_two_passes(lists, len(mine), write), every)
    return made.rows()


def _transpose(exchange: Exchange, places: Places, weights: tuple) -> tuple:
    """The columns that are this process's, as rows."""
    starts, ids, values = weights
    keys, found = [starts.new_empty(0)], [values[:0]]
    rows = torch.repeat_interleave(
        torch.arange(len(starts) - 1, device=ids.device).int() + places.own.start, starts.diff()
    )
    for some in exchange.together(_blocks(len(ids), _ENTRIES), ids):
        part = some or slice(0)
        route = Route(exchange, places, "columns", ids[part].long())
        keys.append(route.asked << 32 | route.tell("rows of weights", rows[part]).long())
        found.append(route.tell("weights", values[part]))
    ordered, order = torch.cat(keys).sort()
    columns = ordered >> 32
    counts = torch.bincount(columns, minlength=len(places.own))
    return starts_of(counts), (ordered & 0x7FFFFFFF).int(), torch.cat(found)[order]


def _near(
    exchange: Exchange,
    places: Places,
    weights: tuple,
    transposed: tuple,
    max_distance: float | None,
    rule: Any,
) -> tuple:
    """The pairs of this process's rows that are near enough."""
    module, stream = _native.floor(weights[0])
    size = len(weights[0]) - 1
    of_row = len(weights[1]) // max(size, 1) + 1
    made = _Collected(weights[1])
    for some in exchange.together(_blocks(size, max(_ENTRIES // of_row**2, 1)), weights[1]):
        part = some or slice(0)
        starts = weights[0][part.start or 0 : part.stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        ids, values = weights[1][entries], weights[2][entries]
        wanted = ids.long().unique()
        route = Route(exchange, places, "columns", wanted)
        of_columns = route.fetch_sparse("columns of weights", transposed)
        if some is None:
            continue
        every = of_columns[1].long().unique()
        count = len(starts) - 1
        height = max(count, len(every), len(wanted))
        sides = (
            (_padded(starts - starts[0], height), _renumbered(wanted, ids), values),
            (_padded(of_columns[0], height), _renumbered(every, of_columns[1]), of_columns[2]),
        )

        def write(sink: tuple, sides: tuple = sides) -> None:
            module.jaccard_rows(
                exchange.op, *sides, max_distance, rule.clip, rule.half, 0, sink, stream
            )

        slots = 0 if max_distance is None else _SLOTS
        made.add(_two_passes(ids, count, write, slots), every)
    return made.rows()


class _Collected:
    """Rows of entries, block after block."""

    def __init__(self, like: torch.Tensor):
        self._counts = [like.new_empty(0, dtype=torch.int64)]
        self._ids = [like.new_empty(0, dtype=torch.int32)]
        self._values = [like.new_empty(0, dtype=torch.float32)]

    def add(self, rows: tuple, names: torch.Tensor) -> None:
        """`names`: what the rows' ids stand for."""
        starts, ids, values = rows
        self._counts.append(starts.diff())
        self._ids.append(names[ids.long()].int())
        self._values.append(values)

    def rows(self) -> tuple:
        return starts_of(torch.cat(self._counts)), torch.cat(self._ids), torch.cat(self._values)


def _two_passes(
    like: torch.Tensor, count: int, write: Callable[[tuple], None], slots: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(starts, ids, values) of `count` rows, which `write` first counts, then writes."""
    counts = _native.empty(like, (count,), "int32")
    kept = (
        _native.empty(like, (count, slots), "int32"),
        _native.empty(like, (count, slots), "float32"),
    )
    write((counts, None, None, None, *kept))
    starts = starts_of(counts.long())
    total = int(starts[-1])
    ids = _native.empty(like, (total,), "int32")
    values = _native.empty(like, (total,), "float32")
    write((None, starts, ids, values, *kept))
    return starts, ids, values


def _blocks(size: int, height: int) -> Iterator[slice]:
    for first in range(0, size, height):
        yield slice(first, min(first + height, size))


def _places_in(names: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Where ids stand among ascending names; of -1, 0."""
    return torch.searchsorted(names, ids.clamp(min=0).long())


def _renumbered(names: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Ids by their place among ascending names; -1 stays."""
    return torch.where(ids < 0, -1, _places_in(names, ids)).int()


def _taken(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if not len(table):  # nobody has a neighbour
        return table.new_full((*places.shape, table.shape[1]), -1)
    return table[places.clamp(max=len(table) - 1)]


def _padded(starts: torch.Tensor, rows: int) -> torch.Tensor:
    """Starts of as many rows, the last ones empty."""
    return torch.cat([starts, starts[-1:].expand(rows + 1 - len(starts))])


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """(R, C) flags as (R, words) int32: bit c % 32 of word c // 32."""
    words = -(-flags.shape[1] // 32)
    wide = torch.nn.functional.pad(flags.long(), (0, words * 32 - flags.shape[1]))
    shifted = wide.view(-1, words, 32) << torch.arange(32, device=flags.device)
    return shifted.sum(2).int()
