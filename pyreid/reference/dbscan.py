"""DBSCAN (Ester et al., 1996) as scikit-learn runs it, SpCL's overlap of clusters, GCL's rule for eps."""

import numpy as np


def dbscan(distance, eps, min_samples=4):
    """(N,) labels from (N, N) distances, infinite where nothing is known."""
    neighbours = [np.flatnonzero(row <= eps) for row in distance]
    core = np.array([len(n) >= min_samples for n in neighbours], bool)
    labels = np.full(len(distance), -1)
    label = 0
    for seed in np.flatnonzero(core):
        if labels[seed] >= 0:
            continue
        stack = [seed]
        while stack:
            i = stack.pop()
            if labels[i] < 0:
                labels[i] = label
                if core[i]:
                    stack.extend(j for j in neighbours[i] if labels[j] < 0)
        label += 1
    return labels


def cluster_overlap(a, b):
    """(N,) members of both clusters of a sample, of the first, and of the second."""
    singles = np.eye(len(a), dtype=bool)
    same_a, same_b = ((x[:, None] == x) & (x[:, None] >= 0) | singles for x in (a, b))
    return (same_a & same_b).sum(1), same_a.sum(1), same_b.sum(1)


def mean_smallest(distance, fraction):
    """Mean of the smallest part of the non-zero distances above the diagonal of (N, N) ones."""
    above = np.triu(np.asarray(distance, np.float64), 1)
    above = np.sort(above[np.nonzero(above)])
    return above[: np.round(fraction * above.size).astype(int)].mean()
