"""Neighbours, and the Jaccard distance of their reciprocal sets, in memory linear in the number of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _panels, _shards, _torch, _work
from pyreid.ops._graph import Graph
from pyreid.ops._shards import Shards
from pyreid.ops._work import Work

_QUERIES = 1024  # rows whose products with a panel are held at a time
# As many more rows meet a panel while it is there, where panels come from elsewhere.
_AHEAD = 8
# From these sizes on, half-precision products and what follows them are taken for quicker on CUDA than
# float32 ones, at a tenth of their rate. Estimated: no device was at hand.
_FILTER_ROWS, _FILTER_COLUMNS, _FILTER_QUERIES = 4096, 256, 512
_SPARE = 96  # rows listed beyond the k best, for those that half precision cannot tell from them
_SLOTS = 64  # near rows, more than which few rows have
_FAR = 3e38  # a distance, for what is not there
_GATHERED = 2**24  # elements of rows that are fetched from elsewhere together, for their weights

# How much of a stage its parts are, roughly.
_OWN_CAMERA = 0.2
_SETS, _WEIGHTS, _MEANS, _DISTANCES = 0.15, 0.3, 0.2, 0.35


class Neighbours(NamedTuple):
    """What `knn` found, best first."""

    scores: Any  # (B, k) float32 dot products, -inf where there are fewer than k rows
    rows: Any  # (B, k) int64, -1 there


class _Variant(NamedTuple):
    """How a published implementation differs from the others."""

    extra: int  # columns of a neighbour list beyond k1 that reciprocity is asked of: the row itself
    squared: bool  # squared Euclidean distance of the rows as they are; else 2 - 2 dot
    column: str  # what a distance is divided by: "" nothing, "max", or "range" (after subtracting the min)
    clip: bool  # Jaccard distances below 0, which rounding makes, become 0
    half: bool  # weights and sums of minima are float16
    ops: tuple[str, ...] = ()  # of those that re-rank, which take it


_BOTH = ("rerank", "rerank_distances")
_VARIANTS = {
    "spcl": _Variant(0, False, "", True, False),
    "openunreid": _Variant(0, True, "", True, False, ("rerank",)),
    "zhong": _Variant(1, True, "max", False, False, _BOTH),
    "mmt": _Variant(1, True, "max", True, False, ("rerank_distances",)),
    "jvtc": _Variant(1, True, "range", True, True, _BOTH),
    "strong-baseline": _Variant(1, True, "max", False, True, _BOTH),
    "ca-jaccard": _Variant(1, False, "", True, False),
}
_SQUARES = ("zhong",)  # distances that it is given; the others are given squared ones


def knn(
    features: Array, k: int, *, queries: Array | None = None, precision: str = "exact"
) -> Neighbours:
    """The `k` rows of `features` with the largest dot product with each row of `queries`.

    Scores are used up in panels: no (B, N) array exists at any time.

    Args:
        features: (N, D) float32, float16 or bfloat16. On the CPU, a row whose norm is not finite is an error;
            on CUDA, a product that is NaN does not qualify.
        k: how many, up to 65536.
        queries: (B, D) likewise; None: the features themselves, and each row is among its neighbours. On the
            CPU each product is then computed once for both of its rows.
        precision: "exact": products in float32; where it pays, 16-bit ones first rule out what cannot be
            among the best, which changes no bit on the CPU. "fast": on CUDA, in the features' half
            precision or by torch's settings.

    Returns:
        Neighbours(scores, rows), both (B, k), largest score first, ties by the lower row. Where there are
        fewer than k rows, -inf and -1. No gradient.
    """
    return Neighbours(*_knn(features, k, queries, precision))


def _knn_forward(
    features: torch.Tensor, k: int, queries: torch.Tensor | None, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    module, _ = _native.floor(features)
    module.knn_check(features, queries, k, precision)
    _squared_norms("knn", "features", features)
    if queries is not None:
        _squared_norms("knn", "queries", queries)
    scores, rows, _ = _search(features, k, queries=queries, precision=precision)
    return scores, rows


def _knn_fake(features, k, queries, _):
    batch = (features if queries is None else queries).shape[0]
    scores = features.new_empty((batch, k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


_knn = _torch.register(_knn_forward, name="knn", fake=_knn_fake)


def jaccard_distance(
    features: Array,
    k1: int = 30,
    k2: int = 6,
    *,
    variant: str = "spcl",
    ranks: Array | None = None,
    cameras: Array | None = None,
    intra_k: tuple[int, int] = (5, 2),
    inter_k: tuple[int, int] = (20, 4),
) -> Array:
    """The distances of `jaccard_graph`, by the same arguments, as a dense (N, N) float32 array. Pairs that
    share nothing are at 1."""
    return _distance(features, k1, k2, variant, ranks, cameras, intra_k, inter_k)


def _distance_forward(
    features: torch.Tensor,
    k1: int,
    k2: int,
    variant: str,
    ranks: torch.Tensor | None,
    cameras: torch.Tensor | None,
    intra_k: Sequence[int],
    inter_k: Sequence[int],
) -> torch.Tensor:
    op, size = "jaccard_distance", features.shape[0]
    sets = (k1, k2, None, variant, ranks, cameras, intra_k, inter_k)
    rule, encoded = _checked(op, features, *sets, Work(size))
    module, stream = _native.floor(features)
    distances = _native.empty(features, (size, size), "float32")
    sides = (encoded.weights, encoded.transposed)
    module.jaccard_block(op, *sides, rule.clip, rule.half, 0, 0, distances, stream)
    return distances


def _distance_fake(features, *_):
    return features.new_empty((features.shape[0],) * 2, dtype=torch.float32)


_distance = _torch.register(_distance_forward, name="jaccard_distance", fake=_distance_fake)


def jaccard_graph(
    features: Array,
    k1: int = 30,
    k2: int = 6,
    *,
    max_distance: float | None = None,
    variant: str = "spcl",
    ranks: Array | None = None,
    cameras: Array | None = None,
    intra_k: tuple[int, int] = (5, 2),
    inter_k: tuple[int, int] = (20, 4),
    device: Any = None,
    distributed: str | None = None,
    progress: _work.Progress | None = None,
) -> Graph:
    """The Jaccard distance of k-reciprocal neighbour sets, for the pairs of rows that are near.

    Row i's set: its reciprocal neighbours R(i), those among the first k1 that have i among theirs; and, for
    each j of them, the set of half that size H(j), if more than two thirds of it lie in R(i). The set becomes
    a row of weights, softmax(-distance); rows are averaged over the first k2 neighbours; and the distance of
    two rows is 1 - t / (2 - t), t the sum of the smaller of the two weights over all columns.

    | variant | of | asked | distance for lists and weights | below 0 | arithmetic |
    |---|---|---|---|---|---|
    | spcl | SpCL, ICE, GCL, Cluster Contrast | k1 | 2 - 2 dot: rows are taken to be unit | 0 | float32 |
    | openunreid | OpenUnReID | k1 | squared Euclidean | 0 | float32 |
    | zhong | Zhong et al., fast-reid | k1 + 1 | squared Euclidean / column maximum | kept | float32 |
    | mmt | MMT | k1 + 1 | as zhong | 0 | float32 |
    | jvtc | JVTC | k1 + 1 | (squared - minimum) / (maximum - minimum) | 0 | float16 |
    | strong-baseline | reid-strong-baseline | k1 + 1 | as zhong | kept | float16 |
    | ca-jaccard | CA-Jaccard | below | 2 - 2 dot: rows are taken to be unit | 0 | float32 |

    Columns: "asked", how many neighbours R is made from, the row itself counted; H has round(k1 / 2) + 1,
    halves to even. "below 0": what rounding leaves there becomes 0, or is kept. "arithmetic": of weights and
    of their sums.

    "ca-jaccard": R(i) joins the reciprocal neighbours among the first `intra_k[0] + 1` of lists that put
    rows of the same camera first, and among the first `inter_k[0] + 1` of lists that put other cameras
    first. There are no half-size sets. Rows are averaged over the first `intra_k[1]` of the one list and
    `inter_k[1]` of the other. k1 and k2 are not used.

    Args:
        features: (N, D) float32, float16 or bfloat16; NumPy's may be a file that is mapped into memory
            (`np.load(path, mmap_mode="r")`). Or shards: a list of such arrays in host memory, torch's or
            NumPy's, that together are the rows; they are read panel by panel and never brought together. On
            the CPU, a row whose norm is not finite is an error.
        k1, k2: sizes of the neighbourhoods; k2 = 1: rows are not averaged. Where there are fewer rows, or a
            list holds fewer neighbours, what there is counts.
        max_distance: pairs at a larger distance are left out; None: pairs at distance 1 are.
        variant: see above.
        ranks: (N, at least the neighbours asked; at least k2 but for spcl and openunreid) int64 or int32:
            neighbour lists, best first, -1 where there is none, to be used in place of a search. On the CPU
            a row out of range is an error, on CUDA it counts as none (an error under `pyreid.debug()`, as are
            features that are not finite). Not for ca-jaccard.
        cameras: (N,) int64 or int32 ids, for ca-jaccard.
        intra_k, inter_k: for ca-jaccard.
        device: where the work is done, such as "cuda"; None: where the features are. Elsewhere, features stay
            where they are, as shards do, so that they may be larger than the device's memory: there, a few
            panels of them, and what is linear in N alone. Each row is read once for every 8192 rows, and
            again as a neighbour.
        distributed: "replicated": all processes of torch.distributed call this with the same features, each
            ranks its share of the rows, and all get the same result, bit for bit that of one process.
            "sharded": the same, but each process brings only its own rows (with their ranks or cameras),
            which are gathered first, in the order of ranks; so each must have memory for all. None: this
            process by itself. It is never guessed: a call that waits for others hangs where only rank 0
            makes it.
        progress: called as `progress(stage, done, total)` with rows of N: at the beginning and the end of the
            stages "neighbours" and "jaccard", and between where that takes long. On CUDA, of what the device
            has been asked to do.

    Returns:
        Graph(indptr, indices, distances, shape, max_distance), of the features' library; on a CUDA `device`,
        of torch. A row is stored among its own neighbours. It may be
        missing where more than k1 rows are equal: they all name the lower ones as their neighbours, a row
        that is in none of their lists has an empty set, and, unless its neighbours' weights fill it, an
        empty row: its distance is 1 to all rows, itself included.

    The result is the same, bit for bit, in every run and for every number of threads, and symmetric. Pairs
    whose true distance is `max_distance` itself may fall on either side: two rows that share four of their
    k2 = 6 neighbours and nothing else are at 0.5, say. MMT's prior of the distance to a source domain, off
    unless asked for there, is not built. On CUDA the call waits for the device three times, to learn how many
    ids the sets have, how many weights their means, and how many pairs are near: what can be said of these
    beforehand is 16 times, 3 times and N / 30 times as much as there is in the end. No gradient.
    """
    op = "jaccard_graph"
    features, (ranks, cameras) = placed(op, features, device, distributed, variant, ranks, cameras)
    work = Work(rows_of(features), divided=distributed is not None, progress=progress)
    near = graph(features, k1, k2, max_distance, variant, ranks, cameras, intra_k, inter_k, work)
    work.end()
    if isinstance(features, Shards) and features.device.type == "cpu":
        indptr, indices, distances = map(features.returned, near[:3])
        return Graph(indptr, indices, distances, near.shape, near.max_distance)
    return near


def graph(
    features: Any,
    k1: int,
    k2: int,
    max_distance: float | None,
    variant: str,
    ranks: Any,
    cameras: Any,
    intra_k: Sequence[int],
    inter_k: Sequence[int],
    work: Work,
) -> Graph:
    op = "jaccard_graph"
    sets = (k1, k2, max_distance, variant, ranks, cameras, intra_k, inter_k)
    rule, encoded = _checked(op, features, *sets, work)
    like = encoded.weights[0]
    module, stream = _native.floor(like)
    sides = (encoded.weights, encoded.transposed)

    def write(first, sink):
        module.jaccard_rows(op, *sides, max_distance, rule.clip, rule.half, first, sink, stream)

    slots = 0 if max_distance is None else _SLOTS
    parts = _two_passes(like, write, work, _DISTANCES, slots)
    most = None if max_distance is None else float(max_distance)
    return Graph(*parts, (work.size, work.size), most)


def rerank(
    queries: Array,
    gallery: Array | None = None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    variant: str = "zhong",
    progress: _work.Progress | None = None,
) -> Array:
    """(1 - lambda) Jaccard distance + lambda distance, of queries and gallery rows.

    Neighbours are sought among queries and gallery together. The distance is that of `variant` in
    `jaccard_graph`'s table, normalised as it says there.

    Args:
        queries: (Q, D) float32, float16 or bfloat16.
        gallery: (G, D), of the queries' dtype; None: the queries are ranked among themselves.
        k1, k2: as for `jaccard_graph`.
        lambda_value: weight of the distance itself, in [0, 1].
        variant: "openunreid", "zhong", "jvtc" or "strong-baseline".
        progress: called as `progress(stage, done, total)`, as by `jaccard_graph`; a third stage is
            "distances". Not under torch.compile.

    Returns:
        (Q, G) float32, or (Q, Q). Memory beyond it is linear in Q + G.
    """
    if progress is not None:
        return _reranked(queries, gallery, k1, k2, lambda_value, variant, progress)
    return _rerank(queries, gallery, k1, k2, lambda_value, variant)


def _rerank_forward(
    queries: torch.Tensor,
    gallery: torch.Tensor | None,
    k1: int,
    k2: int,
    lambda_value: float,
    variant: str,
) -> torch.Tensor:
    return _reranked(queries, gallery, k1, k2, lambda_value, variant, None)


def _reranked(
    queries: Any,
    gallery: Any,
    k1: int,
    k2: int,
    lambda_value: float,
    variant: str,
    progress: _work.Progress | None,
) -> Any:
    op = "rerank"
    rule = _rule(op, variant)
    module, stream = _native.floor(queries)
    among = queries if gallery is None else gallery
    module.rerank_check(queries, among, k1, k2, lambda_value)
    union = queries if gallery is None else _native.namespace(queries).concatenate([queries, among])
    work = Work(union.shape[0], progress=progress)
    weights, transposed, (norms, low, high) = _encode(op, union, k1, k2, rule, work)
    count, size = queries.shape[0], among.shape[0]
    column = union.shape[0] - size  # of the first that is ranked
    work.begin("distances", weights[0])
    work.part(1)
    mixed = _native.empty(queries, (count, size), "float32")
    sides = (weights, transposed, rule.clip, rule.half)
    for begin in range(0, count, _QUERIES):
        some = slice(begin, min(begin + _QUERIES, count))
        module.jaccard_block(op, *sides, begin, column, mixed[some], stream)
        mixed[some] *= 1 - lambda_value
        wide = _native.widened_half(union[some])
        for first, panel in _panels.panels(len(wide), among):
            near = _panels.product(wide, panel)
            near *= -2
            near += norms[some, None]
            near += norms[column + first : column + first + len(panel)]
            if low is not None:
                near -= low[some, None]
            if high is not None:
                span = high[some, None] - (0 if low is None else low[some, None])
                near /= span + (span <= 0)  # where all are at one distance: 0 / 1
            near *= lambda_value
            mixed[some, first : first + len(panel)] += near
        work.tell(some.stop / count)
    work.end()
    return mixed


def _rerank_fake(queries, gallery, *_):
    size = (queries if gallery is None else gallery).shape[0]
    return queries.new_empty((queries.shape[0], size), dtype=torch.float32)


_rerank = _torch.register(_rerank_forward, name="rerank", fake=_rerank_fake)


def rerank_distances(
    query_gallery: Array,
    query_query: Array | None = None,
    gallery_gallery: Array | None = None,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    variant: str = "zhong",
) -> Array:
    """`rerank` of distances that somebody has computed: (1 - lambda) Jaccard distance + lambda distance.

    Neighbours are sought among queries and gallery together; of equal distances, the lower row comes first,
    queries before the gallery. Weights are softmax(-distance), as in `jaccard_graph`. A distance is first

    | variant | of | made from what is given | below 0 | arithmetic |
    |---|---|---|---|---|
    | zhong | Zhong et al., torchreid, fast-reid, SpCL | its square / the column's maximum | kept | float32 |
    | mmt | MMT | itself / the column's maximum | 0 | float32 |
    | jvtc | JVTC | (itself - the column's minimum) / (maximum - minimum) | 0 | float16 |
    | strong-baseline | reid-strong-baseline | itself / the column's maximum | kept | float16 |

    so that all but "zhong" expect squared distances, as their sources have them; torchreid's
    engine and SpCL's evaluator give squared ones to zhong too, whose weights are then of fourth powers.
    Columns are those of all distances, [[query_query, query_gallery], [query_gallery.T, gallery_gallery]],
    and what is divided is transposed, as the sources do. MMT's own lambda weighs a prior that is not built
    here: 0 gives its distance.

    Args:
        query_gallery: (Q, G) float32, float16 or bfloat16; or, without the other two, (N, N): all rows are
            queries and gallery alike. On the CPU, a row whose norm is not finite is an error.
        query_query: (Q, Q). gallery_gallery: (G, G).
        k1, k2: as for `jaccard_graph`.
        lambda_value: weight of the distance itself, in [0, 1].

    Returns:
        (Q, G) float32, or (N, N). Memory beyond it: a panel of rows, and what is linear in Q + G. On CUDA the
        call waits for the device a few times. No gradient.
    """
    return _rerank_distances(
        query_gallery, query_query, gallery_gallery, k1, k2, lambda_value, variant
    )


def _rerank_distances_forward(
    query_gallery: torch.Tensor,
    query_query: torch.Tensor | None,
    gallery_gallery: torch.Tensor | None,
    k1: int,
    k2: int,
    lambda_value: float,
    variant: str,
) -> torch.Tensor:
    op = "rerank_distances"
    rule = _rule(op, variant)
    given = _Given(op, query_gallery, query_query, gallery_gallery, variant in _SQUARES)
    module, stream = _native.floor(query_gallery)
    module.jaccard_check(op, query_gallery, k1, k2, None, None, 0)
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"{op}: lambda_value must lie in [0, 1], got {lambda_value}")
    space = given.span(rule.column == "range")
    work = Work(given.size)
    lists = _as_int32(given.nearest(_columns(rule, k1, k2), space))

    def fill(first, sets):
        given.weigh(first, sets, space, rule.half)

    weights = _averaged(
        *(op, lists, k1, k2, rule, work),
        lambda reciprocity: _sets(op, lists, reciprocity, work, fill),
    )
    sides = (weights, _transpose(op, weights), rule.clip, rule.half)
    rows, columns = query_gallery.shape
    column = given.size - columns  # of the first that is ranked
    mixed = _native.empty(query_gallery, (rows, columns), "float32")
    for begin in range(0, rows, _QUERIES):
        some = slice(begin, min(begin + _QUERIES, rows))
        module.jaccard_block(op, *sides, begin, column, mixed[some], stream)
        mixed[some] *= 1 - lambda_value
        for first, near in given.tiles(some, space, column):
            near *= lambda_value
            mixed[some, first - column : first - column + near.shape[1]] += near
    return mixed


def _rerank_distances_fake(query_gallery, *_):
    return torch.empty_like(query_gallery, dtype=torch.float32)


_rerank_distances = _torch.register(
    _rerank_distances_forward, name="rerank_distances", fake=_rerank_distances_fake
)


class _Given:
    """Distances of N rows, those of the queries and then those of the gallery, that a caller has computed.
    They stay where they are: what is needed of them is fetched tile by tile, transposed and, for a variant
    that does so, squared."""

    def __init__(self, op: str, first: Any, queries: Any, gallery: Any, squared: bool):
        named = {"query_gallery": first, "query_query": queries, "gallery_gallery": gallery}
        if (queries is None) != (gallery is None):
            missing = "query_query" if queries is None else "gallery_gallery"
            raise ValueError(f"{op}: {missing} must be given as the other is, got None")
        for name, matrix in named.items():
            if matrix is not None:
                _squared_norms(op, name, matrix)
        rows, columns = first.shape
        if queries is None:
            named, shapes = {"query_gallery": first}, [(rows, rows)]
        else:
            shapes = [(rows, columns), (rows, rows), (columns, columns)]
        for (name, matrix), shape in zip(named.items(), shapes, strict=True):
            if tuple(matrix.shape) != shape:
                raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(matrix.shape)}")
        self.like, self.squared = first, squared
        self.bounds = (0, rows) if queries is None else (0, rows, rows + columns)
        self.size = self.bounds[-1]
        # blocks[a][b]: from the rows of part a to those of part b, which were b's to a's.
        self.blocks = [[first.T]] if queries is None else [[queries.T, first], [first.T, gallery.T]]

    def tile(self, rows: slice, columns: slice) -> Any:
        """Distances from some rows to others: a new float32 array."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        found = _native.empty(self.like, shape, "float32")
        for own, a, from_rows in self.parts(rows):
            for their, b, from_columns in self.parts(columns):
                found[own, their] = self.blocks[a][b][from_rows, from_columns]
        if self.squared:
            found *= found
        return found

    def parts(self, some: slice) -> Iterator[tuple[slice, int, slice]]:
        """(where in `some`, part, where in it) of those that `some` touches."""
        for part, (top, end) in enumerate(itertools.pairwise(self.bounds)):
            first, last = max(some.start, top), min(some.stop, end)
            if first < last:
                within = slice(first - some.start, last - some.start)
                yield within, part, slice(first - top, last - top)

    def tiles(self, rows: slice, space: Any, begin: int = 0) -> Iterator[tuple[int, Any]]:
        """(first column, distances as the variant makes them) from `rows` to all from `begin` on."""
        width = _panels.width(rows.stop - rows.start, self.like)
        for first in range(begin, self.size, width):
            near = self.tile(rows, slice(first, min(first + width, self.size)))
            if space is not None:
                low, span = (part[rows][:, None] for part in space)
                near -= low
                near /= span
            yield first, near

    def pieces(self) -> Iterator[slice]:
        for begin in range(0, self.size, _QUERIES):
            yield slice(begin, min(begin + _QUERIES, self.size))

    def span(self, from_lowest: bool) -> tuple[Any, Any]:
        """(N,) what is taken off a row's distances, and what they are divided by."""
        xp = _native.namespace(self.like)
        low, high = (_native.empty(self.like, (self.size,), "float32") for _ in range(2))
        for rows in self.pieces():
            for first, near in self.tiles(rows, None):
                least, most = xp.amin(near, 1), xp.amax(near, 1)
                low[rows] = least if first == 0 else xp.minimum(low[rows], least)
                high[rows] = most if first == 0 else xp.maximum(high[rows], most)
        if not from_lowest:
            low[:] = 0
        high -= low
        high += high <= 0  # where all are at one distance: 0 / 1
        return low, high

    def nearest(self, k: int, space: Any) -> Any:
        """(N, k) rows, nearest first, ties by the lower row."""
        module, stream = _native.floor(self.like)
        found = _native.empty(self.like, (self.size, k), "int64")
        for rows in self.pieces():
            count = rows.stop - rows.start
            state = (
                _native.empty(self.like, (count, k + max(k, 1024)), "int64"),
                _native.empty(self.like, (count,), "int64"),
                _native.empty(self.like, (count,), "int32"),
            )
            for first, near in self.tiles(rows, space):
                near *= -1
                rules = (None, None, None, None, None, 0.0)
                module.mine_panel(near, first, *rules, *state, k, stream)
            scores = _native.empty(self.like, (count, k), "float32")
            module.mine_finish(*state, k, 0, scores, found[rows], stream)
        return found

    def weigh(self, first: int, sets: tuple, space: Any, half: bool) -> None:
        """Writes the values of the sets of rows `first` on: softmax of the negative distances."""
        starts, ids, values = sets
        xp = _native.namespace(ids)
        for begin in range(0, len(starts) - 1, _QUERIES):
            bounds = starts[begin : begin + _QUERIES + 1]
            here = slice(int(bounds[0]), int(bounds[-1]))
            if here.start == here.stop:
                continue
            places = _native.from_numpy(ids, np.arange(here.start, here.stop))
            own = xp.searchsorted(bounds, places, side="right") - 1
            places -= bounds[own]
            rows = own + (first + begin)
            low, span = (part[rows] for part in space)
            near = (self.between(rows, xp.asarray(ids[here], dtype=xp.int64)) - low) / span
            line = _native.empty(values, (len(bounds) - 1, _widest(bounds)), "float32")
            line[...] = _FAR
            line[own, places] = near
            line = xp.exp(xp.amin(line, 1)[:, None] - line)
            line /= line.sum(1)[:, None]
            found = line[own, places]
            if half:
                found = xp.asarray(found, dtype=xp.float16)
            values[here] = xp.asarray(found, dtype=xp.float32)

    def between(self, rows: Any, columns: Any) -> Any:
        """Distances from rows (M,) to rows (M,): (M,) float32."""
        xp = _native.namespace(rows)
        found = _native.empty(rows, tuple(rows.shape), "float32")
        for a, top in enumerate(self.bounds[:-1]):
            for b, left in enumerate(self.bounds[:-1]):
                own, their = rows - top, columns - left
                block = self.blocks[a][b]
                inside = (own >= 0) & (own < block.shape[0]) & (their >= 0)
                some = xp.where(inside & (their < block.shape[1]))[0]
                found[some] = _native.widened_half(block[own[some], their[some]])
        return found * found if self.squared else found


def _widest(starts: Any) -> int:
    return int((starts[1:] - starts[:-1]).max())


class _Encoded(NamedTuple):
    weights: tuple
    transposed: tuple
    space: tuple  # norms, low and high of the distances


def _rule(op: str, variant: str) -> _Variant:
    names = [name for name, rule in _VARIANTS.items() if op in rule.ops or op not in _BOTH]
    if variant not in names:
        known = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
        raise ValueError(f"{op}: variant must be {known}, got {variant!r}")
    return _VARIANTS[variant]


def _checked(
    op: str,
    features: Any,
    k1: int,
    k2: int,
    max_distance: float | None,
    variant: str,
    ranks: Any,
    cameras: Any,
    intra_k: Sequence[int],
    inter_k: Sequence[int],
    work: Work,
) -> tuple[_Variant, _Encoded]:
    rule = _rule(op, variant)
    module, _ = _native.floor(_shards.like(features))
    shape = _shape(features)
    module.jaccard_check(op, shape, k1, k2, max_distance, ranks, _columns(rule, k1, k2))
    if ranks is not None:
        _native.check_range(op, "ranks", ranks, -1, features.shape[0], closed=False)
    by_camera = variant == "ca-jaccard"
    if by_camera != (cameras is not None):
        must, got = ("be given", "None") if by_camera else ("be None", "an array")
        raise ValueError(f"{op}: cameras must {must} for variant {variant!r}, got {got}")
    if not by_camera:
        return rule, _encode(op, features, k1, k2, rule, work, ranks)
    if ranks is not None:
        raise ValueError(f"{op}: ranks must be None for variant {variant!r}, got an array")
    return rule, _encode_cameras(op, features, cameras, intra_k, inter_k, work)


def rows_of(features: Any) -> int:
    """N, or 0 of what is no array, which the checks tell of."""
    return (*getattr(features, "shape", ()), 0)[0]


def _shape(features: Any) -> Any:
    """What the native checks look at: of shards, an array of as many rows that holds nothing."""
    if isinstance(features, Shards):
        return features.like.new_empty((features.shape[0], 0))
    return features


def placed(
    op: str, features: Any, device: Any, distributed: str | None, variant: str, *beside: Any
) -> tuple[Any, list[Any]]:
    """Features, and what lies beside them, as the stages take them: gathered from all processes, or as
    shards that are fetched panel by panel."""
    if distributed not in (None, "replicated", "sharded"):
        raise ValueError(
            f"{op}: distributed must be None, 'replicated' or 'sharded', got {distributed!r}"
        )
    apart = isinstance(features, (list, tuple))
    if device is not None and not apart:
        here = torch.device("cuda" if _native.on_cuda(features) else "cpu")
        here = features.device if _native.is_torch(features) else here
        wanted = torch.device(device)
        apart = wanted.type != here.type or wanted.index not in (None, here.index)
    if distributed == "sharded":
        if apart:
            raise ValueError(
                f"{op}: features must be one array on its device where distributed is 'sharded'"
            )
        features = _work.gathered(features)
        beside = tuple(None if array is None else _work.gathered(array) for array in beside)
    if isinstance(features, np.memmap) and variant == "ca-jaccard":
        apart = True  # rows of a camera would be brought together in memory
    if not apart:
        return features, list(beside)
    arrays = features if isinstance(features, (list, tuple)) else [features]
    rows = Shards(op, arrays, "cpu" if device is None else device)
    return rows, [rows.beside(array) for array in beside]


# --- neighbour lists ------------------------------------------------------------------------------


def _search(
    features: Any,
    k: int,
    *,
    queries: Any = None,
    bias: Any = None,
    groups: Any = None,
    precision: str = "exact",
    work: Work | None = None,
) -> tuple[Any, Any, Any]:
    """Scores and rows (B, k) by dot(query, row) - bias[row], and the lowest of these (B,) if there is a bias.

    `groups`: (N,) ids; rows of a query's own group are left out, which takes queries=None. `work` may divide
    the queries, if they are the rows themselves.
    """
    like = _shards.like(features)
    module, stream = _native.floor(like)
    work = work or Work(features.shape[0])
    itself = queries is None
    queries = features if itself else queries
    symmetric = itself and groups is None and module.has_knn and not work.divided
    mine = work.share(queries.shape[0], _QUERIES) if itself else range(queries.shape[0])
    batch = len(mine)
    scores = _native.empty(like, (batch, k), "float32")
    rows = _native.empty(like, (batch, k), "int64")
    lowest: Any = None if bias is None else _native.empty(like, (batch,), "float32")
    if symmetric and not isinstance(features, Shards):
        # Products left of the diagonal are done with those of earlier rows.
        told = (lambda met: work.tell(1 - (1 - met / batch) ** 2)) if work.listened else None
        module.knn(features, bias, k, scores, rows, lowest, told, stream)
        return scores, rows, lowest
    plain = bias is None and groups is None and not isinstance(features, Shards)
    if plain and precision == "exact" and _filter_pays(module, features, queries.shape[0], k):
        _search_by_halves(features, queries, mine, k, scores, rows, work)
        return work.gather(scores), work.gather(rows), lowest
    xp = _native.namespace(like)
    # The tiles are the same for all processes and wherever the features are, and so are bits, whatever the
    # library's product is like.
    tall = min(_QUERIES, queries.shape[0])
    held = tall * _AHEAD if isinstance(features, Shards) else tall
    for begin in range(mine.start, mine.stop, max(held, 1)):
        end = min(begin + held, mine.stop)
        wide = _native.widened_half(_block(queries, begin, end))
        state = (
            _native.empty(like, (len(wide), k + max(k, 1024)), "int64"),
            _native.empty(like, (len(wide),), "int64"),
            _native.empty(like, (len(wide),), "int32"),
        )
        for first, panel in _panels.panels(tall, features):
            for top in range(begin, end, tall):
                some = slice(top - begin, min(top + tall, end) - begin)
                own = slice(top, min(top + tall, end))
                to = slice(own.start - mine.start, own.stop - mine.start)
                products = _panels.product(wide[some], panel, precision=precision, alike=True)
                if bias is not None:
                    products -= bias[first : first + len(panel)]
                    least = xp.amin(products, 1)
                    lowest[to] = least if first == 0 else xp.minimum(least, lowest[to])
                rules = (None, None if groups is None else groups[own], groups, None, None, 0.0)
                module.mine_panel(
                    products, first, *rules, *(part[some] for part in state), k, stream
                )
            met = (first + len(panel)) / max(features.shape[0], 1)
            work.tell((begin - mine.start + (end - begin) * met) / batch)
        to = slice(begin - mine.start, end - mine.start)
        module.mine_finish(*state, k, 0, scores[to], rows[to], stream)
        del wide, state  # before there are others
    return work.gather(scores), work.gather(rows), None if bias is None else work.gather(lowest)


def _filter_pays(module: Any, features: Any, batch: int, k: int) -> bool:
    size, dim = features.shape
    return (
        module.has_half_filter
        and size >= max(_FILTER_ROWS, 32 * k)
        and dim >= _FILTER_COLUMNS
        and batch >= _FILTER_QUERIES
        and k <= 1024  # lists are sorted in shared memory
        and _panels.has_half_product(features)
    )


def _search_by_halves(
    features: Any, queries: Any, mine: range, k: int, scores: Any, rows: Any, work: Work
) -> Any:
    """`_search` for the queries `mine` by float16 products, exact all the same: csrc/cuda/knn_filter.cu.
    Waits for nothing.

    Returns (B,) int32: 1 where the filter could not tell, and the query was compared with all rows.
    """
    module, stream = _native.floor(features)
    xp = _native.namespace(features)
    half = _half_rows(features)
    half_queries = half if queries is features else _half_rows(queries)
    most = tuple(xp.amax(bound.reshape(1, -1), 1) for bound in half[1:])
    batch, listed = len(mine), k + max(k, _SPARE)
    failed = _native.empty(features, (batch,), "int32")
    for begin in range(0, batch, _QUERIES):
        to = slice(begin, min(begin + _QUERIES, batch))
        own = slice(mine.start + to.start, mine.start + to.stop)
        values, lengths, rests = (part[own] for part in half_queries)
        state = (
            _native.empty(features, (len(values), listed + max(listed, 1024)), "int64"),
            _native.empty(features, (len(values),), "int64"),
            _native.empty(features, (len(values),), "int32"),
        )
        for first, panel in _panels.panels(len(values), half[0]):
            products = _panels.half_product(values, panel)
            module.mine_panel(
                products, first, None, None, None, None, None, 0.0, *state, listed, stream
            )
        found = (
            _native.empty(features, (len(values), listed), "float32"),
            _native.empty(features, (len(values), listed), "int64"),
        )
        module.mine_finish(*state, listed, 0, *found, stream)
        wide = _native.widened_half(queries[own])
        bounds = (lengths, rests, *most)
        best = (scores[to], rows[to], failed[to])
        module.refine(wide, features, found, bounds, *best, state, stream)
        work.tell(to.stop / batch)
    return failed


def _half_rows(features: Any) -> tuple[Any, Any, Any]:
    """Rows times a power of two as float16, their lengths, and those of what rounding takes away."""
    module, stream = _native.floor(features)
    size, dim = features.shape
    largest = _native.namespace(features).amax(
        _squared_norms("knn", "features", features).reshape(1, -1), 1
    )
    half = (
        _native.empty(features, (size, dim), "float16"),
        _native.empty(features, (size,), "float32"),
        _native.empty(features, (size,), "float32"),
    )
    module.half_rows(features, largest, half, stream)
    return half


def _block(features: Any, first: int, last: int) -> Any:
    if isinstance(features, Shards):
        return features.take(range(first, last))
    return features[first:last]


def _camera_lists(features: Any, cameras: Any, k: int, work: Work) -> tuple[Any, Any]:
    """(N, k) lists that put rows of the same camera first, and lists that put the others first."""
    like = _shards.like(features)
    xp = _native.namespace(like)
    same = _native.empty(like, (features.shape[0], k), "int64")
    names, groups = xp.unique(cameras, return_inverse=True)
    for group in range(len(names)):
        members = xp.where(groups == group)[0]
        apart = isinstance(features, Shards)
        among = features.selected(members) if apart else features[members]
        work.part(_OWN_CAMERA / len(names))
        found = _search(among, k, work=work)[1]
        same[members] = xp.where(found >= 0, members[found], -1)
    work.part(1 - _OWN_CAMERA)
    others = _search(features, k, groups=groups, work=work)[1]
    return _appended(same, others), _appended(others, same)


def _appended(lists: Any, more: Any) -> Any:
    """(N, k) lists, the -1 at their ends replaced by the first of `more`."""
    missing = lists < 0
    places = (missing.cumsum(1) - 1) * missing
    if _native.is_torch(lists):
        return torch.where(missing, more.gather(1, places), lists)
    xp = _native.namespace(lists)
    return xp.where(missing, xp.take_along_axis(more, places, 1), lists)


def _squared_norms(op: str, name: str, features: Any) -> Any:
    like = _shards.like(features)
    module, stream = _native.floor(like)
    norms = _native.empty(like, (features.shape[0],), "float32")
    if isinstance(features, Shards):
        for first, panel in _panels.panels(_QUERIES, features):
            some = norms[first : first + len(panel)]
            module.squared_norms(op, name, panel, first, some, stream)
    else:
        module.squared_norms(op, name, features, 0, norms, stream)
    _native.check_norms(op, name, norms)
    return norms


def _as_int32(array: Any) -> Any:
    result = _native.empty(array, tuple(array.shape), "int32")
    result[:] = array
    return result


# --- rows of weights: (starts, ids, values) -------------------------------------------------------


def _encode(
    op: str, features: Any, k1: int, k2: int, rule: _Variant, work: Work, ranks: Any = None
) -> _Encoded:
    """By all variants but the one with cameras."""
    work.begin("neighbours")
    norms = _squared_norms(op, "features", features)
    work.check_alike(op, "features", norms)
    low, high = None, None
    if ranks is None or rule.column:
        bias = norms / 2 if rule.squared else None
        work.part(1)
        scores, found, lowest = _search(features, _columns(rule, k1, k2), bias=bias, work=work)
        if rule.column:  # a squared distance is norm - 2 (dot - bias)
            high = norms - 2 * lowest
            low = norms - 2 * scores[:, 0] if rule.column == "range" else None
        ranks = found if ranks is None else ranks
    space = (norms if rule.squared else None, low, high)
    lists = _as_int32(ranks)
    work.begin("jaccard", lists)
    weights = _averaged(
        *(op, lists, k1, k2, rule, work),
        lambda reciprocity: _weights(op, features, lists, reciprocity, space, rule.half, work),
    )
    return _Encoded(weights, _transpose(op, weights), space)


def _averaged(
    op: str,
    lists: Any,
    k1: int,
    k2: int,
    rule: _Variant,
    work: Work,
    weigh: Callable[[tuple], tuple],
) -> tuple:
    """The rows of weights that `weigh(reciprocity)` makes, each the mean over its first k2 neighbours."""
    columns = min(k1 + rule.extra, lists.shape[1])
    weights = weigh((columns, columns, min(round(k1 / 2) + 1, columns)))
    if k2 == 1:
        return weights
    near = k2 if rule.extra else min(k2, k1)
    return _average(op, lists, min(near, lists.shape[1]), weights, rule.half, work)


def _encode_cameras(
    op: str,
    features: Any,
    cameras: Any,
    intra_k: Sequence[int],
    inter_k: Sequence[int],
    work: Work,
) -> _Encoded:
    module, _ = _native.floor(_shards.like(features))
    module.cameras_check(op, _shape(features), cameras, *intra_k, *inter_k)
    work.begin("neighbours")
    work.check_alike(op, "features", _squared_norms(op, "features", features))
    xp = _native.namespace(_shards.like(features))
    sizes = intra_k[0] + 1, inter_k[0] + 1
    longest = max(*sizes, intra_k[1], inter_k[1])
    intra, inter = _camera_lists(features, cameras, longest, work)
    work.begin("jaccard", inter)

    def joined(first, second):
        return _as_int32(xp.concatenate([intra[:, :first], inter[:, :second]], 1))

    space = (None, None, None)
    reciprocity = (sum(sizes), sizes[0], 0)
    weights = _weights(op, features, joined(*sizes), reciprocity, space, False, work)
    near = joined(intra_k[1], inter_k[1])
    weights = _average(op, near, intra_k[1] + inter_k[1], weights, False, work)
    return _Encoded(weights, _transpose(op, weights), space)


def _columns(rule: _Variant, k1: int, k2: int) -> int:
    """Neighbours that a list must hold."""
    return max(k1 + 1, k2) if rule.extra else k1


def _weights(
    op: str,
    features: Any,
    lists: Any,
    reciprocity: tuple,
    space: tuple,
    half: bool,
    work: Work,
) -> tuple:
    module, stream = _native.floor(lists)

    def weigh(rows, first, norms, own, sets):
        low, high = (None if x is None else x[own] for x in space[1:])
        module.jaccard_weights(op, rows, norms, low, high, half, sets, first, sets[2], stream)

    def fill(first, sets):
        own = slice(first, first + len(sets[0]) - 1)
        if not isinstance(features, Shards):
            return weigh(features, first, space[0], own, sets)
        for top, numbers, some in _in_pieces(first, sets, _GATHERED // max(features.shape[1], 1)):
            norms = None if space[0] is None else space[0][numbers]
            own = slice(top, top + len(some[0]) - 1)
            weigh(features.take(_native.to_numpy(numbers)), 0, norms, own, some)

    return _sets(op, lists, reciprocity, work, fill)


def _sets(op: str, lists: Any, reciprocity: tuple, work: Work, fill: Any) -> tuple:
    """The sets of all rows, whose values `fill` writes."""
    module, stream = _native.floor(lists)
    words = module.mask_words(reciprocity[0], reciprocity[2])
    masks = _native.empty(lists, (lists.shape[0], words), "int32")
    module.reciprocal(op, lists, *reciprocity, masks, stream)
    scratch = _native.scratch(lists)

    def write(first, sink):
        module.expand(op, lists, *reciprocity, masks, first, sink, scratch, stream)

    return _two_passes(lists, write, work, _SETS, fill=fill)


def _in_pieces(first: int, sets: tuple, most: int) -> Iterator[tuple[int, torch.Tensor, tuple]]:
    """(first row, numbers, sets) of pieces of the sets of rows `first` on. `numbers`: of all rows that a
    piece needs, its own at the front; at most `most` where that can be. The piece's sets have places among
    these numbers for ids, and their values are a part of those given."""
    starts, ids, values = sets
    bounds = starts.tolist()
    needed = np.array(bounds) + np.arange(len(bounds))
    top = 0
    while top < len(bounds) - 1:
        end = max(int(np.searchsorted(needed, needed[top] + most, "right")) - 1, top + 1)
        entries = slice(bounds[top], bounds[end])
        own = torch.arange(first + top, first + end, device=ids.device)
        column = ids[entries]
        outside = (column < first + top) | (column >= first + end)
        others = column[outside].unique()
        places = torch.where(
            outside, len(own) + torch.searchsorted(others, column), column - (first + top)
        )
        piece = (starts[top : end + 1] - bounds[top], places.int(), values[entries])
        yield first + top, torch.cat([own, others]), piece
        top = end


def _average(op: str, lists: Any, columns: int, weights: tuple, half: bool, work: Work) -> tuple:
    module, stream = _native.floor(lists)

    def write(first, sink):
        module.average(op, lists, columns, weights, half, first, sink, stream)

    return _two_passes(lists, write, work, _MEANS)


def _transpose(op: str, weights: tuple) -> tuple:
    starts, ids, values = weights
    module, stream = _native.floor(starts)
    transposed = (
        _native.empty(starts, tuple(starts.shape), "int64"),
        _native.empty(starts, tuple(ids.shape), "int32"),
        _native.empty(starts, tuple(values.shape), "float32"),
    )
    module.transpose(op, weights, len(ids), transposed, _native.scratch(starts), stream)
    return transposed


def _two_passes(
    like: Any, write: Any, work: Work, weight: float, slots: int = 0, fill: Any = None
) -> tuple[Any, Any, Any]:
    """(starts, ids, values) of all rows, which `write(first row, sink)` first counts, then writes, block by
    block; their total is waited for. Up to `slots` entries of each row are kept from one call to the next.
    `fill(first row, block)` makes the values where `write` writes none."""
    mine = work.share(work.size)
    counts = _native.empty(like, (len(mine),), "int32")
    kept = (
        _native.empty(like, (len(mine), slots), "int32"),
        _native.empty(like, (len(mine), slots), "float32"),
    )
    for first, some in work.blocks(mine, weight / 2):
        write(first, (counts[some], None, None, None, *(part[some] for part in kept)))
    starts = _starts_of(counts)
    total = int(starts[-1])
    ids = _native.empty(like, (total,), "int32")
    values = _native.empty(like, (total,), "float32")
    for first, some in work.blocks(mine, weight / 2):
        of_block = starts[some.start : some.stop + 1]
        write(first, (None, of_block, ids, values, *(part[some] for part in kept)))
    if fill is not None:
        for first, some in work.blocks(mine, _WEIGHTS):
            fill(first, (starts[some.start : some.stop + 1], ids, values))
    if work.divided:
        starts = _starts_of(work.gather(counts))
        ids, values = work.gather(ids), work.gather(values)
    return starts, ids, values


def _starts_of(counts: Any) -> Any:
    starts = _native.empty(counts, (counts.shape[0] + 1,), "int64")
    starts[:1] = 0
    starts[1:] = counts.cumsum(0)
    return starts
