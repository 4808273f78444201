"""Cluster Contrast (Dai et al., ACCV 2022), `clustercontrast`: its Jaccard distance, DBSCAN, cluster memory,
centroids and re-ranking."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from pyreid import ops
from pyreid.compat._jaccard import compute_jaccard_distance, sparse_jaccard_distance
from pyreid.compat._memory import HardestProducts, Products, UpdateInBackward
from pyreid.compat._rerank import compute_jaccard_dist, re_ranking
from pyreid.compat._sparse import DBSCAN, SparseDistance

__all__ = [
    "CM",
    "DBSCAN",
    "CM_Hard",
    "ClusterMemory",
    "SparseDistance",
    "cm",
    "cm_hard",
    "compute_jaccard_dist",
    "compute_jaccard_distance",
    "generate_cluster_features",
    "re_ranking",
]

CM = Products
CM_Hard = HardestProducts


def cm(
    inputs: torch.Tensor, indexes: torch.Tensor, features: torch.Tensor, momentum: float = 0.5
) -> torch.Tensor:
    """(B, C) products of (B, D) inputs with (C, D) centroids. Backward moves `features[indexes]` towards the
    inputs, one after another."""
    return CM.apply(inputs, indexes, features, momentum)


def cm_hard(
    inputs: torch.Tensor, indexes: torch.Tensor, features: torch.Tensor, momentum: float = 0.5
) -> torch.Tensor:
    """`cm`, but each centroid is moved once, by the input that is least like it."""
    return CM_Hard.apply(inputs, indexes, features, momentum)


class ClusterMemory(torch.nn.Module):
    """One row per cluster. `forward(inputs, targets)`: (B, D) features, normalised here, and their (B,)
    clusters -> scalar cross-entropy. The rows move in backward: one input after another, or with `use_hard`
    by each cluster's hardest alone. `features` (num_samples, num_features) is a buffer that a trainer
    assigns.
    """

    features: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.05,
        momentum: float = 0.2,
        use_hard: bool = False,
    ):
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.use_hard = use_hard
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        repeats = "hardest" if self.use_hard else "sequential"
        queries = UpdateInBackward.apply(
            normalize(inputs), targets, self.features, self.momentum, repeats
        )
        losses = ops.bank_cross_entropy(queries, self.features, targets, scale=1 / self.temp)
        return losses.mean()


def generate_cluster_features(labels: Any, features: torch.Tensor) -> torch.Tensor:
    """(C, D) mean features of the clusters, ascending; images labelled -1 are in none.

    Args:
        labels: (N,) array, tensor or list. features: (N, D) tensor.
    """
    ids = torch.as_tensor(labels, device=features.device).long()
    return ops.class_means(features.detach().contiguous(), ids, normalize=False).means


REPLACEMENTS = {
    "clustercontrast.utils.faiss_rerank.compute_jaccard_distance": compute_jaccard_distance,
    "clustercontrast.utils.rerank.re_ranking": re_ranking,
    "clustercontrast.utils.rerank.compute_jaccard_dist": compute_jaccard_dist,
    "clustercontrast.models.cm.CM": CM,
    "clustercontrast.models.cm.cm": cm,
    "clustercontrast.models.cm.CM_Hard": CM_Hard,
    "clustercontrast.models.cm.cm_hard": cm_hard,
    "clustercontrast.models.cm.ClusterMemory": ClusterMemory,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {"clustercontrast.utils.faiss_rerank.compute_jaccard_distance": sparse_jaccard_distance}
ABSENT = ("faiss",)
