"""jaccard_graph, knn and rerank at the sizes of Market-1501."""

import numpy as np
import torch

from pyreid import ops

from .timing import Case, pytest_benchmark

EPS = 0.6


def cases(device, quick=False):
    for size in [3000] if quick else [3000, 12936]:
        yield neighbours(device, size, 2048, 30)
        yield graph(device, size, 2048, 30, 6)


def features_of(size, dim):
    """Rows of about unit length around centres of 17. Coordinates are multiples of 1 / 512, so that products
    are exact in float32 in whatever order they are added, and all contenders rank alike."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(size // 17 + 1, dim, generator=generator)
    rows = centres[torch.arange(size) // 17] + torch.randn(size, dim, generator=generator)
    return (torch.nn.functional.normalize(rows, dim=1) * 512).round() / 512


def product_of(x):
    """One float32 product of the features with themselves, in panels that are thrown away."""
    for panel in x.split(1024):
        panel @ x.T


def ranked(x, k):
    """Neighbours by product and topk; ties, which topk breaks as it likes, by the lower row."""
    ties = torch.arange(len(x), device=x.device, dtype=torch.float64) * 1e-10
    return torch.cat([((p @ x.T).double() - ties).topk(k).indices for p in x.split(1024)])


def neighbours(device, size, dim, k):
    return Case(
        op="knn",
        size=f"N={size} D={dim} k={k}",
        device=device,
        make=lambda: features_of(size, dim).to(device),
        ours=lambda x: ops.knn(x, k).rows,
        baselines={"product + topk": lambda x: ranked(x, k)},
        bounds={"product alone": product_of},
        bytes=4 * (size * dim + 3 * size * k),
        flops=size * size * dim,  # each product serves two rows
    )


def graph(device, size, dim, k1, k2):
    def similarity(matrix):
        return (EPS - matrix).clip(0).sum(1)

    def ours(x):
        found = ops.jaccard_graph(x, k1, k2, max_distance=EPS)
        counts = found.indptr.diff()
        rows = torch.repeat_interleave(torch.arange(size, device=device), counts)
        return torch.zeros(size, device=device).index_add_(0, rows, EPS - found.distances)

    def published(x):
        rank = ranked(x, k1).cpu().numpy()
        dense = dense_jaccard(x.cpu().numpy(), rank, k1, k2)
        return torch.from_numpy(similarity(dense)).to(device)

    return Case(
        op="jaccard_graph",
        size=f"N={size} D={dim} k1={k1} k2={k2} distance <= {EPS}",
        device=device,
        make=lambda: features_of(size, dim).to(device),
        ours=ours,
        baselines={"dense, row by row": published},
        bounds={"product alone": product_of},
        bytes=4 * size * dim,
        flops=size * size * dim,
        tolerance=1e-4,
    )


def dense_jaccard(x, rank, k1, k2):
    """The published way: weights, their means and distances as dense matrices, a loop over rows each."""
    size = len(x)

    def reciprocal(i, k):
        forward = rank[i, :k]
        return forward[(rank[forward, :k] == i).any(axis=1)]

    near = [reciprocal(i, k1) for i in range(size)]
    half = [reciprocal(i, round(k1 / 2) + 1) for i in range(size)]
    weights = np.zeros((size, size), np.float32)
    for i in range(size):
        members = near[i]
        for j in near[i]:
            if len(np.intersect1d(half[j], near[i])) > 2 / 3 * len(half[j]):
                members = np.append(members, half[j])
        members = np.unique(members)
        raw = np.exp(2 * (x[members] @ x[i] - 1))
        weights[i, members] = raw / raw.sum()
    weights = np.stack([weights[rank[i, :k2]].mean(axis=0) for i in range(size)])
    holders = [np.flatnonzero(weights[:, j]) for j in range(size)]
    distances = np.empty_like(weights)
    for i in range(size):
        shared = np.zeros(size, np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        distances[i] = 1 - shared / (2 - shared)
    return distances.clip(0)


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
