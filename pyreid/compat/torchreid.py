"""torchreid (deep-person-reid): evaluation, re-ranking and the triplet loss without a loop over the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyreid.compat import _mining, _ranking
from pyreid.compat._rerank import re_ranking

__all__ = ["TripletLoss", "evaluate_rank", "re_ranking"]


def evaluate_rank(
    distmat: Any,
    q_pids: Any,
    g_pids: Any,
    q_camids: Any,
    g_camids: Any,
    max_rank: int = 50,
    use_metric_cuhk03: bool = False,
    use_cython: bool = True,
) -> tuple[np.ndarray, float]:
    """`torchreid.metrics.evaluate_rank`: CMC and mAP of a distance matrix.

    Args:
        distmat: (Q, G) distances, array or tensor. Of equal ones, the lower gallery row comes first.
        q_pids, g_pids, q_camids, g_camids: (Q,) and (G,) ids.
        max_rank: the length of CMC, at most G.
        use_metric_cuhk03: one image per person in the gallery, ten times over.
        use_cython: not looked at.

    Returns:
        cmc (max_rank,) float32, mAP. AssertionError where no query has a match.
    """
    found = _ranking.ranked(
        *("evaluate_rank", distmat, (q_pids, g_pids), (q_camids, g_camids), max_rank),
        single_shot=use_metric_cuhk03,
    )
    return found.cmc, float(found.ap.mean(dtype=np.float64))


class TripletLoss(torch.nn.Module):
    """`torchreid.losses.TripletLoss`: for each row, the farthest of its class and the nearest of another.

    Value and gradient are those of the loop, ties included (they share the gradient). A row that is alone of
    its class has itself for a positive; where no row is of another class, the loss is 0 (theirs fails).

    Args:
        margin: between the two distances.
    """

    def __init__(self, margin: float = 0.3):
        super().__init__()
        self.margin = margin
        self.ranking_loss = torch.nn.MarginRankingLoss(margin=margin)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, D) features, not normalised here, and (B,) classes -> scalar."""
        distance = _mining.euclidean(inputs, inputs)
        same = targets[:, None] == targets
        positive = distance.masked_fill(~same, -torch.inf).amax(dim=1)
        negative = distance.masked_fill(same, torch.inf).amin(dim=1)
        return self.ranking_loss(negative, positive, torch.ones_like(negative))


REPLACEMENTS = {
    f"torchreid.{where}{name}": ours
    for where in ("", "reid.")  # the authors' package, and the one on PyPI
    for name, ours in {
        "metrics.rank.evaluate_rank": evaluate_rank,
        "utils.rerank.re_ranking": re_ranking,
        "losses.hard_mine_triplet_loss.TripletLoss": TripletLoss,
    }.items()
}
