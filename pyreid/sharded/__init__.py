"""Banks, neighbours and labels for more rows than one GPU holds, over the processes of torch.distributed.

Each process has its own rows; the results are those of one process that has all. docs/many-gpus.md says what
travels, and what it takes.
"""

from pyreid.sharded._bank import ShardedMemoryBank
from pyreid.sharded._graph import ShardedGraph, jaccard_graph, knn
from pyreid.sharded._labels import dbscan, pseudo_labels

__all__ = [
    "ShardedGraph",
    "ShardedMemoryBank",
    "dbscan",
    "jaccard_graph",
    "knn",
    "pseudo_labels",
]
