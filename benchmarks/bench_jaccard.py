"""jaccard_graph, jaccard_distance, knn and rerank at the sizes of real data sets."""

import numpy as np
import torch

from pyreid import ops

from . import peers
from .timing import Case, Growth, pytest_benchmark, sizes

EPS = 0.6


def cases(device, quick=False):
    yield neighbours(device, 3000, 2048, 30)
    yield graph(device, 3000, 2048, 30, 6)
    yield dense(device, 2000, 2048, 30, 6)
    yield ranking(device, 200, 1800, 2048, 20, 6)
    for size in sizes(quick):
        yield neighbours(device, size, 128, 30, line="D=128 k=30")
        yield graph(device, size, 128, 30, 6, line="D=128 k1=30")
    if quick:
        return
    for size in (12_936, 16_522, 32_621):
        yield neighbours(device, size, 2048, 30, line="D=2048 k=30")
        yield graph(device, size, 2048, 30, 6, line="D=2048 k1=30")
    yield neighbours(device, 12_936, 512, 30, headline=False)
    for dtype in (torch.float16, torch.bfloat16):
        yield neighbours(device, 12_936, 2048, 30, dtype=dtype)
    yield ranking(device, 1000, 5000, 2048, 20, 6)
    if device == "cuda":
        yield neighbours(device, 100_000, 2048, 30, line="D=2048 k=30")
        yield graph(device, 100_000, 2048, 30, 6, line="D=2048 k1=30")
        yield ranking(device, 3368, 15_913, 2048, 20, 6)


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


def best(x, k):
    """Scores by product and topk, in panels."""
    return torch.cat([(panel @ x.T).topk(k).values for panel in x.split(1024)])


def ranked(x, k, search=None):
    """Neighbours, by another library's search or by product and topk; some more are sought, for ties, which
    both break as they like, to go to the lower row."""
    if search is None:
        found = [(panel @ x.T).topk(k + 8) for panel in x.split(1024)]
        scores, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    else:
        scores, rows = search(x, x)
    rows, order = rows.sort(dim=1)
    order = scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return rows.gather(1, order)[:, :k]


def neighbours(device, size, dim, k, *, dtype=torch.float32, line=None, headline=True):
    def wide(x):
        return x.float()

    libraries = {
        f"{name} search": lambda x, search=search: search(wide(x), wide(x))[0]
        for name, search in peers.searches(device, k).items()
    }
    named = "" if dtype == torch.float32 else f" ({str(dtype)[6:]})"
    width = torch.empty((), dtype=dtype).element_size()
    growth = Growth(line, size, time=2, memory=1) if line else None
    return Case(
        op="knn",
        size=f"N={size} D={dim} k={k}{named}",
        device=device,
        make=lambda: features_of(size, dim).to(device, dtype),
        ours=lambda x: ops.knn(x, k).scores,
        baselines={"product + topk": lambda x: best(wide(x), k)} | libraries,
        bounds={"product alone": lambda x: product_of(wide(x))},
        bytes=width * size * dim + 12 * size * k,
        flops=size * size * dim,  # each product serves two rows
        growth=growth,
        headline=headline and (growth is None or dim == 2048),
    )


def published(x, k1, k2):
    """Dense Jaccard distance by NumPy, of lists that faiss makes, where it is here."""
    searches = peers.searches(x.device.type, k1 + 8)
    rank = ranked(x, k1, searches.get("faiss-cpu")).cpu().numpy()
    rows = x.cpu().numpy()

    def weigh(i, members):
        return np.exp(2 * (rows[members] @ rows[i] - 1))

    return dense_jaccard(rank, k1, k2, weigh, range(len(rows))).clip(0)


def published_name(device):
    faiss = "faiss-cpu" in peers.searches(device, 1)
    return "published: faiss-cpu, NumPy" if faiss else "published: NumPy"


