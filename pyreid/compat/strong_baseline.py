"""reid-strong-baseline and its family (TransReID, SOLIDER and others): evaluation, re-ranking, mining.

Their metrics (`R1_mAP`, `R1_mAP_reranking`, `R1_mAP_eval`) call these by name, and their `TripletLoss` calls
the mining: patched, they are what they were, and faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.compat import _mining, _place, _ranking

__all__ = ["euclidean_dist", "eval_func", "hard_example_mining", "re_ranking"]


def eval_func(
    distmat: Any, q_pids: Any, g_pids: Any, q_camids: Any, g_camids: Any, max_rank: int = 50
) -> tuple[np.ndarray, float]:
    """`eval_func`: CMC and mAP of (Q, G) distances, array or tensor. Of equal ones, the lower gallery row
    comes first. `cmc` is (max_rank,) float32, at most G. AssertionError where no query has a match."""
    found = _ranking.ranked(
        *("eval_func", distmat, (q_pids, g_pids), (q_camids, g_camids), max_rank)
    )
    return found.cmc, float(found.ap.mean(dtype=np.float64))


@torch.no_grad()
def re_ranking(
    probFea: torch.Tensor | None,
    galFea: torch.Tensor | None,
    k1: int,
    k2: int,
    lambda_value: float,
    local_distmat: np.ndarray | None = None,
    only_local: bool = False,
) -> np.ndarray:
    """`re_ranking`: `ops.rerank`, "strong-baseline", whose sums are in half precision, as theirs.

    Args:
        probFea: (Q, D) features of queries. galFea: (G, D) of the gallery.
        k1, k2, lambda_value: 20, 6 and 0.3 in the paper.
        local_distmat: (Q + G, Q + G) distances, symmetric, that are added to those of the features.
        only_local: they stand alone; of the features, only the number of queries counts.

    Returns:
        (Q, G) float32.
    """
    if probFea is None or galFea is None:
        raise ValueError("re_ranking: probFea and galFea must be tensors, got None")
    if local_distmat is None:
        queries, gallery = _place.placed(probFea), _place.placed(galFea)
        found = ops.rerank(queries, gallery, k1, k2, lambda_value, variant="strong-baseline")
        return found.cpu().numpy()
    distance = torch.as_tensor(local_distmat, dtype=torch.float32)
    if not only_local:
        rows = torch.cat([probFea, galFea]).float()
        squared = _mining.squared_euclidean(rows, rows)
        distance = squared + distance.to(squared.device)
    count = len(probFea)
    blocks = (distance[:count, count:], distance[:count, :count], distance[count:, count:])
    ours = [_place.placed(block) for block in blocks]
    found = ops.rerank_distances(
        ours[0], ours[1], ours[2], k1, k2, lambda_value, variant="strong-baseline"
    )
    return found.cpu().numpy()


def euclidean_dist(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`euclidean_dist`: (M, N) distances of (M, D) and (N, D) rows, at least 1e-6."""
    return _mining.euclidean(x, y)


def hard_example_mining(
    dist_mat: torch.Tensor, labels: torch.Tensor, return_inds: bool = False
) -> tuple[torch.Tensor, ...]:
    """`hard_example_mining`, without its wait for the GPU.

    Args:
        dist_mat: (N, N). labels: (N,). Labels may differ in how many rows they have, where theirs fails, or
            mixes rows up.

    Returns:
        dist_ap, dist_an: (N,) distances of the farthest positive and of the nearest negative;
        p_inds, n_inds: their columns, if `return_inds`.
    """
    same = labels[:, None] == labels
    positive, negative = _mining.hardest(dist_mat, same, ~same)
    if return_inds:
        return positive[0], negative[0], positive[1], negative[1]
    return positive[0], negative[0]


_OURS = {
    eval_func: ("data.datasets.eval_reid", "utils.metrics"),
    re_ranking: ("utils.re_ranking", "utils.reranking"),
    euclidean_dist: ("layers.triplet_loss", "loss.triplet_loss"),
    hard_example_mining: ("layers.triplet_loss", "loss.triplet_loss"),
}
# The first of each is reid-strong-baseline's, the second TransReID's.
REPLACEMENTS = {
    f"{place}.{ours.__name__}": ours for ours, places in _OURS.items() for place in places
}
