"""CMC, mAP and mINP of retrieval by one query image: each query's ranking in full, as evaluators do."""

import numpy as np


def evaluate_ranking(
    queries,
    gallery,
    *,
    query_ids,
    gallery_ids,
    query_cameras,
    gallery_cameras,
    distance=None,
    max_rank=50,
):
    """cmc (max_rank,), mAP, mINP, ap (Q,), valid (Q,)."""
    if distance is None:
        distance = -np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
    cmc, ap, inp = np.zeros(max_rank), np.zeros(len(query_ids)), np.zeros(len(query_ids))
    valid = np.zeros(len(query_ids), bool)
    for i, (query_id, camera) in enumerate(zip(query_ids, query_cameras, strict=True)):
        order = np.argsort(distance[i], kind="stable")
        same_view = (gallery_ids == query_id) & (gallery_cameras == camera)
        kept = order[(~same_view & (gallery_ids >= 0))[order]]
        matches = gallery_ids[kept] == query_id
        if not matches.any():
            continue
        valid[i] = True
        positions = np.flatnonzero(matches) + 1
        cmc[positions[0] - 1 :] += 1
        ap[i] = np.mean(np.arange(1, len(positions) + 1) / positions)
        inp[i] = len(positions) / positions[-1]
    if not valid.any():
        return np.full(max_rank, np.nan), np.nan, np.nan, ap, valid
    return cmc / valid.sum(), ap[valid].mean(), inp[valid].mean(), ap, valid
