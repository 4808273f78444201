"""The contrastive losses of memory-bank trainers, under the names their users know.

Each is a thin module over one or two ops. A loss is pure: it reads a bank and changes nothing. Update the
bank with `MemoryBank.update` after the optimiser's step.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import normalize, softplus

from pyreid import ops
from pyreid.memory import MemoryBank


class ClusterContrast(torch.nn.Module):
    """Cross-entropy of features against cluster centroids (Cluster Contrast, Dai et al.).

    The bank has one row per cluster. `forward(features, labels)`: (B, D) features, normalised here, and
    (B,) clusters -> scalar.
    """

    def __init__(self, bank: MemoryBank, *, temperature: float = 0.05):
        super().__init__()
        self.bank = bank
        self.temperature = temperature

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = ops.bank_cross_entropy(
            normalize(features), self.bank.features, labels, scale=1 / self.temperature
        )
        return loss.mean()


class HybridMemory(torch.nn.Module):
    """SpCL's unified contrastive loss (Ge et al.): one bank row per image; the mean similarity to the rows of
    each label goes through a softmax over labels.

    `forward(features, rows)`: (B, D) features, normalised here, and the (B,) bank rows of the images ->
    scalar. Labels are those of the bank; an image that stands alone has a label of its own.
    """

    def __init__(self, bank: MemoryBank, *, temperature: float = 0.05):
        super().__init__()
        self.bank = bank
        self.temperature = temperature

    def forward(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        loss = ops.bank_cross_entropy(
            normalize(features),
            self.bank.features,
            self.bank.labels[rows],
            scale=1 / self.temperature,
            labels=self.bank.labels,
            reduce="cluster_mean",
        )
        return loss.mean()


class SelectiveContrast(torch.nn.Module):
    """SCL's multi-positive loss: one softmax over positives and negatives; the image itself counts
    `self_weight`, its neighbours share alpha * (1 - self_weight).

    `forward(queries, positives, negatives)`: (B, D), or (Q, B, D) for several branches over the same rows;
    (B, 1 + P) bank rows, the image's own first; (B, K) bank rows -> scalar, or (Q,).
    """

    def __init__(
        self,
        bank: MemoryBank,
        *,
        self_weight: float = 0.5,
        alpha: float = 1.75,
        scale: float = 10.0,
    ):
        super().__init__()
        self.bank = bank
        self.self_weight = self_weight
        self.alpha = alpha
        self.scale = scale

    def forward(
        self, queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor
    ) -> torch.Tensor:
        return selective_loss(
            queries,
            self.bank.features,
            positives,
            negatives,
            self_weight=self.self_weight,
            alpha=self.alpha,
            scale=self.scale,
        )


def selective_loss(
    queries: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    *,
    self_weight: float = 0.5,
    alpha: float = 1.75,
    scale: float = 10.0,
) -> torch.Tensor:
    """SCL's loss: each query to the rows of its image and of its neighbours, among these and negatives.

        L = mean_i sum_j c_j ( log sum_a exp(s_ia) - s_ij ),    s_ia = scale <q_i, x_a>

    over positives j, and a over positives and negatives; c_0 = self_weight, c_j = alpha (1 - self_weight) / P
    for each of the P neighbours. One softmax serves all terms: their sum of cross-entropies has this closed
    form.

    Args:
        queries: (B, D), or (Q, B, D) for several branches over the same rows; they need not be unit.
        bank: (N, D). positives: (B, 1 + P) its rows, the image's own first. negatives: (B, K), -1 pads.

    Returns:
        a scalar, or (Q,).
    """
    neighbours = positives.shape[1] - 1
    weights = selective_weights(
        neighbours, self_weight=self_weight, alpha=alpha, device=bank.device
    )
    loss = ops.set_contrast(queries, bank, positives, negatives, weights=weights, scale=scale)
    return loss.mean(dim=-1)


def selective_weights(
    neighbours: int, *, self_weight: float, alpha: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(1 + P,) what the image itself and each of its P neighbours count in SCL's loss."""
    share = alpha * (1 - self_weight) / max(neighbours, 1)
    weights = torch.full((1 + neighbours,), share, device=device)
    weights[0] = self_weight
    return weights


