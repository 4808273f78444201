"""Clusters from distances: DBSCAN, how two clusterings overlap, and a rule for eps."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _torch


def dbscan(graph_or_distance: Any, eps: float | Sequence[float], min_samples: int = 4) -> Any:
    """The labels of `sklearn.cluster.DBSCAN(eps, min_samples=min_samples, metric="precomputed")`, number for
    number.

    Args:
        graph_or_distance: a graph (`jaccard_graph`'s; a CSR matrix of SciPy or CuPy), of which a pair that
            is not stored is farther apart than any eps, stored zeros count, and everybody is at distance 0
            from himself unless the diagonal is stored; no pair may be stored twice. Or (N, N) distances,
            the diagonal taken as it is. Row i holds the neighbours of i: where distances are not symmetric,
            labels are scikit-learn's still, but on CUDA they take longer.
        eps: how far apart neighbours may be, inclusively; finite and at least 0. Or up to 64 of them. At most
            the `max_distance` that a graph was cut at, where that is below 1 and the graph says so.
        min_samples: how many neighbours make a core sample, itself included.

    Returns:
        (N,) int64 in the library of the distances, or (E, N) for a sequence of eps. Clusters are numbered in
        the order of their smallest core sample; a sample that two clusters reach belongs to the first; -1: to
        none.

    float32 distances are compared with eps rounded to float32, float64 ones (which take longer) with eps as
    it is; both as scikit-learn does it. A NaN is near nobody. An entry outside the graph is a ValueError on
    the CPU; on CUDA it is left out (an error under `pyreid.debug()`).
    """
    distances, indptr, indices = _parts("dbscan", graph_or_distance)
    several = hasattr(eps, "__len__")
    levels: Any = eps if several else [eps]
    levels = [float(level) for level in levels]
    cut = _cut(graph_or_distance)
    for level in levels:
        if cut is not None and np.float32(level) > np.float32(cut):
            raise ValueError(
                f"dbscan: eps must be at most {cut}, the graph's max_distance, got {level}"
            )
    if distances.dtype in (torch.float64, np.dtype("float64")):
        distances, levels = _ranked(distances, levels)
    search = _search_registered if _native.is_torch(distances) else _search
    labels = search(distances, indptr, indices, levels, min_samples)
    return labels if several else labels[0]


class Overlap(NamedTuple):
    """Per sample: the members of both its clusters, of the first, and of the second."""

    intersection: Any
    size_a: Any
    size_b: Any


def cluster_overlap(a: Array, b: Array) -> Overlap:
    """How the clusters of each sample in two clusterings overlap.

    SpCL's reliability of a sample is `intersection / (size_a + size_b - intersection)`.

    Args:
        a, b: (N,) int64 or int32 labels. A negative one is a cluster of its own, with one member.

    Returns:
        Overlap(intersection, size_a, size_b), each (N,) int64: how many samples have both labels of sample
        i, the first one, and the second one. In time and memory linear in N.
    """
    count: Callable = _overlap_registered if _native.is_torch(a) else _overlap
    return Overlap(*count(a, b))


def mean_smallest(graph_or_distance: Any, fraction: float) -> float:
    """The mean of the smallest `round(fraction * M)` of M non-zero distances: GCL's and JVTC's eps.

    The distances are those above the diagonal.

    Args:
        graph_or_distance: as for `dbscan`, in float32. Pairs of a graph that are not stored are at distance
            1 and count among the M; stored zeros do not. Of a graph that was cut at a `max_distance`, what
            was kept must hold all that are taken, else it is refused. (A matrix that was cut without saying
            so has no such guard.)
        fraction: in (0, 1], such that at least one distance is taken.

    Selects instead of sorting; adds in float64, in an order that does not depend on the number of threads.
    On CUDA, waits for the result.
    """
    op = "mean_smallest"
    distances, indptr, indices = _parts(op, graph_or_distance)
    module, stream = _native.floor(distances)
    _check_entries(op, distances, indptr, indices)
    out = _native.empty(distances, (6,), "int64")
    module.smallest(distances, indptr, indices, fraction, out, _native.scratch(distances), stream)
    counted, taken, stored, ties, largest, total = out.tolist()
    if taken == 0:
        raise ValueError(
            f"{op}: fraction must take at least one of the {counted} non-zero distances, got {fraction}"
        )
    cut = _cut(graph_or_distance)
    if taken > stored and cut is not None:
        raise ValueError(
            f"{op}: graph must hold the {taken} smallest distances, got {stored} up to its max_distance {cut}"
        )
    (largest,) = struct.unpack("<f", struct.pack("<q", largest)[:4])
    (total,) = struct.unpack("<d", struct.pack("<q", total))
    if largest > 1:  # and so are pairs that are not stored
        total += counted - stored
    return (total + ties * largest) / taken


def _cut(graph: Any) -> float | None:
    """The distance beyond which pairs of a graph were left out, if any were."""
    most = getattr(graph, "max_distance", None)
    return most if most is not None and most < 1 else None


def _parts(op: str, graph: Any) -> tuple[Any, Any, Any]:
    """Distances, and indptr and indices where they are those of a graph."""
    if not hasattr(graph, "indptr"):
        if not hasattr(graph, "dtype"):
            kind = type(graph).__name__
            raise ValueError(f"{op}: graph must be CSR or an array of distances, got {kind}")
        return graph, None, None
    form = getattr(graph, "format", "csr")
    if form != "csr":
        raise ValueError(f"{op}: graph must be a CSR matrix (graph.tocsr()), got {form}")
    indptr, indices = graph.indptr, graph.indices
    distances = graph.distances if hasattr(graph, "distances") else graph.data
    samples = indptr.shape[0] - 1
    if tuple(graph.shape) != (samples, samples):
        raise ValueError(
            f"{op}: graph must have shape ({samples}, {samples}), got {tuple(graph.shape)}"
        )
    return distances, indptr, indices


def _ranked(distances: Any, levels: list[float]) -> tuple[Any, list[float]]:
    """float32 distances and eps that compare as the float64 ones do: how many eps a distance exceeds."""
    ascending = sorted(set(levels))
    ranks = _native.empty(distances, tuple(distances.shape), "float32")
    ranks[...] = 0
    for level in ascending:
        ranks += ~(distances <= level)
    return ranks, [float(ascending.index(level)) for level in levels]


def _check_entries(op: str, distances: Any, indptr: Any, indices: Any) -> None:
    if indptr is not None:
        entries, samples = indices.shape[0], indptr.shape[0] - 1
        _native.check_range(op, "indptr", indptr, 0, entries, closed=True)
        _native.check_range(op, "indices", indices, 0, samples, closed=False)


def _samples(distances: Any, indptr: Any) -> int:
    return (*distances.shape, 0)[0] if indptr is None else indptr.shape[0] - 1


def _search(
    distances: torch.Tensor,
    indptr: torch.Tensor | None,
    indices: torch.Tensor | None,
    eps: Sequence[float],
    min_samples: int,
) -> torch.Tensor:
    module, stream = _native.floor(distances)
    _check_entries("dbscan", distances, indptr, indices)
    labels = _native.empty(distances, (len(eps), _samples(distances, indptr)), "int64")
    allocate = _native.scratch(distances)
    module.dbscan(distances, indptr, indices, eps, min_samples, labels, allocate, stream)
    return labels


def _search_fake(distances, indptr, indices, eps, min_samples):
    return distances.new_empty((len(eps), _samples(distances, indptr)), dtype=torch.int64)


_search_registered = _torch.register(_search, name="dbscan", fake=_search_fake)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    module, stream = _native.floor(a)
    shape = tuple(getattr(a, "shape", ()))
    shared, size_a, size_b = (_native.empty(a, shape, "int64") for _ in range(3))
    module.cluster_overlap(a, b, shared, size_a, size_b, _native.scratch(a), stream)
    return shared, size_a, size_b


def _overlap_fake(a, b):
    return tuple(a.new_empty(a.shape, dtype=torch.int64) for _ in range(3))


_overlap_registered = _torch.register(_overlap, name="cluster_overlap", fake=_overlap_fake)
