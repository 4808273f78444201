"""From features to pseudo labels, as all methods do it: the Jaccard distance of k-reciprocal neighbours, then
DBSCAN."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from pyreid import ops
from pyreid.options import Presets, option

_GIVEN = ("mmt", "jvtc", "strong-baseline")  # variants that re-rank distances as they are


@dataclass(frozen=True)
class Clustering(Presets):
    """Options of the clustering. A method's Config begins with them and adds its own."""

    variant: Literal[
        "spcl", "openunreid", "zhong", "mmt", "jvtc", "strong-baseline", "ca-jaccard"
    ] = option("spcl", "whose Jaccard distance: see help(ops.jaccard_graph)")
    k1: int = option(30, "neighbours that reciprocity is asked of")
    k2: int = option(6, "neighbours over which neighbourhoods are averaged; 1: none are")
    eps: float = option(0.6, "images up to this distance, in (0, 1], are neighbours to DBSCAN")
    rho: float | None = option(
        None,
        "sets eps anew each epoch: to the mean of this fraction of all distances, the smallest",
    )
    min_samples: int = option(
        4, "neighbours, itself included, that make an image the core of a cluster"
    )
    intra_k: tuple[int, int] = option((5, 2), "k1 and k2 within a camera, for ca-jaccard")
    inter_k: tuple[int, int] = option((20, 4), "k1 and k2 across cameras, for ca-jaccard")

    def __post_init__(self) -> None:
        for name in ("eps", "rho"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"Config: {name} must lie in (0, 1], got {value}")
        for name in ("k1", "k2", "min_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config: {name} must be at least 1, got {getattr(self, name)}")


class Clusters(NamedTuple):
    """What `cluster` found."""

    labels: torch.Tensor  # (N,) int64: 0, 1, ..., found - 1; -1 for images in no cluster
    found: int  # clusters
    noise: int  # images in no cluster
    eps: float
    pairs: int  # of images near enough to be kept in the graph, those with themselves included
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.found:,} clusters of {len(self.labels) - self.noise:,} images, {self.noise:,} in none "
            f"(eps {self.eps:.3g}, {self.seconds:.1f} s)"
        )


def cluster(features: torch.Tensor, cameras: torch.Tensor | None, config: Clustering) -> Clusters:
    """Pseudo labels of images by their features.

    Args:
        features: (N, D), unit rows.
        cameras: (N,) ids; only "ca-jaccard" asks for them.

    The same labels in every run, so that data-parallel processes may each make their own.
    """
    start = time.perf_counter()
    by_camera = config.variant == "ca-jaccard"
    sets: dict[str, Any] = {
        "k1": config.k1,
        "k2": config.k2,
        "variant": config.variant,
        "cameras": cameras if by_camera else None,
        "intra_k": config.intra_k,
        "inter_k": config.inter_k,
    }
    if config.rho is None:
        eps = config.eps
        labels, stats = ops.pseudo_labels(
            features, eps=eps, min_samples=config.min_samples, return_stats=True, **sets
        )
        pairs = stats.pairs
    else:
        graph = ops.jaccard_graph(features, **sets)
        eps = ops.mean_smallest(graph, config.rho)
        labels, pairs = ops.dbscan(graph, eps, config.min_samples), len(graph.indices)
    return _clusters(labels, eps, pairs, start)


def cluster_distances(
    distances: torch.Tensor, config: Clustering, *, factor: float = 1.0
) -> Clusters:
    """Pseudo labels by (N, N) distances: DBSCAN at the config's eps, or where its rho sets it, times
    `factor`."""
    start = time.perf_counter()
    eps = config.eps if config.rho is None else ops.mean_smallest(distances, config.rho)
    labels = ops.dbscan(distances, factor * eps, config.min_samples)
    return _clusters(labels, factor * eps, distances.numel(), start)


def joint_labels(
    features: torch.Tensor,
    labels: torch.Tensor,
    cameras: torch.Tensor,
    frames: torch.Tensor,
    config: Clustering,
    *,
    histogram: torch.Tensor | None = None,
    lambda_value: float = 0.5,
    factor: float = 1.0,
) -> Clusters:
    """Pseudo labels again, by what images look like and by when and where they were taken: JVTC's joint
    similarity (`ops.joint_distance`), re-ranked, to DBSCAN.

    Args:
        features: (N, D), unit rows. labels: (N,) those that looks alone have given; -1 is none.
        cameras: (N,) ids. frames: (N,) frame numbers, -1 where they are not known.
        config: its k1, k2, min_samples, and rho or eps. Its variant, where that is none that re-ranks given
            distances, becomes "jvtc".
        histogram: `ops.time_histogram` of labels, cameras and frames, if it is at hand.
        lambda_value: of the re-ranking.
        factor: what eps is multiplied by.

    Two (N, N) matrices are held at a time.
    """
    start = time.perf_counter()
    if histogram is None:
        histogram = ops.time_histogram(labels, cameras, frames)
    variant = config.variant if config.variant in _GIVEN else "jvtc"
    distances = ops.joint_distance(features, cameras, frames, histogram)
    distances = ops.rerank_distances(
        distances, None, None, config.k1, config.k2, lambda_value, variant=variant
    )
    found = cluster_distances(distances, config, factor=factor)
    return found._replace(seconds=time.perf_counter() - start)


def _clusters(labels: torch.Tensor, eps: float, pairs: int, start: float) -> Clusters:
    found, noise = int(labels.max()) + 1 if len(labels) else 0, int((labels < 0).sum())
    return Clusters(labels, found, noise, eps, pairs, time.perf_counter() - start)
