"""dbscan, cluster_overlap and mean_smallest on graphs like those of person re-identification."""

import functools
from types import SimpleNamespace

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import DBSCAN
from sklearn.metrics.cluster import contingency_matrix

from pyreid import ops, reference

from . import peers
from .timing import Case, Growth, pytest_benchmark, sizes

LEVELS = [0.58, 0.6, 0.62]  # SpCL's


def cases(device, quick=False):
    yield search(device, 12936, LEVELS)
    yield search(device, 12936, [0.6])
    yield dense_search(device, 3000)
    yield overlap(device, 12936, verified=True)
    yield rule(device, 12936)
    yield dense_rule(device, 3000)
    for size in sizes(quick):
        yield search(device, size, [0.6], Growth("26 neighbours, 1 eps", size, 1, 1))
        yield overlap(device, size, growth=Growth("labels", size, time=1, memory=1))
        yield rule(device, size, Growth("26 neighbours", size, time=1, memory=0))
    if not quick:
        yield search(device, 100_000, LEVELS)


@functools.lru_cache(maxsize=2)
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
    pairs = np.minimum(rows, columns) * samples + np.maximum(rows, columns)
    pairs, kept = np.unique(pairs, return_index=True)
    low, high = np.divmod(pairs, samples)
    values = np.where(low == high, 0, np.minimum(values[kept], 0.999)).astype(np.float32)
    once, own = low != high, np.setdiff1d(np.arange(samples), low[low == high])
    rows = np.concatenate([low, high[once], own])  # each row is near itself, too
    columns = np.concatenate([high, low[once], own])
    values = np.concatenate([values, values[once], np.zeros(len(own), np.float32)])
    order = np.argsort(rows * samples + columns)
    starts = np.concatenate([[0], np.bincount(rows, minlength=samples).cumsum()])
    return scipy.sparse.csr_matrix(
        (values[order], columns[order].astype(np.int32), starts.astype(np.int32)),
        shape=(samples, samples),
    )


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


def search(device, samples, levels, growth=None):
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
        growth=growth,
        headline=growth is None,
    )


def dense_search(device, samples):
    distance = matrix_of(samples)

    def baseline(state):
        return torch.from_numpy(scikit_learn(distance, LEVELS)).to(device)

    def rapids(state):
        """Clusters only: a sample near two of them may be in either."""
        import cuml

        found = [
            cuml.DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit_predict(distance)
            for eps in LEVELS
        ]
        return torch.as_tensor(np.stack(found), device=device)

    return Case(
        op="dbscan",
        size=f"N={samples} dense, {len(LEVELS)} eps",
        device=device,
        make=lambda: torch.tensor(distance, device=device),
        ours=lambda state: ops.dbscan(state, LEVELS),
        baselines={"scikit-learn": baseline},
        bounds={"cuML": rapids} if device == "cuda" and peers.are_here("cuML") else {},
        bytes=4 * samples**2,
    )


def matrix_of(samples):
    """Dense, with 1 where the graph holds nothing."""
    matrix = graph(samples)
    distance = np.ones(matrix.shape, np.float32)
    rows = np.repeat(np.arange(samples), np.diff(matrix.indptr))
    distance[rows, matrix.indices] = matrix.data
    return distance


def overlap(device, samples, *, verified=False, growth=None):
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

    def scikit_learn(state):
        """Its table of how many samples each pair of labels has, looked up."""
        a, b = (alone(x).cpu().numpy() for x in state)
        table = contingency_matrix(a, b, sparse=True, dtype=np.int64).tocsr()
        rows, columns = (np.unique(x, return_inverse=True)[1] for x in (a, b))
        sums = [np.asarray(table.sum(axis)).ravel() for axis in (1, 0)]
        counts = np.asarray(table[rows, columns]).ravel(), sums[0][rows], sums[1][columns]
        return [torch.from_numpy(x).to(device) for x in counts]

    def tables(state):
        counts = reference.cluster_overlap(*(labels.cpu().numpy() for labels in state))
        return [torch.from_numpy(x).to(device) for x in counts]

    return Case(
        op="cluster_overlap",
        size=f"N={samples}",
        device=device,
        make=make,
        ours=lambda state: list(ops.cluster_overlap(*state)),
        baselines={"torch.unique": sorting, "scikit-learn": scikit_learn}
        | ({"N x N tables": tables} if verified else {}),
        bytes=5 * 8 * samples,
        growth=growth,
        headline=growth is None,
    )


FRACTION = 1.6e-3  # of GCL, JVTC and MMT


def rule(device, samples, growth=None):
    """What the graph says, against selecting from what is stored of it."""
    matrix = graph(samples)
    fraction = 4 / samples  # within what these graphs store
    count = round(fraction * (samples * (samples - 1) // 2))

    def sorting(state):
        above = np.sort(scipy.sparse.triu(matrix, 1).data)
        return torch.tensor(above[above != 0][:count].mean(dtype="d"))

    def partition(state):
        above = scipy.sparse.triu(matrix, 1).data
        above = np.partition(above[above != 0], count - 1)
        return torch.tensor(above[:count].mean(dtype="d"))

    return Case(
        op="mean_smallest",
        size=f"N={samples} {matrix.nnz / samples:.0f} neighbours",
        device=device,
        make=lambda: on_device(matrix, device),
        ours=lambda state: torch.tensor(ops.mean_smallest(state, fraction), dtype=torch.float64),
        baselines={"NumPy partition": partition, "NumPy sort": sorting},
        bytes=12 * matrix.nnz,
        growth=growth,
        headline=growth is None,
    )


def dense_rule(device, samples):
    distance = matrix_of(samples)

    def upper():
        above = np.triu(distance, 1)
        return above[above != 0]

    def sorting(state):
        above = np.sort(upper())
        return torch.tensor(above[: round(FRACTION * above.size)].mean(dtype="d"))

    def partition(state):
        above = upper()
        count = round(FRACTION * above.size)
        return torch.tensor(np.partition(above, count - 1)[:count].mean(dtype="d"))

    return Case(
        op="mean_smallest",
        size=f"N={samples} dense",
        device=device,
        make=lambda: torch.tensor(distance, device=device),
        ours=lambda state: torch.tensor(ops.mean_smallest(state, FRACTION), dtype=torch.float64),
        baselines={"NumPy triu + partition": partition, "NumPy triu + sort": sorting},
        bytes=2 * samples**2,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
