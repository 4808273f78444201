"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops.memory_update import memory_update_
from pyreid.ops.negative_mining import Mined, mine_negatives
from pyreid.ops.ranking import Ranking, evaluate_ranking

__all__ = ["Mined", "Ranking", "evaluate_ranking", "memory_update_", "mine_negatives"]
