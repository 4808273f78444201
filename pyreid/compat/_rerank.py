"""`utils/rerank.py`, which these projects have from each other: re-ranking of a test's distances, and MMT's
Jaccard distance."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.compat._jaccard import jaccard
from pyreid.compat._sparse import SparseDistance


def re_ranking(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray:
    """(Q, G) float32 NumPy distances: (1 - lambda) Jaccard + lambda original, the original squared and
    divided by the maximum of its column.

    Args:
        q_g_dist, q_q_dist, g_g_dist: (Q, G), (Q, Q) and (G, G): NumPy arrays or tensors, in any mixture.
    """
    blocks = [torch.as_tensor(block).detach() for block in (q_g_dist, q_q_dist, g_g_dist)]
    device = next((block.device for block in blocks if block.is_cuda), blocks[0].device)
    across, queries, gallery = (block.to(device, torch.float32).contiguous() for block in blocks)
    mixed = ops.rerank_distances(across, queries, gallery, k1, k2, float(lambda_value))
    return mixed.cpu().numpy()


def compute_jaccard_dist(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    lambda_value: float = 0,
    source_features: torch.Tensor | None = None,
    use_gpu: bool = False,
    *,
    sparse: bool = False,
) -> Any:
    """(N, N) float32 tensor on the CPU: MMT's Jaccard distance of (N, D) features, unit ones.

    With `lambda_value` and (M, D) `source_features`, mixed with how far rows are from the nearest source row,
    as in SSG and MMT. `sparse`: a SparseDistance in place of the tensor, if nothing is mixed in.
    """
    started = time.time()
    if print_flag:
        print("Computing Jaccard distance...")
    mixed = lambda_value > 0 and source_features is not None
    distance = jaccard(target_features, k1, k2, "mmt", gpu=use_gpu, sparse=sparse and not mixed)
    if not isinstance(distance, SparseDistance):
        distance = torch.from_numpy(distance)
    if mixed:
        apart = _from_source(target_features, source_features, use_gpu)
        distance.mul_(1 - lambda_value).add_(apart[:, None] + apart, alpha=lambda_value)
    if print_flag:
        print(f"Time cost: {time.time() - started}")
    return distance


def sparse_jaccard_dist(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    lambda_value: float = 0,
    source_features: torch.Tensor | None = None,
    use_gpu: bool = False,
) -> Any:
    """`compute_jaccard_dist(..., sparse=True)`."""
    options = (print_flag, lambda_value, source_features, use_gpu)
    return compute_jaccard_dist(target_features, k1, k2, *options, sparse=True)


def _from_source(targets: torch.Tensor, sources: Any, use_gpu: bool) -> torch.Tensor:
    """(N,) on the CPU: 1 - exp(-squared distance to the nearest source row), of the largest of them."""
    if use_gpu and torch.cuda.is_available():
        targets, sources = targets.cuda(), sources.cuda()
    norms = sources.square().sum(dim=1)
    nearest = [
        (norms - 2 * rows @ sources.T).amin(dim=1) + rows.square().sum(dim=1)
        for rows in targets.split(1024)
    ]
    apart = 1 - torch.exp(-torch.cat(nearest))
    return (apart / apart.max()).cpu()
