"""Which images make a batch: endless iterators of rows, each a pure function of its random numbers.

A pass takes every cluster once, in random order; what does not fill a batch is dropped, and the next pass
begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pyreid import _native


def camera_spread(
    labels: Any, cameras: Any, *, batch_size: int, instances: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of clusters seen by as many cameras as possible (ICE).

    Of each cluster, one random image per camera: `instances` of them if there are more; if there are fewer,
    the cluster's other images besides, repeated only if there are too few. (Of a cluster that has neither so
    many cameras nor other images, `instances` are drawn with repetition, as in the released code.)

    Args:
        labels, cameras: (N,) whole numbers; images labelled -1 are left out.
        batch_size: a multiple of `instances`.

    Yields:
        (batch_size,) int64 rows, the images of a cluster next to each other.
    """

    def draw(rows: np.ndarray, of: np.ndarray) -> np.ndarray:
        shuffled = rng.permutation(len(rows))
        _, first = np.unique(of[shuffled], return_index=True)
        drawn = rows[shuffled[first]]
        missing = instances - len(drawn)
        if missing <= 0:
            return rng.choice(drawn, instances, replace=False)
        others = np.setdiff1d(rows, drawn)
        if not len(others):
            return rng.choice(drawn, instances)
        return np.concatenate([drawn, rng.choice(others, missing, replace=len(others) < missing)])

    return _of_clusters("camera_spread", draw, labels, cameras, batch_size, instances, rng)


def multiple_gallery(
    labels: Any, cameras: Any, *, batch_size: int, instances: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of a random image of each cluster with images that other cameras took (SpCL, Cluster Contrast).

    Where no other camera took any, with other images of the cluster. The `instances` - 1 are drawn without
    repetition if there are at least `instances` to draw from, as in the released code. A cluster of one image
    yields it `instances` times (released: once, which shifts the clusters behind it across batches). With
    equal `cameras`, this is Cluster Contrast's sampler that knows no cameras.

    Args, Yields: as `camera_spread`.
    """

    def draw(rows: np.ndarray, of: np.ndarray) -> np.ndarray:
        first = rng.integers(len(rows))
        others = rows[of != of[first]]
        if not len(others):
            others = np.delete(rows, first) if len(rows) > 1 else rows
        more = rng.choice(others, instances - 1, replace=len(others) < instances)
        return np.concatenate([rows[first : first + 1], more])

    return _of_clusters("multiple_gallery", draw, labels, cameras, batch_size, instances, rng)


def shuffled(rows: Any, *, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of `rows` (M,) in random order, (batch_size,) int64 each; a pass takes each row once."""
    rows = _native.to_numpy(rows).astype(np.int64)
    if not 1 <= batch_size <= len(rows):
        raise ValueError(
            f"shuffled: batch_size must be at least 1 and at most the {len(rows)} rows, got {batch_size}"
        )

    def endless() -> Iterator[np.ndarray]:
        while True:
            order = rng.permutation(rows)
            for first in range(0, len(rows) - batch_size + 1, batch_size):
                yield order[first : first + batch_size]

    return endless()


def _of_clusters(
    where: str,
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
    labels: Any,
    cameras: Any,
    batch_size: int,
    instances: int,
    rng: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Batches of what `draw` takes of the rows of each cluster and their cameras. Arguments are checked at
    once, not when the first batch is asked for."""
    labels, cameras = _native.to_numpy(labels).copy(), _native.to_numpy(cameras).copy()
    if labels.ndim != 1 or labels.shape != cameras.shape:
        raise ValueError(
            f"{where}: labels and cameras must have one shape (N,), got {labels.shape} and {cameras.shape}"
        )
    if instances < 1 or batch_size < 1 or batch_size % instances:
        raise ValueError(
            f"{where}: batch_size must be a multiple of instances, got {batch_size} and {instances}"
        )
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    clusters = np.split(order, starts) if len(order) else []
    per_batch = batch_size // instances
    if len(clusters) < per_batch:
        raise ValueError(
            f"{where}: labels must hold at least {per_batch} clusters (batch_size {batch_size}, instances "
            f"{instances}), got {len(clusters)}"
        )

    def endless() -> Iterator[np.ndarray]:
        while True:
            shuffled = rng.permutation(len(clusters))
            for first in range(0, len(clusters) - per_batch + 1, per_batch):
                chosen = (clusters[k] for k in shuffled[first : first + per_batch])
                yield np.concatenate([draw(rows, cameras[rows]) for rows in chosen])

    return endless()
