"""dbscan, cluster_overlap and mean_smallest on graphs like those of person re-identification."""

from types import SimpleNamespace

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import DBSCAN

from pyreid import ops, reference

from .timing import Case, pytest_benchmark

LEVELS = [0.58, 0.6, 0.62]  # SpCL's


def cases(device, quick=False):
    yield search(device, 12936, LEVELS)
    yield search(device, 12936, [0.6])
    yield dense_search(device, 3000)
    yield overlap(device, 12936, verified=True)
    yield rule(device, 12936)
    yield dense_rule(device, 3000)
    if not quick:
        yield search(device, 100_000, LEVELS)
        yield search(device, 100_000, [0.6])
        yield overlap(device, 100_000)
        if device == "cuda":
            yield search(device, 1_000_000, [0.6])


def graph(samples, identities=17, neighbours=30):
    """Jaccard-like: `identities` images of a person near one another, the rest of a row anybody, far."""
    rng = np.random.default_rng(0)
    person = rng.permutation(samples) // identities
    order = np.argsort(person)
    rank = np.empty(samples, np.int64)
    rank[order] = np.arange(samples)
    mates = order[
        (rank[:, None] + rng.integers(1, identities, (samples, neighbours // 3))) % samples
    ]
    others = rng.integers(0, samples, (samples, neighbours // 6))
    rows = np.repeat(np.arange(samples), mates.shape[1] + others.shape[1])
    columns = np.concatenate([mates, others], axis=1).ravel()
    close = person[rows] == person[columns]
    values = np.where(close, rng.beta(6, 5, len(rows)), 1 - 0.3 * rng.random(len(rows)) ** 2)
    upper = scipy.sparse.coo_matrix((values, (rows, columns)), shape=(samples, samples)).tocsr()
    matrix = upper.maximum(upper.T)
    matrix.data = np.minimum(matrix.data, 0.999)
    matrix.setdiag(0)
    matrix = matrix.astype(np.float32)
    matrix.sort_indices()
    return matrix


def on_device(matrix, device):
    parts = {
        "indptr": torch.tensor(matrix.indptr, dtype=torch.int64),
        "indices": torch.tensor(matrix.indices, dtype=torch.int64),
        "distances": torch.tensor(matrix.data),
    }
    parts = {name: part.to(device) for name, part in parts.items()}
    return SimpleNamespace(**parts, shape=matrix.shape)


def scikit_learn(matrix, levels):
    return np.stack([
        DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit(matrix).labels_ for eps in levels
    ])  # fmt: skip


def search(device, samples, levels):
    matrix = graph(samples)
    entries = matrix.nnz

    def baseline(state):
        return torch.from_numpy(scikit_learn(matrix, levels)).to(device)

    return Case(
        op="dbscan",
        size=f"N={samples} {entries / samples:.0f} neighbours, {len(levels)} eps",
        device=device,
        make=lambda: on_device(matrix, device),
        ours=lambda state: ops.dbscan(state, levels),
        baselines={"scikit-learn": baseline},
        bytes=12 * entries + 8 * samples * (1 + len(levels)),
    )


def dense_search(device, samples):
    distance = matrix_of(samples)

    def baseline(state):
        return torch.from_numpy(scikit_learn(distance, LEVELS)).to(device)

    return Case(
        op="dbscan",
        size=f"N={samples} dense, {len(LEVELS)} eps",
        device=device,
        make=lambda: torch.tensor(distance, device=device),
        ours=lambda state: ops.dbscan(state, LEVELS),
        baselines={"scikit-learn": baseline},
        bytes=4 * samples**2,
    )


def matrix_of(samples):
    """Dense, with 1 where the graph holds nothing."""
    matrix = graph(samples)
    distance = np.ones(matrix.shape, np.float32)
    rows = np.repeat(np.arange(samples), np.diff(matrix.indptr))
    distance[rows, matrix.indices] = matrix.data
    return distance


def overlap(device, samples, *, verified=False):
    def make():
        found = ops.dbscan(graph(samples), LEVELS[:2])
        return [torch.from_numpy(labels).to(device) for labels in found]

    def sorting(state):
        a, b = (alone(x) for x in state)
        pair = a * (2 * samples) + b
        return [
            torch.unique(x, return_inverse=True, return_counts=True)[2][
                torch.unique(x, return_inverse=True)[1]
            ]
            for x in (pair, a, b)
        ]

    def alone(labels):
        index = torch.arange(samples, device=labels.device)
        return torch.where(labels < 0, samples + index, labels)

    def tables(state):
        counts = reference.cluster_overlap(*(labels.cpu().numpy() for labels in state))
        return [torch.from_numpy(x).to(device) for x in counts]

    return Case(
        op="cluster_overlap",
        size=f"N={samples}",
        device=device,
        make=make,
        ours=lambda state: list(ops.cluster_overlap(*state)),
        baselines={"torch.unique": sorting} | ({"N x N tables": tables} if verified else {}),
        bytes=5 * 8 * samples,
    )


FRACTION = 1.6e-3  # of GCL, JVTC and MMT


def sorted_rule(above):
    above = np.sort(above[above != 0])
    return torch.tensor(above[: round(FRACTION * above.size)].mean(dtype=np.float64))


def rule(device, samples):
    """What the graph says, against sorting what is stored of it."""
    matrix = graph(samples)
    fraction = 4 / samples  # within what these graphs store

    def sorting(state):
        above = np.sort(scipy.sparse.triu(matrix, 1).data)
        above = above[above != 0]
        return torch.tensor(
            above[: round(fraction * (samples * (samples - 1) // 2))].mean(dtype="d")
        )

    return Case(
        op="mean_smallest",
        size=f"N={samples} {matrix.nnz / samples:.0f} neighbours",
        device=device,
        make=lambda: on_device(matrix, device),
        ours=lambda state: torch.tensor(ops.mean_smallest(state, fraction), dtype=torch.float64),
        baselines={"sort the stored": sorting},
        bytes=12 * matrix.nnz,
    )


def dense_rule(device, samples):
    distance = matrix_of(samples)

    def sorting(state):
        return sorted_rule(np.triu(distance, 1))

    return Case(
        op="mean_smallest",
        size=f"N={samples} dense",
        device=device,
        make=lambda: torch.tensor(distance, device=device),
        ours=lambda state: torch.tensor(ops.mean_smallest(state, FRACTION), dtype=torch.float64),
        baselines={"triu + sort": sorting},
        bytes=2 * samples**2,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