class CameraProxyContrast(torch.nn.Module):
    """ICE's camera-aware loss (also CAP's): all proxies of the label are positives, the hardest of other
    labels negatives; the mean over the images of each camera, summed over cameras.

    Args:
        proxies: (M, D) features, (M,) labels: `ops.class_means(features, labels, cameras, normalize=True)`.
        hardest: how many negatives.
        weight: of the sum.
        released_normalization: divides each feature dimension by its norm over the proxies, as the released
            code does by oversight. The published numbers were made with it.

    `forward(features, labels, cameras)`: (B, D) features, normalised here, (B,) ids -> scalar.
    """

    proxies: torch.Tensor
    proxy_labels: torch.Tensor
    proxies_of_label: torch.Tensor

    def __init__(
        self,
        proxies: torch.Tensor,
        proxy_labels: torch.Tensor,
        *,
        temperature: float = 0.07,
        hardest: int = 50,
        weight: float = 0.5,
        released_normalization: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.hardest = hardest
        self.weight = weight
        if released_normalization:
            proxies = normalize(proxies, dim=0)
        self.register_buffer("proxies", proxies.detach().float().contiguous())
        self.register_buffer("proxy_labels", proxy_labels.detach().long())
        self.register_buffer("proxies_of_label", rows_of_each(self.proxy_labels))

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor, cameras: torch.Tensor
    ) -> torch.Tensor:
        queries = normalize(features)
        negatives = ops.mine_negatives(
            queries.detach(),
            self.proxies,
            self.hardest,
            query_groups=labels,
            bank_groups=self.proxy_labels,
        ).rows
        loss = ops.set_contrast(
            queries,
            self.proxies,
            self.proxies_of_label[labels],
            negatives,
            scale=1 / self.temperature,
        )
        same_camera = (cameras[:, None] == cameras).sum(dim=1)
        return self.weight * (loss / same_camera).sum()


class ViewInvariantContrast(torch.nn.Module):
    """GCL's contrast of a real and a generated view with a memory, in three terms that share their negatives:
    the generated view with the image's own row, the generated view with a row of its cluster, the real view
    with another row of its cluster.

    `forward(real, generated, rows, seed)`: (B, D) features, normalised here, (B,) bank rows -> scalar.
    Positives and negatives are drawn by `ops.sample_rows`, negatives from other labels and from outliers.
    """

    def __init__(self, bank: MemoryBank, *, temperature: float = 0.04, negatives: int = 8192):
        super().__init__()
        self.bank = bank
        self.temperature = temperature
        self.negatives = negatives

    def forward(
        self, real: torch.Tensor, generated: torch.Tensor, rows: torch.Tensor, seed: int
    ) -> torch.Tensor:
        labels = self.bank.labels
        positives, negatives = ops.sample_rows(
            labels, labels[rows], positives=2, negatives=self.negatives, seed=seed
        )
        return self.contrast(normalize(real), normalize(generated), rows, positives, negatives)

    def contrast(
        self,
        real: torch.Tensor,
        generated: torch.Tensor,
        rows: torch.Tensor,
        positives: torch.Tensor,
        negatives: torch.Tensor,
    ) -> torch.Tensor:
        """The loss for unit (B, D) views, (B, 2) positive and (B, K) negative bank rows."""
        return view_invariant_loss(
            real,
            generated,
            self.bank.features,
            rows,
            positives,
            negatives,
            temperature=self.temperature,
        )


def view_invariant_loss(
    real: torch.Tensor,
    generated: torch.Tensor,
    bank: torch.Tensor,
    rows: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    *,
    temperature: float = 0.04,
    neg_query_term3: str = "generated",
) -> torch.Tensor:
    """GCL's three terms, each a positive among negatives that all share: see `ViewInvariantContrast`.

    Args:
        real, generated: (B, D) unit views.
        bank: (N, D). rows: (B,) the images' own. positives: (B, 2). negatives: (B, K), -1 pads at the end; an
            image that has none is content as it is.
        neg_query_term3: whose similarity to the negatives the third term, of the real view, has: that of the
            "generated" view, as released, or of the "real" one.
    """
    if neg_query_term3 not in ("generated", "real"):
        raise ValueError(
            "view_invariant_loss: neg_query_term3 must be generated or real, "
            f"got {neg_query_term3!r}"
        )
    scale = 1 / temperature
    queries = generated[None] if neg_query_term3 == "generated" else torch.stack([generated, real])

    def logit(views: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return scale * (views * bank[where]).sum(dim=-1)

    # The first negative as the positive of one softmax over all of them: loss + logit = log-sum-exp.
    first = negatives[:, :1].contiguous()
    spread = ops.set_contrast(queries, bank, first, negatives[:, 1:].contiguous(), scale=scale)
    denominators = spread + logit(queries, first[:, 0].clamp(min=0))
    denominators = denominators.masked_fill(first[:, 0] < 0, -math.inf)
    own, member, other = (
        logit(generated, rows),
        logit(generated, positives[:, 0]),
        logit(real, positives[:, 1]),
    )
    terms = (
        softplus(denominators[0] - own),
        softplus(denominators[0] - member),
        softplus(denominators[-1] - other),
    )
    return torch.stack(terms).sum(dim=0).mean()


def rows_of_each(labels: torch.Tensor) -> torch.Tensor:
    """(C, J): the rows of labels 0, 1, ..., C - 1, ascending, padded with -1."""
    order = torch.argsort(labels, stable=True)
    order = order[labels[order] >= 0]
    kept = labels[order]
    counts = torch.bincount(kept)
    starts = torch.cumsum(counts, 0) - counts
    width = int(counts.max()) if len(counts) else 0
    rows = torch.full((len(counts), width), -1, device=labels.device)
    place = torch.arange(len(kept), device=labels.device) - starts[kept]
    rows[kept, place] = order
    return rows
