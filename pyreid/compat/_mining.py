"""Distances within a batch, and each row's farthest positive and nearest negative, as reid-strong-baseline
and fast-reid take them."""

from __future__ import annotations

import torch


def squared_euclidean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N, M) squared distances of (N, D) and (M, D) rows."""
    squares = x.pow(2).sum(dim=1, keepdim=True) + y.pow(2).sum(dim=1)
    return squares.addmm_(x, y.T, alpha=-2)  # in place: autocast leaves it in float32, as theirs


def euclidean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N, M) distances; equal rows are at 1e-6, where a root still has a slope."""
    return squared_euclidean(x, y).clamp(min=1e-12).sqrt()


def hardest(
    distance: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """((N,) distances, (N,) columns) of the farthest positive, and of the nearest negative.

    Args:
        distance: (N, M). Gradients go to what is chosen, the first of equals.
        positive, negative: (N, M) bool. How many each row has may differ. A row without any is at -inf or
            inf.
    """
    farthest = distance.masked_fill(~positive, -torch.inf).max(dim=1)
    nearest = distance.masked_fill(~negative, torch.inf).min(dim=1)
    return (farthest[0], farthest[1]), (nearest[0], nearest[1])
