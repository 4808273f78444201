"""SpCL (Ge et al., NeurIPS 2020), `spcl`: its Jaccard distance, DBSCAN, hybrid memory and re-ranking."""

from __future__ import annotations

import torch

from pyreid import ops
from pyreid.compat._jaccard import compute_jaccard_distance, sparse_jaccard_distance
from pyreid.compat._memory import Products, UpdateInBackward, hybrid_loss
from pyreid.compat._rerank import compute_jaccard_dist, re_ranking
from pyreid.compat._sparse import DBSCAN, SparseDistance

__all__ = [
    "DBSCAN",
    "HM",
    "HybridMemory",
    "SparseDistance",
    "compute_jaccard_dist",
    "compute_jaccard_distance",
    "hm",
    "re_ranking",
    "reliability",
]

HM = Products


def hm(
    inputs: torch.Tensor, indexes: torch.Tensor, features: torch.Tensor, momentum: float = 0.5
) -> torch.Tensor:
    """(B, N) products of (B, D) inputs with (N, D) features. Backward moves `features[indexes]` towards the
    inputs, one after another."""
    return HM.apply(inputs, indexes, features, momentum)


class HybridMemory(torch.nn.Module):
    """One row per image; the mean similarity to the rows of each label goes through a softmax over labels.

    `forward(inputs, indexes)`: (B, D) unit features and their (B,) rows -> scalar. The rows move in
    backward, in batch order. `features` (num_samples, num_features) and `labels` (num_samples,) are buffers
    that a trainer assigns; labels are 0 and up, and images that stand alone have one each.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, num_features: int, num_samples: int, temp: float = 0.05, momentum: float = 0.2
    ):
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))

    def forward(self, inputs: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        queries = UpdateInBackward.apply(
            inputs, indexes, self.features, self.momentum, "sequential"
        )
        return hybrid_loss(queries, self.features, self.labels, indexes, self.temp)


def reliability(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N,) float32: 1 - the overlap of each image's clusters in two clusterings, which is R_comp for the
    tighter one and R_indep for the looser one. In place of N x N matrices of equal labels, the same numbers.

    Args:
        labels, others: (N,) int64, where images that stand alone have a label each.
    """
    shared, size, other_size = ops.cluster_overlap(labels, others)
    return 1 - shared.float() / (size + other_size - shared).float()


REPLACEMENTS = {
    "spcl.utils.faiss_rerank.compute_jaccard_distance": compute_jaccard_distance,
    "spcl.utils.rerank.re_ranking": re_ranking,
    "spcl.utils.rerank.compute_jaccard_dist": compute_jaccard_dist,
    "spcl.models.hm.HM": HM,
    "spcl.models.hm.hm": hm,
    "spcl.models.hm.HybridMemory": HybridMemory,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {"spcl.utils.faiss_rerank.compute_jaccard_distance": sparse_jaccard_distance}
ABSENT = ("faiss",)
