"""fast-reid: distances, evaluation, mining and MoCo's queue. No faiss, and nothing to compile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pyreid import distributed, ops
from pyreid.compat import _mining, _place, _ranking
from pyreid.compat._jaccard import jaccard
from pyreid.compat._rerank import re_ranking

__all__ = [
    "Memory",
    "build_dist",
    "compute_jaccard_distance",
    "evaluate_rank",
    "hard_example_mining",
    "re_ranking",
]


@torch.no_grad()
def compute_jaccard_distance(
    features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    search_option: int = 0,
    fp16: bool = False,
) -> np.ndarray:
    """`fastreid.utils.compute_dist.compute_jaccard_distance`: `ops.jaccard_distance`, "openunreid".

    Args:
        features: (N, D), not normalised here.
        k1, k2: sizes of the neighbourhoods.
        search_option: 0 to 2: on the GPU where there is one. 3: where the features are.
        fp16: the result is float16; the arithmetic stays float32.

    Returns:
        (N, N) float32.
    """
    distance = jaccard(features, k1, k2, "openunreid", gpu=search_option < 3, sparse=False)
    return distance.astype(np.float16) if fp16 else distance


@torch.no_grad()
def build_dist(
    feat_1: torch.Tensor, feat_2: torch.Tensor, metric: str = "euclidean", **kwargs: Any
) -> np.ndarray:
    """`fastreid.utils.compute_dist.build_dist`: distances of two sets of features.

    Args:
        feat_1: (Q, D). feat_2: (G, D).
        metric: "euclidean" (squared), "cosine" (1 - cosine) or "jaccard", which takes k1 and k2 by name.

    Returns:
        (Q, G) float32. For "jaccard", neighbours are sought among all Q + G rows, but no (Q + G, Q + G)
        array is made.
    """
    if metric == "jaccard":
        queries, gallery = (_place.placed(x) for x in (feat_1, feat_2))
        k1, k2 = kwargs["k1"], kwargs["k2"]
        distance = ops.rerank(queries, gallery, k1, k2, 0.0, variant="openunreid")
    elif metric == "cosine":
        distance = 1 - F.normalize(feat_1) @ F.normalize(feat_2).T
    elif metric == "euclidean":
        distance = _mining.squared_euclidean(feat_1, feat_2)
    else:
        raise ValueError(
            f"build_dist: metric must be 'cosine', 'euclidean' or 'jaccard', got {metric!r}"
        )
    return distance.cpu().numpy()


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | tuple[np.ndarray, float]:
    """`fastreid.evaluation.rank.evaluate_rank`: CMC, AP and INP of a distance matrix.

    Args:
        distmat: (Q, G) distances, array or tensor. Of equal ones, the lower gallery row comes first.
        q_pids, g_pids, q_camids, g_camids: (Q,) and (G,) ids.
        max_rank: the length of CMC, at most G.
        use_metric_cuhk03: one image per person in the gallery, ten times over.
        use_cython: not looked at.

    Returns:
        cmc (max_rank,), AP and INP (V,) float32, of the V queries that have a match, in their order; for
        CUHK03, as theirs, cmc and mAP. AssertionError where no query has a match.
    """
    found = _ranking.ranked(
        *("evaluate_rank", distmat, (q_pids, g_pids), (q_camids, g_camids), max_rank),
        single_shot=use_metric_cuhk03,
    )
    if use_metric_cuhk03:
        return found.cmc, float(found.ap.mean(dtype=np.float64))
    return found.cmc, found.ap, found.inp


def hard_example_mining(
    dist_mat: torch.Tensor, is_pos: torch.Tensor, is_neg: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fastreid.modeling.losses.triplet_loss.hard_example_mining`, without its wait for the GPU.

    Args:
        dist_mat: (N, M). is_pos, is_neg: (N, M) bool. Rows may differ in how many they have, where theirs
            fails, or mixes rows up.

    Returns:
        dist_ap, dist_an: (N,) distances of the farthest positive and of the nearest negative.
    """
    positive, negative = _mining.hardest(dist_mat, is_pos, is_neg)
    return positive[0], negative[0]


class Memory(torch.nn.Module):
    """`fastreid.modeling.meta_arch.moco.Memory`: a queue of labelled features, and a pairwise loss with it.

    Loss, gradient, buffers and their names are theirs, with what they do that one may not expect: the queue
    takes the batch in before the loss is computed; every row's positives leave out the queue column of its
    own number in the batch, wherever the batch stands. The (N, K) arrays between are two, not ten.

    Args:
        dim: of features. K: columns of the queue, a multiple of the number of rows that come at a time.
    """

    queue: torch.Tensor
    queue_label: torch.Tensor
    queue_ptr: torch.Tensor

    def __init__(self, dim: int = 512, K: int = 65536):
        super().__init__()
        self.K = K
        self.margin = 0.25
        self.gamma = 32
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_label", torch.zeros((1, K), dtype=torch.long))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, feat_q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(N, D) features, normalised here, and (N,) labels -> scalar. The queue changes."""
        feat_q = F.normalize(feat_q, p=2, dim=1)
        self._dequeue_and_enqueue(feat_q.detach(), targets)
        return self._pairwise_cosface(feat_q, targets)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: torch.Tensor, targets: torch.Tensor) -> None:
        keys = distributed.gather_rows(keys, equal=True)
        targets = distributed.gather_rows(targets, equal=True)
        if self.K % len(keys):
            raise AssertionError(f"Memory: K must be a multiple of {len(keys)} rows, got {self.K}")
        begin = int(self.queue_ptr)
        self.queue[:, begin : begin + len(keys)] = keys.T
        self.queue_label[:, begin : begin + len(keys)] = targets
        self.queue_ptr[0] = (begin + len(keys)) % self.K

    def _pairwise_cosface(self, feat_q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        similarity = (feat_q @ self.queue).float()
        same = targets[:, None] == self.queue_label
        positive = same.clone()
        positive.diagonal().fill_(False)
        outside = -99999999.0  # theirs: a row without positives has no loss
        far = (similarity * -self.gamma).masked_fill(~positive, outside).logsumexp(dim=1)
        near = ((similarity + self.margin) * self.gamma).masked_fill(same, outside).logsumexp(dim=1)
        return F.softplus(far + near).mean()


REPLACEMENTS = {
    "fastreid.utils.compute_dist.compute_jaccard_distance": compute_jaccard_distance,
    "fastreid.utils.compute_dist.build_dist": build_dist,
    "fastreid.evaluation.rank.evaluate_rank": evaluate_rank,
    "fastreid.evaluation.rerank.re_ranking": re_ranking,
    "fastreid.modeling.losses.triplet_loss.hard_example_mining": hard_example_mining,
    "fastreid.modeling.meta_arch.moco.Memory": Memory,
}
ABSENT = ("faiss",)
