"""The ops. Each takes torch tensors, CuPy or NumPy arrays, and returns what it was given."""

from pyreid.ops.memory_update import memory_update_

__all__ = ["memory_update_"]
