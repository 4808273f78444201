"""Momentum update of a memory bank, one event after another (SpCL, Cluster Contrast, SCL, GCL, JVTC)."""

import numpy as np


def memory_update(bank, features, rows, *, momentum, repeats="sequential", parts=1, normalize=True):
    """(N, D) bank after the events; float64 inside, one rounding at the end."""
    old = np.asarray(bank, np.float64)
    features = np.asarray(features, np.float64)
    momenta = np.broadcast_to(np.asarray(momentum, np.float64), len(rows))
    new = old.copy()

    def moved(row, e):
        return momenta[e] * row + (1 - momenta[e]) * features[e]

    def normalized(row):
        return _normalized(row, parts) if normalize else row

    for r in dict.fromkeys(rows.tolist()):
        events = np.flatnonzero(rows == r)
        if repeats == "sequential":
            for e in events:
                new[r] = normalized(moved(new[r], e))
        elif repeats == "last":
            new[r] = normalized(moved(old[r], events[-1]))
        elif repeats == "hardest":
            new[r] = normalized(moved(old[r], events[np.argmin(features[events] @ old[r])]))
        elif repeats == "mean":
            new[r] = normalized(np.mean([moved(old[r], e) for e in events], axis=0))
        else:
            raise ValueError(repeats)
    return new.astype(bank.dtype)


def _normalized(row, parts):
    chunks = np.split(row, parts if isinstance(parts, int) else np.cumsum(parts)[:-1])
    return np.concatenate([chunk / max(np.linalg.norm(chunk), 1e-12) for chunk in chunks])
