"""The Jaccard distance of the family that SpCL began, by its signature. ICE, GCL and Cluster Contrast have
the same function in a file of the same name."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.compat._sparse import SparseDistance


def compute_jaccard_distance(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 0,
    use_float16: bool = False,
    *,
    sparse: bool = False,
    max_distance: float | None = None,
) -> Any:
    """(N, N) float32 NumPy distances of (N, D) unit features, as SpCL, ICE, GCL and Cluster Contrast do it.

    Args:
        target_features: on any device.
        search_option: 0, 1, 2: on the GPU if there is one. Else: where the features are.
        use_float16: the result is float16. Arithmetic is float32 all the same.
        sparse: a SparseDistance in place of the array.
        max_distance: of it, what DBSCAN's eps will not exceed: less time and memory, but no dense array.
    """
    started = time.time()
    if print_flag:
        print("Computing jaccard distance...")
    gpu, cut = search_option < 3, max_distance
    distance = jaccard(target_features, k1, k2, "spcl", gpu=gpu, sparse=sparse, max_distance=cut)
    if use_float16 and not sparse:
        distance = distance.astype(np.float16)
    if print_flag:
        print(f"Jaccard distance computing time cost: {time.time() - started}")
    return distance


def sparse_jaccard_distance(
    target_features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    print_flag: bool = True,
    search_option: int = 0,
    use_float16: bool = False,
) -> SparseDistance:
    """`compute_jaccard_distance(..., sparse=True)`."""
    options = (print_flag, search_option, use_float16)
    return compute_jaccard_distance(target_features, k1, k2, *options, sparse=True)


def jaccard(
    features: Any,
    k1: int,
    k2: int,
    variant: str,
    *,
    gpu: bool,
    sparse: bool,
    max_distance: float | None = None,
) -> Any:
    """A SparseDistance, or an (N, N) float32 NumPy array."""
    features = torch.as_tensor(features).detach()
    if gpu and torch.cuda.is_available():
        features = features.cuda()
    features = features.float().contiguous()
    if sparse:
        graph = ops.jaccard_graph(features, k1, k2, max_distance=max_distance, variant=variant)
        return SparseDistance(graph)
    return ops.jaccard_distance(features, k1, k2, variant=variant).cpu().numpy()
