"""Features to labels in one call: `jaccard_graph`, then `dbscan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyreid import _native
from pyreid.ops.dbscan import dbscan
from pyreid.ops.jaccard import _graph


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
    return_stats: bool = False,
    progress: Callable[[str], object] | None = None,
) -> Any:
    """DBSCAN's labels of rows by the Jaccard distance of their k-reciprocal neighbours.

    The same as `dbscan(jaccard_graph(features, k1, k2, max_distance=eps), eps, min_samples)`; memory is
    linear in N.

    Args:
        features: (N, D) float32, float16 or bfloat16, of torch, CuPy or NumPy.
        k1, k2, variant, cameras, intra_k, inter_k: as for `jaccard_graph`.
        eps: in (0, 1], or up to 64 of them, for which the graph is made once. Rows that share no neighbour
            are not near each other even at 1.
        min_samples: as for `dbscan`.
        return_stats: also return a LabelStats. On CUDA, the device is then waited for after each stage.
        progress: called with the name of each stage ("neighbours", "jaccard", "dbscan") when it begins.

    Returns:
        (N,) int64, or (E, N) for a sequence of eps, -1 where a row is in no cluster; or
        (labels, LabelStats). No gradient.
    """
    several = hasattr(eps, "__len__")
    levels: Any = eps if several else [eps]
    for level in levels:
        if not 0 < level <= 1:
            raise ValueError(f"pseudo_labels: eps must lie in (0, 1], got {level}")
    # What dbscan would refuse, before the long work.
    dbscan(np.empty((0, 0), np.float32), levels, min_samples)

    started: list[tuple[str, float]] = []

    def begin(stage: str, after: Any = None) -> None:
        if return_stats and after is not None:
            _native.to_numpy(after[:1])  # waits for the device
        started.append((stage, time.perf_counter()))
        if progress is not None:
            progress(stage)

    begin("neighbours")
    sets = (k1, k2, max(levels), variant, None, cameras, intra_k, inter_k)
    graph = _graph(features, *sets, listed=lambda lists: begin("jaccard", lists))
    begin("dbscan", graph.distances)
    labels = dbscan(graph, eps, min_samples)
    if not return_stats:
        return labels
    rows = _native.to_numpy(labels).reshape(len(levels), -1)
    ends = [*(moment for _, moment in started[1:]), time.perf_counter()]
    seconds = {stage: end - moment for (stage, moment), end in zip(started, ends, strict=True)}
    clusters = tuple(int(row.max(initial=-1)) + 1 for row in rows)
    noise = tuple(int((row == -1).sum()) for row in rows)
    found = (clusters, noise) if several else (clusters[0], noise[0])
    return labels, LabelStats(seconds, graph.indices.shape[0], *found)
