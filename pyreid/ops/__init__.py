"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops.dbscan import Overlap, cluster_overlap, dbscan, mean_smallest
from pyreid.ops.memory_update import memory_update_
from pyreid.ops.negative_mining import Mined, mine_negatives

__all__ = [
    "Mined",
    "Overlap",
    "cluster_overlap",
    "dbscan",
    "mean_smallest",
    "memory_update_",
    "mine_negatives",
]
