"""DBSCAN's labels of rows that are spread over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.sharded._exchange import Exchange, Places
from pyreid.sharded._graph import ShardedGraph, jaccard_graph


def dbscan(
    graph: ShardedGraph, eps: float | Sequence[float], min_samples: int = 4, *, group: Any = None
) -> torch.Tensor:
    """`ops.dbscan` of a graph whose rows are spread over processes: the labels of this process's rows.

    Args:
        graph: of `sharded.jaccard_graph`: symmetric.
        eps, min_samples: of `ops.dbscan`.
        group: of torch.distributed; None: all processes. Each of them makes the call.

    Returns:
        (n,) int64, or (E, n) for a sequence of eps; clusters are numbered as by one process.

    Each process holds some 20 bytes for each of all N rows: which are core samples, and clusters. In each of
    a few rounds the clusters, N int32, are reduced to their smallest over processes.
    """
    op = "sharded.dbscan"
    several = hasattr(eps, "__len__")
    levels: Any = eps if several else [eps]
    ops.dbscan(np.empty((0, 0), np.float32), levels, min_samples)  # what it refuses
    most = graph.max_distance
    for level in levels:
        if most is not None and most < 1 and np.float32(level) > np.float32(most):
            raise ValueError(
                f"{op}: eps must be at most {most}, the graph's max_distance, got {level}"
            )
    exchange = Exchange(op, group)
    places = Places.of(exchange, graph.indptr[1:])
    found = [_labels(exchange, places, graph, float(np.float32(e)), min_samples) for e in levels]
    return torch.stack(found) if several else found[0]


def _labels(
    exchange: Exchange, places: Places, graph: ShardedGraph, eps: float, min_samples: int
) -> torch.Tensor:
    size, first = len(places.own), places.own.start
    device = graph.indices.device
    row = torch.repeat_interleave(torch.arange(size, device=device), graph.indptr.diff())
    itself = torch.zeros(size, dtype=torch.bool, device=device)
    itself[row[graph.indices == row + first]] = True
    near = graph.distances <= eps
    row, column = row[near], graph.indices[near].long()
    core = torch.bincount(row, minlength=size) + ~itself >= min_samples
    every_core, _ = exchange.gather("core samples", core, _counts(places))

    joined = core[row] & every_core[column]
    clusters = _components(exchange, row[joined] + first, column[joined], places.total)

    every_row = torch.arange(places.total, dtype=torch.int32, device=device)
    number = (every_core & (clusters == every_row)).cumsum(0, dtype=torch.int32) - 1
    own = clusters[first : first + size]
    nobody = torch.iinfo(torch.int32).max
    labels = torch.where(core, number.index_select(0, own), nobody)
    reached = ~core[row] & every_core[column]
    of_core = number.index_select(0, clusters[column[reached]])
    labels.scatter_reduce_(0, row[reached], of_core, "amin")
    return torch.where(labels == nobody, -1, labels).long()


def _counts(places: Places) -> list[int]:
    return [last - first for first, last in zip(places.starts, places.starts[1:], strict=False)]


def _components(
    exchange: Exchange, left: torch.Tensor, right: torch.Tensor, size: int
) -> torch.Tensor:
    """(N,) int32: the smallest row that each is joined with, over the pairs of all processes.

    Every row names one that is no larger; what two joined rows name, and they themselves, come to name the
    smaller of the two. A name is followed to where it ends, so that chains of any length shrink by half and
    more at each round.
    """
    names = torch.arange(size, dtype=torch.int32, device=left.device)
    while True:
        of_left, of_right = names[left], names[right]
        smaller = torch.minimum(of_left, of_right)
        found = names.clone()
        for place in (of_left, of_right):
            found.scatter_reduce_(0, place.long(), smaller, "amin")
        exchange.reduce_("names of clusters", found, "MIN")
        while not torch.equal(further := found.index_select(0, found), found):
            found = further
        if torch.equal(found, names):
            return names
        names = found


def pseudo_labels(
    features: torch.Tensor,
    *,
    k1: int = 30,
    k2: int = 6,
    eps: float | Sequence[float] = 0.6,
    min_samples: int = 4,
    variant: str = "spcl",
    group: Any = None,
) -> torch.Tensor:
    """`ops.pseudo_labels` of rows that are spread over processes: the labels of this process's rows.

    Args:
        features: (n, D), this process's rows; n may differ between processes. Rows are numbered by rank.
        k1, k2, eps, min_samples, variant: of `ops.pseudo_labels`; not "ca-jaccard".
        group: of torch.distributed; None: all processes. Each of them makes the call.

    Returns:
        (n,) int64, or (E, n) for a sequence of eps, -1 where a row is in no cluster.
    """
    op = "sharded.pseudo_labels"
    levels: Any = eps if hasattr(eps, "__len__") else [eps]
    for level in levels:
        if not 0 < level <= 1:
            raise ValueError(f"{op}: eps must lie in (0, 1], got {level}")
    ops.dbscan(np.empty((0, 0), np.float32), levels, min_samples)
    near = jaccard_graph(features, k1, k2, max_distance=max(levels), variant=variant, group=group)
    return dbscan(near, eps, min_samples, group=group)
