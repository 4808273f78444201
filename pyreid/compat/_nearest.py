"""Euclidean neighbours by the ops, which rank dot products."""

from __future__ import annotations

import torch

from pyreid import ops

# Squared norms that differ by no more than rounding leaves between unit rows.
_SAME = 1e-6


@torch.no_grad()
def nearest(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    k: int,
    *,
    query_groups: torch.Tensor | None = None,
    gallery_groups: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k gallery rows nearest to each query, nearest first, of equal ones the lower.

    Args:
        queries: (B, D). gallery: (G, D), of the same device; the queries themselves, if the same object,
            which takes half the work on the CPU.
        query_groups, gallery_groups: (B,) and (G,) int64 from 0 on; rows of the query's group do not count.

    Returns:
        squared distances (B, k) float32, ascending, inf where there are fewer rows; rows (B, k) int64, -1
        there.
    """
    alone = queries is gallery and query_groups is None
    gallery = gallery.float().contiguous()
    queries = gallery if alone else queries.float().contiguous()
    norms = gallery.square().sum(dim=1)
    own = queries.square().sum(dim=1, keepdim=True)
    low, high = norms.aminmax() if len(norms) else (norms.sum(), norms.sum())
    if bool(high - low <= _SAME * high):  # ranked by dot products alone
        shift = (low + high) / 2
    else:  # |x - q|^2 = |q|^2 - 2 <(x, -|x|^2 / 2), (q, 1)>
        shift, alone = norms.new_zeros(()), False
        gallery = torch.cat([gallery, norms[:, None] / -2], dim=1)
        queries = torch.cat([queries, torch.ones_like(own)], dim=1)
    if query_groups is None:
        scores, rows = ops.knn(gallery, k, queries=None if alone else queries)
    else:
        scores, rows = ops.mine_negatives(
            queries, gallery, k, query_groups=query_groups, bank_groups=gallery_groups
        )
    return (own + shift - 2 * scores).clamp(min=0), rows
