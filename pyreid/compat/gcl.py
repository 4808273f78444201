"""GCL (Chen et al., CVPR 2021), `gcl`: its Jaccard distance, rule for eps, DBSCAN, memory and re-ranking."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

from pyreid import ops
from pyreid.compat._jaccard import compute_jaccard_distance, sparse_jaccard_distance
from pyreid.compat._rerank import compute_jaccard_dist, re_ranking
from pyreid.compat._sparse import DBSCAN, SparseDistance

__all__ = [
    "DBSCAN",
    "Memory",
    "SparseDistance",
    "compute_jaccard_dist",
    "compute_jaccard_distance",
    "eps_from_rho",
    "re_ranking",
]


class Memory(torch.nn.Module):
    """Three contrasts of a real and a generated view with a memory of all images, drawn from anew for each.

    `forward(f, f_nv, indexes)`: (B, D) unit features of the real and the generated views, and their (B,)
    rows -> scalar. The rows move to the real views within forward, after the loss has been taken. `features`
    (num_samples, num_features) and `labels` (num_samples,) are buffers that a trainer assigns, of any size;
    images labelled -1 are negatives only.

    Args:
        K: how many negatives; where fewer images have other labels, all of them.
        fast_draws: positives and negatives from `ops.sample_rows`, seeded by torch, in place of the random
            numbers that the released loop draws. Equal in distribution; no longer equal number for number.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self,
        num_features: int,
        num_samples: int,
        temp: float = 0.07,
        momentum: float = 0.2,
        K: int = 8192,
        *,
        fast_draws: bool = False,
    ):
        super().__init__()
        self.num_features = num_features
        self.num_samples = num_samples
        self.momentum = momentum
        self.temp = temp
        self.K = K
        self.fast_draws = fast_draws
        self.register_buffer("features", torch.zeros(num_samples, num_features))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))

    def forward(self, f: torch.Tensor, f_nv: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
        positives, negatives = self._fast_draw(indexes) if self.fast_draws else self._draw(indexes)
        # Backward reads the rows as they were. With so many negatives of so few images, one product with all
        # rows is cheaper than to fetch those of each image.
        bank = self.features.clone()
        scores = f_nv @ bank.T  # (B, N)
        wanted = torch.cat([indexes[:, None], positives[:, :1], negatives], dim=1)
        logits = scores.gather(1, wanted.clamp(min=0)) / self.temp
        of_real = (f * bank[positives[:, 1]]).sum(dim=1) / self.temp
        others = logits[:, 2:].masked_fill(negatives < 0, -torch.inf).logsumexp(dim=1)
        terms = (logits[:, 0], logits[:, 1], of_real)
        loss = sum(softplus(others - term).mean() for term in terms)
        with torch.no_grad():
            moved_by = f.detach().contiguous()
            ops.memory_update_(
                self.features, moved_by, indexes, momentum=self.momentum, repeats="last"
            )
        return loss  # type: ignore[return-value]

    def _fast_draw(self, indexes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seed = int(torch.randint(2**63 - 1, ()))
        targets = self.labels[indexes]
        return ops.sample_rows(self.labels, targets, positives=2, negatives=self.K, seed=seed)

    def _draw(self, indexes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 2) positives, for the generated and the real view, and (B, K) negatives, -1 where there are
        fewer: by the permutations that the released loop asks of torch's generator, in its order."""
        labels = self.labels.cpu()
        order = torch.argsort(labels, stable=True)
        ascending = labels[order]
        targets = labels[indexes.cpu()]
        firsts = torch.searchsorted(ascending, targets).tolist()
        lasts = torch.searchsorted(ascending, targets, right=True).tolist()
        positives = torch.empty((len(targets), 2), dtype=torch.int64)
        negatives = torch.full((len(targets), self.K), -1)
        for i, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            members = order[first:last]
            count = last - first
            positives[i, 1] = members[torch.randperm(count)[0]]
            positives[i, 0] = members[torch.randperm(count)[0]]
            places = torch.randperm(len(labels) - count)[: self.K]
            # The place-th row that is no member: as many further on as members stand before it.
            before = torch.searchsorted(members - torch.arange(count), places, right=True)
            negatives[i, : len(places)] = places + before
        return positives.to(self.labels.device), negatives.to(self.labels.device)


def eps_from_rho(rerank_dist: Any, rho: float = 1.6e-3) -> float:
    """DBSCAN's eps as GCL takes it: the mean of the smallest rho of non-zero distances above the diagonal.

    The four lines of NumPy that do so take a SparseDistance, too; this one selects in place of sorting.
    """
    return ops.mean_smallest(rerank_dist, rho)


REPLACEMENTS = {
    "gcl.utils.faiss_rerank.compute_jaccard_distance": compute_jaccard_distance,
    "gcl.utils.rerank.re_ranking": re_ranking,
    "gcl.utils.rerank.compute_jaccard_dist": compute_jaccard_dist,
    "gcl.models.memory.Memory": Memory,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {"gcl.utils.faiss_rerank.compute_jaccard_distance": sparse_jaccard_distance}
ABSENT = ("faiss",)
