"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops.memory_update import memory_update_
from pyreid.ops.negative_mining import Mined, mine_negatives
from pyreid.ops.set_contrast import set_contrast

__all__ = ["Mined", "memory_update_", "mine_negatives", "set_contrast"]
