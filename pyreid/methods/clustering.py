"""From features to pseudo labels, as all methods do it: the Jaccard distance of k-reciprocal neighbours, then
DBSCAN."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from pyreid import ops
from pyreid.options import Presets, option


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
    found, noise = int(labels.max()) + 1 if len(labels) else 0, int((labels < 0).sum())
    return Clusters(labels, found, noise, eps, pairs, time.perf_counter() - start)
