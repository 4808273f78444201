"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops._graph import Graph
from pyreid.ops._labels import LabelStats, pseudo_labels
from pyreid.ops.bank_cross_entropy import bank_cross_entropy
from pyreid.ops.class_means import Means, class_means
from pyreid.ops.dbscan import Overlap, cluster_overlap, dbscan, mean_smallest
from pyreid.ops.jaccard import (
    Neighbours,
    jaccard_distance,
    jaccard_graph,
    knn,
    rerank,
    rerank_distances,
)
from pyreid.ops.joint_distance import joint_distance, time_histogram
from pyreid.ops.memory_update import memory_update_
from pyreid.ops.negative_mining import Mined, mine_negatives
from pyreid.ops.ranking import Ranking, evaluate_ranking
from pyreid.ops.row_sampling import sample_rows
from pyreid.ops.set_contrast import set_contrast

__all__ = [
    "Graph",
    "LabelStats",
    "Means",
    "Mined",
    "Neighbours",
    "Overlap",
    "Ranking",
    "bank_cross_entropy",
    "class_means",
    "cluster_overlap",
    "dbscan",
    "evaluate_ranking",
    "jaccard_distance",
    "jaccard_graph",
    "joint_distance",
    "knn",
    "mean_smallest",
    "memory_update_",
    "mine_negatives",
    "pseudo_labels",
    "rerank",
    "rerank_distances",
    "sample_rows",
    "set_contrast",
    "time_histogram",
]
