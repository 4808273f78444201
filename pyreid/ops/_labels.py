"""Features to labels in one call: `jaccard_graph`, then `dbscan`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pyreid import _native
from pyreid.ops._shards import Shards
from pyreid.ops._work import Progress, Work
from pyreid.ops.dbscan import dbscan
from pyreid.ops.jaccard import graph, placed, rows_of


class LabelStats(NamedTuple):
    """Where the time of `pseudo_labels` went, and what came of it. For a sequence of eps, `clusters` and
    `noise` are tuples."""

    seconds: dict[str, float]  # of "neighbours", "jaccard" and "dbscan"
    pairs: int  # stored in the graph: (i, j), (j, i) and (i, i) count each
    clusters: Any
    noise: Any  # samples labelled -1


def pseudo_labels(
    features: Any,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    variant: str = "spcl",
    cameras: Any = None,
    intra_k: tuple[int, int] = (5, 2),
    inter_k: tuple[int, int] = (20, 4),
    device: Any = None,
    distributed: str | None = None,
    return_stats: bool = False,
    progress: Progress | None = None,
) -> Any:
    """DBSCAN's labels of rows by the Jaccard distance of their k-reciprocal neighbours.

    The same as `dbscan(jaccard_graph(features, k1, k2, max_distance=eps), eps, min_samples)`; memory is
    linear in N.

    Args:
        features, device, distributed: as for `jaccard_graph`: an array, or a list of shards in memory or in
            files; where the work is done; and by which processes.
        k1, k2, variant, cameras, intra_k, inter_k: as for `jaccard_graph`.
        eps: in (0, 1], or up to 64 of them, for which the graph is made once. Rows that share no neighbour
            are not near each other even at 1.
        min_samples: as for `dbscan`.
        return_stats: also return a LabelStats. On CUDA, the device is then waited for after each stage.
        progress: called as `progress(stage, done, total)`, as by `jaccard_graph`; a third stage is "dbscan".

    Returns:
        (N,) int64, or (E, N) for a sequence of eps, -1 where a row is in no cluster; or
        (labels, LabelStats). In the library and on the device of `features`, wherever the work is done, and
        on each process those of all rows. No gradient.
    """
    op = "pseudo_labels"
    several = hasattr(eps, "__len__")
    levels: Any = eps if several else [eps]
    for level in levels:
        if not 0 < level <= 1:
            raise ValueError(f"{op}: eps must lie in (0, 1], got {level}")
    # What dbscan would refuse, before the long work.
    dbscan(np.empty((0, 0), np.float32), levels, min_samples)

    started: list[tuple[str, float]] = []

    def begin(stage: str, after: Any) -> None:
        if return_stats and after is not None:
            _native.to_numpy(after[:1])  # waits for the device
        started.append((stage, time.perf_counter()))

    features, (cameras,) = placed(op, features, device, distributed, variant, cameras)
    divided = distributed is not None
    work = Work(rows_of(features), divided=divided, progress=progress, begun=begin)
    sets = (k1, k2, max(levels), variant, None, cameras, intra_k, inter_k)
    near = graph(features, *sets, work)
    work.begin("dbscan", near.distances)
    labels = dbscan(near, eps, min_samples)
    if isinstance(features, Shards):
        labels = features.returned(labels)
    if not return_stats:
        work.end()
        return labels
    rows = _native.to_numpy(labels).reshape(len(levels), -1)
    ends = [*(moment for _, moment in started[1:]), time.perf_counter()]
    work.end()
    seconds = {stage: end - moment for (stage, moment), end in zip(started, ends, strict=True)}
    clusters = tuple(int(row.max(initial=-1)) + 1 for row in rows)
    noise = tuple(int((row == -1).sum()) for row in rows)
    found = (clusters, noise) if several else (clusters[0], noise[0])
    return labels, LabelStats(seconds, near.indices.shape[0], *found)
