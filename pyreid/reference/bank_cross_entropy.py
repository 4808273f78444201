"""Softmax cross entropy against a memory bank (Cluster Contrast, ICE; SpCL; JVTC)."""

import numpy as np


def bank_cross_entropy(
    queries, bank, targets, *, scale, labels=None, reduce="row", label_smoothing=0.0, gradients=None
):
    """(B,) losses in float64; with `gradients` (B,), of the losses, also those of the queries (B, D)."""
    queries, bank = np.asarray(queries, np.float64), np.asarray(bank, np.float64)
    columns, wanted = bank, np.asarray(targets)[:, None] == np.arange(len(bank))
    if reduce == "cluster_mean":
        present = np.unique(labels[labels >= 0])
        columns = np.stack([bank[labels == label].mean(axis=0) for label in present])
        wanted = np.asarray(targets)[:, None] == present
    elif reduce == "label_uniform":
        wanted = (np.asarray(targets)[:, None] == labels) & (labels >= 0)
    elif reduce != "row":
        raise ValueError(reduce)

    logits = scale * queries @ columns.T
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    target = (1 - label_smoothing) * wanted / wanted.sum(axis=1, keepdims=True)
    target = target + label_smoothing / len(columns)
    losses = -(target * log_softmax).sum(axis=1)
    if gradients is None:
        return losses
    return losses, scale * gradients[:, None] * (np.exp(log_softmax) - target) @ columns
