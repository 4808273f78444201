"""Hard negatives by sorting whole rows of similarities, as trainers do."""

import numpy as np


def mine_negatives(
    queries,
    bank,
    k,
    *,
    skip=0,
    self_rows=None,
    query_groups=None,
    bank_groups=None,
    query_cameras=None,
    bank_cameras=None,
    camera_penalty=0.0,
):
    """(B, k) scores and rows."""
    scores = np.full((len(queries), k), -np.inf)
    rows = np.full((len(queries), k), -1)
    for i, query in enumerate(np.asarray(queries, np.float64)):
        score = np.asarray(bank, np.float64) @ query
        allowed = np.ones(len(bank), bool)
        if query_cameras is not None:
            score = score - camera_penalty * (bank_cameras == query_cameras[i])
        if self_rows is not None and 0 <= self_rows[i] < len(bank):
            allowed[self_rows[i]] = False
        if query_groups is not None and query_groups[i] >= 0:
            allowed &= bank_groups != query_groups[i]
        order = [row for row in np.argsort(-score, kind="stable") if allowed[row]][skip : skip + k]
        scores[i, : len(order)] = score[order]
        rows[i, : len(order)] = order
    return scores, rows
