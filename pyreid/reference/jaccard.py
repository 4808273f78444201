"""Jaccard distance of k-reciprocal neighbour sets (Zhong et al. 2017) and its variants: dense matrices and
loops over rows, as they were published. Neighbour lists are rows of ids, best first, -1 where there is none.
"""

import numpy as np


def knn(features, k, *, queries=None):
    """(B, k) scores and rows by dot product; -inf and -1 where there are fewer than k rows."""
    features = np.asarray(features, np.float64)
    queries = features if queries is None else np.asarray(queries, np.float64)
    dots = queries @ features.T
    order = np.argsort(-dots, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, max(k - len(features), 0)))
    scores = np.take_along_axis(dots, order, axis=1)
    return (
        np.pad(scores, missing, constant_values=-np.inf),
        np.pad(order, missing, constant_values=-1),
    )


def jaccard_distance(features, k1=30, k2=6, *, variant="spcl", ranks=None, **cameras_and_ks):
    """(N, N) float32."""
    near = distances(features, variant)
    weights, clip = _encode(near, k1, k2, variant, ranks, **cameras_and_ks)
    return _jaccard(weights, range(len(weights)), clip)


def rerank(queries, gallery=None, k1=20, k2=6, lambda_value=0.3, *, variant="zhong", ranks=None):
    """(Q, G) float32: (1 - lambda) Jaccard + lambda distance, over queries and gallery together."""
    union = queries if gallery is None else np.concatenate([queries, gallery])
    near = distances(union, variant)
    weights, clip = _encode(near, k1, k2, variant, ranks)
    jaccard = _jaccard(weights, range(len(queries)), clip)
    mixed = (1 - lambda_value) * jaccard + lambda_value * near[: len(queries)]
    return mixed[:, 0 if gallery is None else len(queries) :].astype(np.float32)


def rerank_distances(
    query_gallery,
    query_query=None,
    gallery_gallery=None,
    k1=20,
    k2=6,
    lambda_value=0.3,
    *,
    variant="zhong",
):
    """(Q, G) float32 from distances that are there; or (N, N) from the first alone."""
    given, count = np.asarray(query_gallery, np.float32), 0
    if query_query is not None:
        count = len(given)
        given = np.block([[query_query, given], [given.T, gallery_gallery]]).astype(np.float32)
    near = normalized(given**2 if variant == "zhong" else given, variant)
    ranks = np.argsort(near, axis=1, kind="stable")
    weights, clip = _encode(near, k1, k2, variant, ranks)
    jaccard = _jaccard(weights, range(len(query_gallery)), clip)
    mixed = (1 - lambda_value) * jaccard + lambda_value * near[: len(query_gallery)]
    return mixed[:, count:].astype(np.float32)


def reciprocal_sets(ranks, k1, variant="spcl"):
    """R* of every row, ascending ids: reciprocal neighbours, and those of neighbours whose half-size sets lie
    in R by more than two thirds."""
    columns = k1 + (variant not in ("spcl", "openunreid"))
    half = int(np.around(k1 / 2)) + 1
    sets = []
    for i in range(len(ranks)):
        members = reciprocal(ranks, i, columns)
        expanded = members
        for j in members:
            near = reciprocal(ranks, j, half)
            if 3 * len(np.intersect1d(near, members)) > 2 * len(near):
                expanded = np.append(expanded, near)
        sets.append(np.unique(expanded))
    return sets


def reciprocal(ranks, i, columns):
    """Those of the first `columns` neighbours of row i that have i among theirs."""
    return np.array([j for j in ranks[i, :columns] if j >= 0 and i in ranks[j, :columns]], int)


def distances(features, variant):
    """(N, N), rows: what lists are sorted by and weights are made of."""
    features = np.asarray(features, np.float64)
    dots = features @ features.T
    if variant in ("spcl", "ca-jaccard"):
        return 2 - 2 * dots
    norms = np.diag(dots)
    squared = np.maximum(norms[:, None] + norms - 2 * dots, 0)
    if variant == "openunreid":
        return squared
    return normalized(squared, variant)


def normalized(given, variant):
    """(N, N): distances within what their columns hold, transposed."""
    if not len(given):
        return given
    low = given.min(axis=0) if variant == "jvtc" else 0
    span = given.max(axis=0) - low
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(span > 0, (given - low) / span, given.dtype.type(0)).T


def camera_ranks(near, cameras):
    """Lists of each row's own camera first, and of the other cameras first."""
    same = cameras[:, None] == cameras
    return [np.argsort(near + 999.0 * mask, axis=1, kind="stable") for mask in (~same, same)]


def _encode(near, k1, k2, variant, ranks, cameras=None, intra_k=(5, 2), inter_k=(20, 4)):
    """(N, N) weights, query expansion included, and whether Jaccard distances are clipped at 0."""
    dtype = np.float16 if variant in ("jvtc", "strong-baseline") else np.float32
    if variant == "ca-jaccard":
        intra, inter = camera_ranks(near, cameras)
        sets = [
            np.union1d(reciprocal(intra, i, intra_k[0] + 1), reciprocal(inter, i, inter_k[0] + 1))
            for i in range(len(near))
        ]
        expansion = np.concatenate([intra[:, : intra_k[1]], inter[:, : inter_k[1]]], axis=1)
    else:
        if ranks is None:
            ranks = np.argsort(near, axis=1, kind="stable")
        if variant in ("spcl", "openunreid"):
            ranks = ranks[:, :k1]  # these ask for no more neighbours
        sets = reciprocal_sets(ranks, k1, variant)
        expansion = ranks[:, :k2]
    weights = np.zeros(near.shape, dtype)
    for i, members in enumerate(sets):
        if len(members):
            raw = np.exp(-(near[i, members] - near[i, members].min()).astype(np.float32))
            weights[i, members] = raw / raw.sum()
    if k2 != 1 or variant == "ca-jaccard":
        lists = [row[row >= 0] for row in expansion]
        sums = [weights[row].sum(axis=0, dtype=np.float32) / max(len(row), 1) for row in lists]
        weights = np.array(sums, dtype).reshape(near.shape)
    return weights, variant not in ("zhong", "strong-baseline")


def _jaccard(weights, rows, clip):
    holders = [np.flatnonzero(column) for column in weights.T]
    result = np.ones((len(rows), len(weights)), np.float32)
    for i in rows:
        shared = np.zeros(len(weights), weights.dtype)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        result[i] = 1 - shared / (2 - shared)
    return np.maximum(result, 0) if clip else result
