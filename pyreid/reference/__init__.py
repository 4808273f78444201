"""What each op computes, in plain NumPy: slow, and easy to check against the papers.

For tests and benchmarks. Every function is pure: it copies what it changes.
"""

from pyreid.reference.dbscan import cluster_overlap, dbscan, mean_smallest
from pyreid.reference.memory_update import memory_update
from pyreid.reference.negative_mining import mine_negatives

__all__ = ["cluster_overlap", "dbscan", "mean_smallest", "memory_update", "mine_negatives"]