def graph(device, size, dim, k1, k2, *, line=None):
    def similarity(matrix):
        return (EPS - matrix).clip(0).sum(1)

    def ours(x):
        found = ops.jaccard_graph(x, k1, k2, max_distance=EPS)
        counts = found.indptr.diff()
        rows = torch.repeat_interleave(torch.arange(size, device=device), counts)
        return torch.zeros(size, device=device).index_add_(0, rows, EPS - found.distances)

    name = published_name(device)
    growth = Growth(line, size, time=2, memory=1) if line else None
    return Case(
        op="jaccard_graph",
        size=f"N={size} D={dim} k1={k1} k2={k2} distance <= {EPS}",
        device=device,
        make=lambda: features_of(size, dim).to(device),
        ours=ours,
        baselines={
            name: lambda x: torch.from_numpy(similarity(published(x, k1, k2))).to(device),
        },
        bounds={"product alone": product_of},
        bytes=4 * size * dim,
        flops=size * size * dim,
        tolerance=1e-4,
        needs={name: 12 * size**2},
        growth=growth,
        headline=growth is None or dim == 2048,
    )


def dense(device, size, dim, k1, k2):
    name = published_name(device)
    return Case(
        op="jaccard_distance",
        size=f"N={size} D={dim} k1={k1} k2={k2}",
        device=device,
        make=lambda: features_of(size, dim).to(device),
        ours=lambda x: ops.jaccard_distance(x, k1, k2),
        baselines={name: lambda x: torch.from_numpy(published(x, k1, k2)).to(device)},
        bytes=4 * size * (dim + size),
        flops=size * size * dim,
        tolerance=1e-4,
    )


def ranking(device, queries, gallery, dim, k1, k2, mixed=0.3):
    """Re-ranking of a gallery as published with the method (Zhong et al. 2017)."""
    size = queries + gallery

    def make():
        rows = features_of(size, dim)
        rows = rows[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
        return [part.to(device) for part in (rows[:queries], rows[queries:])]

    def zhong(state):
        x = torch.cat(state)
        norms = (x * x).sum(dim=1)
        near = norms[:, None] + norms - 2 * (x @ x.T)
        near = (near / near.amax(dim=0)).T.cpu().numpy()
        rank = np.argsort(near, axis=1, kind="stable")[:, : k1 + 1]
        distance = dense_jaccard(
            rank, k1, k2, lambda i, members: np.exp(-near[i, members]), range(queries)
        )
        mix = (1 - mixed) * distance[:, queries:] + mixed * near[:queries, queries:]
        return torch.from_numpy(mix).to(device)

    return Case(
        op="rerank",
        size=f"Q={queries} G={gallery} D={dim} k1={k1} k2={k2}",
        device=device,
        make=make,
        ours=lambda state: ops.rerank(*state, k1, k2, mixed),
        baselines={"published: NumPy": zhong},
        bytes=4 * (size * dim + queries * gallery),
        flops=size * size * dim,
        tolerance=1e-3,
        needs={"published: NumPy": 20 * size**2},
    )


def dense_jaccard(rank, k1, k2, weigh, wanted):
    """The published way: weights, their means and distances as dense matrices, a loop over rows each."""
    size, half_columns = len(rank), round(k1 / 2) + 1

    def reciprocal(i, columns):
        forward = rank[i, :columns]
        return forward[(rank[forward, :columns] == i).any(axis=1)]

    near = [reciprocal(i, rank.shape[1]) for i in range(size)]
    half = [reciprocal(i, half_columns) for i in range(size)]
    weights = np.zeros((size, size), np.float32)
    for i in range(size):
        members = near[i]
        for j in near[i]:
            if len(np.intersect1d(half[j], near[i])) > 2 / 3 * len(half[j]):
                members = np.append(members, half[j])
        members = np.unique(members)
        raw = weigh(i, members)
        weights[i, members] = raw / raw.sum()
    weights = np.stack([weights[rank[i, :k2]].mean(axis=0) for i in range(size)])
    holders = [np.flatnonzero(weights[:, j]) for j in range(size)]
    distances = np.empty((len(wanted), size), np.float32)
    for i in wanted:
        shared = np.zeros(size, np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        distances[i] = 1 - shared / (2 - shared)
    return distances


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
