"""How well queries find the gallery images of their own identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _panels

# Scores held at a time, and the fewest queries that are worth reading a gallery for.
_CPU_SCORES, _CUDA_SCORES = 2**22, 2**26
_FEWEST = 32


class Ranking(NamedTuple):
    """What `evaluate_ranking` found. Means are over the queries that have a match."""

    cmc: Any  # (max_rank,) float32: [r - 1] is the share of queries with a match among the first r
    mAP: float
    mINP: float
    ap: Any  # (Q,) float32, 0 where `valid` is False
    valid: Any  # (Q,) bool: whether the query has a match


def evaluate_ranking(
    queries: Array | None,
    gallery: Array | None,
    *,
    query_ids: Array,
    gallery_ids: Array,
    query_cameras: Array,
    gallery_cameras: Array,
    distance: Array | None = None,
    max_rank: int = 50,
) -> Ranking:
    """CMC, mAP and mINP by the single-query protocol of Market-1501, DukeMTMC-reID, MSMT17 and MARS.

    For each query the gallery is ranked by dot product, largest first: for unit rows, that is the order of
    Euclidean distance. Equal scores are ordered by gallery row, lower first; NaN counts as -inf. Gallery rows
    with both the id and the camera of the query are left out, as are those with a negative id (junk is -1).
    What remains of the query's id are its matches; a query without one, or with a negative id, counts
    nowhere.

    AP is the mean over matches of (matches up to this one) / (position of this one): scikit-learn's
    `average_precision_score`, except where a match ties with another row; that one gives all rows of
    equal score the precision after the last of them. INP is (number of matches) / (position of the last).

    Queries are taken some at a time: no (Q, G) array exists unless `distance` is one, and nothing is sorted.

    Args:
        queries: (Q, D) float32, float16 or bfloat16; products are taken in float32. Not looked at, and may
            be None, where `distance` is given.
        gallery: (G, D), likewise.
        query_ids, gallery_ids: (Q,) and (G,) ids of persons.
        query_cameras, gallery_cameras: (Q,) and (G,) ids.
        distance: (Q, G) float32, smallest first: re-ranked, or of the user's own making. It is not copied.
        max_rank: the length of `cmc`; it may exceed G.

    Returns:
        Ranking(cmc, mAP, mINP, ap, valid): arrays as the inputs are; mAP and mINP are numbers, for which the
        device is waited for, once. Where no query has a match, `cmc`, `mAP` and `mINP` are NaN.
        Nothing here is differentiable, or made for torch.compile.
    """
    ids = (query_ids, gallery_ids, query_cameras, gallery_cameras)
    return summary(*matches(queries, gallery, ids, distance, max_rank), max_rank)


def matches(
    queries: Array | None, gallery: Array | None, ids: Any, distance: Array | None, max_rank: int
) -> tuple[Any, Any, Any]:
    """Of each query: the position of its first match, from 1 on, or 0; its AP; its INP. (Q,) each.

    `ids`: query_ids, gallery_ids, query_cameras, gallery_cameras; all arguments are `evaluate_ranking`'s."""
    source: Any = queries if distance is None else distance  # a row per query
    module, stream = _native.floor(source)
    module.rank_check(queries, gallery, distance, *ids, max_rank)
    count, size = ids[0].shape[0], ids[1].shape[0]
    first = _native.empty(source, (count,), "int64")
    ap, inp = (_native.empty(source, (count,), "float32") for _ in range(2))
    for some in _blocks(count, size, source) if distance is None else [slice(None)]:
        module.rank_matches(  # scores without a name: gone before the next ones are there
            source[some] if distance is not None else _products(source[some], gallery),
            distance is not None,
            ids[0][some],
            ids[1],
            ids[2][some],
            ids[3],
            first[some],
            ap[some],
            inp[some],
            stream,
        )
    return first, ap, inp


def _blocks(count: int, size: int, like: Any) -> Iterator[slice]:
    """Consecutive queries in runs of equal length, so that the last product is not a thin one."""
    scores = _CUDA_SCORES if _native.on_cuda(like) else _CPU_SCORES
    most = max(scores // max(size, 1), _FEWEST)
    runs = -(-count // most)
    for run in range(runs):
        yield slice(count * run // runs, count * (run + 1) // runs)


def _products(queries: Any, gallery: Any) -> Any:
    """(B, G) float32, the gallery in pieces only where it must be widened: a piece at a time."""
    queries = _native.widened_half(queries)
    pieces = _panels.panels(1, gallery)
    first, piece = next(pieces)
    if len(piece) == len(gallery):
        return _panels.product(queries, piece)
    scores = _native.empty(gallery, (len(queries), len(gallery)), "float32")
    scores[:, : len(piece)] = _panels.product(queries, piece)
    for first, piece in pieces:
        scores[:, first : first + len(piece)] = _panels.product(queries, piece)
    return scores


def summary(first: Any, ap: Any, inp: Any, max_rank: int) -> Ranking:
    """Of what `matches` found."""
    firsts = _native.to_numpy(first)
    found = firsts > 0
    if not found.any():
        cmc = np.full(max_rank, np.nan, np.float32)
        return Ranking(_native.from_numpy(ap, cmc), float("nan"), float("nan"), ap, first > 0)
    hits = np.bincount(np.minimum(firsts[found], max_rank + 1), minlength=max_rank + 2)
    cmc = (hits[1:-1].cumsum() / found.sum()).astype(np.float32)
    mean_ap, mean_inp = (
        float(_native.to_numpy(values)[found].mean(dtype=np.float64)) for values in (ap, inp)
    )
    return Ranking(_native.from_numpy(ap, cmc), mean_ap, mean_inp, ap, first > 0)
