"""What each op computes, in plain NumPy: slow, and easy to check against the papers.

For tests and benchmarks. Every function is pure: it copies what it changes.
"""

from pyreid.reference.jaccard import (
    distances,
    jaccard_distance,
    knn,
    reciprocal_sets,
    rerank,
)
from pyreid.reference.memory_update import memory_update
from pyreid.reference.negative_mining import mine_negatives

__all__ = [
    "distances",
    "jaccard_distance",
    "knn",
    "memory_update",
    "mine_negatives",
    "reciprocal_sets",
    "rerank",
]
