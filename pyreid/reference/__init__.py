"""What each op computes, in plain NumPy: slow, and easy to check against the papers.

For tests and benchmarks. Every function is pure: it copies what it changes.
"""

from pyreid.reference.bank_cross_entropy import bank_cross_entropy
from pyreid.reference.class_means import class_means
from pyreid.reference.dbscan import cluster_overlap, dbscan, mean_smallest
from pyreid.reference.jaccard import (
    distances,
    jaccard_distance,
    knn,
    reciprocal_sets,
    rerank,
    rerank_distances,
)
from pyreid.reference.joint_distance import joint_distance, time_histogram
from pyreid.reference.memory_update import memory_update
from pyreid.reference.negative_mining import mine_negatives
from pyreid.reference.ranking import evaluate_ranking
from pyreid.reference.row_sampling import sample_rows
from pyreid.reference.set_contrast import set_contrast, set_contrast_gradient

__all__ = [
    "bank_cross_entropy",
    "class_means",
    "cluster_overlap",
    "dbscan",
    "distances",
    "evaluate_ranking",
    "jaccard_distance",
    "joint_distance",
    "knn",
    "mean_smallest",
    "memory_update",
    "mine_negatives",
    "reciprocal_sets",
    "rerank",
    "rerank_distances",
    "sample_rows",
    "set_contrast",
    "set_contrast_gradient",
    "time_histogram",
]
