"""What supervised trainers compute at test time and in their losses, query by query and row by row. Written
from what they do; the tests of pyreid.compat hold ours against it."""

import collections

import numpy as np
import torch
import transcribed
from torch.nn import functional as F


def problem(queries=12, size=60, people=8, *, seed=0, dtype=np.float32):
    """Distances without ties, and ids as (q_pids, g_pids, q_camids, g_camids)."""
    rng = np.random.default_rng(seed)
    distance = rng.permutation(queries * size).reshape(queries, size).astype(dtype)
    ids = [rng.integers(0, people, n) for n in (queries, size)]
    cameras = [rng.integers(0, 3, n) for n in (queries, size)]
    return distance, (*ids, *cameras)


def matches(distance, q_pids, g_pids, q_camids, g_camids):
    """Of each query with a match: which ranks are its person's, and the persons, without its own camera's."""
    for row, person, camera in zip(distance, q_pids, q_camids, strict=True):
        order = np.argsort(row, kind="stable")
        order = order[(g_pids[order] != person) | (g_camids[order] != camera)]
        hits = g_pids[order] == person
        if hits.any():
            yield hits, g_pids[order]


def evaluated(distance, q_pids, g_pids, q_camids, g_camids, max_rank=50):
    """cmc, [AP], [INP]."""
    curves, aps, inps = [], [], []
    for hits, _ in matches(distance, q_pids, g_pids, q_camids, g_camids):
        found = hits.cumsum()
        curves.append(np.minimum(found, 1)[:max_rank])
        aps.append(np.mean((found / np.arange(1, len(hits) + 1))[hits]))
        last = np.flatnonzero(hits)[-1]
        inps.append(found[last] / (last + 1))
    length = min(max_rank, distance.shape[1])
    curves = [np.pad(curve, (0, length - len(curve)), constant_values=1) for curve in curves]
    return np.mean(curves, axis=0), aps, inps


def single_shot(distance, q_pids, g_pids, q_camids, g_camids, max_rank=50):
    """CMC where the gallery has one image per person, ten times over."""
    curves = []
    for hits, persons in matches(distance, q_pids, g_pids, q_camids, g_camids):
        images = collections.defaultdict(list)
        for place, person in enumerate(persons):
            images[person].append(place)
        curve = 0
        for _ in range(10):
            kept = np.zeros(len(hits), bool)
            for places in images.values():
                kept[np.random.choice(places)] = True
            curve = curve + np.minimum(hits[kept].cumsum(), 1)[:max_rank]
        curves.append(curve / 10)
    return np.mean(curves, axis=0)


def squared_distances(x, y):
    return ((x[:, None] - y) ** 2).sum(-1)


def strong_baseline_re_ranking(distance, queries, k1, k2, lambda_value):
    """(N, N) distances by the maximum of their column; sums in float32, where theirs are in float16."""
    near = (distance.astype(np.float64) / distance.max(axis=0)).T
    lists = np.argsort(near, axis=1, kind="stable")
    weights = transcribed.encoded(near, lists, k1 + 1, k1, k2)
    jaccard = transcribed.jaccard_of(weights, queries)
    mixed = jaccard * (1 - lambda_value) + near[:queries] * lambda_value
    return mixed[:, queries:]


def triplet_loss(inputs, targets, margin=0.3):
    """torchreid's."""
    distance = (inputs[:, None] - inputs).pow(2).sum(-1).clamp(min=1e-12).sqrt()
    farthest = [row[targets == own].max() for row, own in zip(distance, targets, strict=True)]
    nearest = [row[targets != own].min() for row, own in zip(distance, targets, strict=True)]
    return F.relu(torch.stack(farthest) - torch.stack(nearest) + margin).mean()


def mined(distance, positive, negative):
    """(N,) farthest of the positives, nearest of the negatives, and their columns."""
    farthest = [
        max((j for j in np.flatnonzero(p)), key=lambda j, row=row: row[j])
        for row, p in zip(distance.tolist(), positive, strict=True)
    ]
    nearest = [
        min((j for j in np.flatnonzero(n)), key=lambda j, row=row: row[j])
        for row, n in zip(distance.tolist(), negative, strict=True)
    ]
    rows = torch.arange(len(distance))
    return distance[rows, farthest], distance[rows, nearest], farthest, nearest


class MoCoMemory:
    """fast-reid's, as a plain list of columns; gradients by autograd through every pair."""

    def __init__(self, queue, labels):
        self.queue, self.labels, self.begin = queue.clone(), labels.clone(), 0

    def __call__(self, features, targets, margin=0.25, gamma=32):
        features = F.normalize(features, dim=1)
        for feature, target in zip(features.detach(), targets, strict=True):
            self.queue[:, self.begin], self.labels[self.begin] = feature, target
            self.begin = (self.begin + 1) % len(self.labels)
        losses = []
        for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
            products = feature @ self.queue
            same = self.labels == target
            others = same.clone()
            others[i] = False
            if not others.any() or same.all():
                losses.append(0 * products.sum())
                continue
            far = torch.logsumexp(-gamma * products[others], 0)
            near = torch.logsumexp(gamma * (products[~same] + margin), 0)
            losses.append(F.softplus(far + near))
        return torch.stack(losses).mean()


def same_loss(ours, theirs, *inputs, rtol=1e-4, atol=1e-5):
    """Values and gradients of two losses of the same tensors."""
    found = []
    for loss in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        value.backward()
        found.append((value.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
