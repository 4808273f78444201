"""Contrastive loss against chosen bank rows, one query and one positive after another (SCL, ICE, GCL)."""

import numpy as np


def set_contrast(
    queries, bank, positives, negatives=None, *, weights=None, scale, denominator="joint"
):
    """(B,) or (Q, B) losses; float64."""
    loss, _ = _loss_and_gradient(queries, bank, positives, negatives, weights, scale, denominator)
    return loss


def set_contrast_gradient(
    queries, bank, positives, negatives=None, *, weights=None, scale, denominator="joint"
):
    """The gradient of each loss for its own query, of the shape of `queries`; float64."""
    _, grad = _loss_and_gradient(queries, bank, positives, negatives, weights, scale, denominator)
    return grad


def _loss_and_gradient(queries, bank, positives, negatives, weights, scale, denominator):
    queries, bank = np.asarray(queries, np.float64), np.asarray(bank, np.float64)
    loss, grad = np.zeros(queries.shape[:-1]), np.zeros(queries.shape)
    for query in np.ndindex(loss.shape):
        b = query[-1]
        chosen = [j for j, row in enumerate(positives[b]) if row >= 0]
        others = [] if negatives is None else [row for row in negatives[b] if row >= 0]
        for j in chosen:
            weight = 1 / len(chosen) if weights is None else _row(weights, b)[j]
            alone = [j] if denominator == "own" else chosen
            rows = bank[[*positives[b, alone], *others]]
            scores = scale * (rows @ queries[query])
            score = scale * (bank[positives[b, j]] @ queries[query])
            top = scores.max()
            exponentials = np.exp(scores - top)
            loss[query] += weight * (top + np.log(exponentials.sum()) - score)
            mean = exponentials @ rows / exponentials.sum()
            grad[query] += weight * scale * (mean - bank[positives[b, j]])
    return loss, grad


def _row(weights, b):
    return weights if np.ndim(weights) == 1 else weights[b]
