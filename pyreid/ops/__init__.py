"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops._graph import Graph
from pyreid.ops.jaccard import Neighbours, jaccard_distance, jaccard_graph, knn, rerank
from pyreid.ops.memory_update import memory_update_
from pyreid.ops.negative_mining import Mined, mine_negatives

__all__ = [
    "Graph",
    "Mined",
    "Neighbours",
    "jaccard_distance",
    "jaccard_graph",
    "knn",
    "memory_update_",
    "mine_negatives",
    "rerank",
]
