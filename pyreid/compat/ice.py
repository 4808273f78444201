"""ICE (Chen, Lagadec, Bremond, ICCV 2021), `ice`: its Jaccard distance, DBSCAN, view contrast, camera loss
and moving average."""

from __future__ import annotations

from typing import Any

import torch

from pyreid.compat._jaccard import compute_jaccard_distance, sparse_jaccard_distance
from pyreid.compat._rerank import compute_jaccard_dist, re_ranking
from pyreid.compat._sparse import DBSCAN, SparseDistance
from pyreid.losses import CameraProxyContrast

__all__ = [
    "DBSCAN",
    "CameraLoss",
    "SparseDistance",
    "ViewContrastiveLoss",
    "batch_hard",
    "compute_jaccard_dist",
    "compute_jaccard_distance",
    "re_ranking",
    "update_ema_variables",
]


class ViewContrastiveLoss(torch.nn.Module):
    """The hardest positive of each view against all negatives: `forward(q, k, label)`, (B, D) unit features
    of two views and their (B,) labels -> scalar. Labels may have different numbers of images."""

    def __init__(self, num_instance: int = 4, T: float = 1.0):
        super().__init__()
        self.num_instance = num_instance
        self.T = T

    def forward(self, q: torch.Tensor, k: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        similarity = q @ k.T
        same = label[:, None] == label
        hardest = self.batch_hard(similarity, same.to(similarity.dtype))[0] / self.T
        negatives = (similarity / self.T).masked_fill(same, -torch.inf)
        logits = torch.cat([hardest[:, None], negatives], dim=1)
        return (torch.logsumexp(logits, dim=1) - hardest).mean()

    def batch_hard(
        self, mat_sim: torch.Tensor, mat_eq: torch.Tensor, indice: bool = False
    ) -> tuple[torch.Tensor, ...]:
        return batch_hard(mat_sim, mat_eq, indice)


def batch_hard(
    mat_sim: torch.Tensor, mat_eq: torch.Tensor, indice: bool = False
) -> tuple[torch.Tensor, ...]:
    """The least similar positive and the most similar negative of each row, by a reduction each.

    Args:
        mat_sim: (B, B'). mat_eq: (B, B') 1 for positives, 0 for negatives.
        indice: also return where they are.
    """
    positives = (mat_sim + 9999999.0 * (1 - mat_eq)).min(dim=1)
    negatives = (mat_sim - 9999999.0 * mat_eq).max(dim=1)
    if indice:
        return positives.values, negatives.values, positives.indices, negatives.indices
    return positives.values, negatives.values


class CameraLoss(CameraProxyContrast):
    """The camera part of `ImageTrainer.train`, which is written out there, for a batch at a time:

        contrast = CameraLoss(percam_tempV, concate_intra_class)     # where these are made
        loss_cam = contrast(f_out_t1, targets, cids)                 # in place of the loop over cameras

    Args:
        proxies: (M, D), those of all cameras. labels: (M,).
        beta: temperature. bg_knn: how many negatives.

    The released normalisation, of each dimension over the proxies, is kept. Where fewer than `bg_knn` proxies
    have other labels, the released loop takes some of the positives for negatives, too; this does not.
    """

    def __init__(
        self, proxies: torch.Tensor, labels: torch.Tensor, beta: float = 0.07, bg_knn: int = 50
    ):
        super().__init__(
            proxies, labels, temperature=beta, hardest=bg_knn, released_normalization=True
        )


@torch.no_grad()
def update_ema_variables(
    self: Any, model: torch.nn.Module, ema_model: torch.nn.Module, alpha: float, global_step: int
) -> None:
    """ema <- alpha ema + (1 - alpha) model. A method of the trainer. On CUDA, a few launches for all
    parameters; on the CPU, one parameter after another, as theirs, which caches like best."""
    averages = [parameter.data for parameter in ema_model.parameters()]
    current = [parameter.data for parameter in model.parameters()]
    if all(average.is_cuda for average in averages):
        torch._foreach_mul_(averages, alpha)
        torch._foreach_add_(averages, current, alpha=1 - alpha)
        return
    for average, parameter in zip(averages, current, strict=True):
        average.mul_(alpha).add_(parameter, alpha=1 - alpha)


REPLACEMENTS = {
    "ice.utils.faiss_rerank.compute_jaccard_distance": compute_jaccard_distance,
    "ice.utils.rerank.re_ranking": re_ranking,
    "ice.utils.rerank.compute_jaccard_dist": compute_jaccard_dist,
    "ice.loss.contrastive.ViewContrastiveLoss": ViewContrastiveLoss,
    "ice.trainers.ImageTrainer._update_ema_variables": update_ema_variables,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {"ice.utils.faiss_rerank.compute_jaccard_distance": sparse_jaccard_distance}
ABSENT = ("faiss",)
