"""Random positives and negatives from a memory bank."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from pyreid import _native
from pyreid.ops import _torch

Array = TypeVar("Array")
_OP = "sample_rows"


def sample_rows(
    groups: Array,
    targets: Array,
    *,
    positives: int,
    negatives: int,
    seed: int,
    exclude_self: Array | None = None,
) -> tuple[Array, Array]:
    """Bank rows drawn uniformly from each sample's group, and from all other groups.

    Args:
        groups: (N,) int64 or int32, the group of each bank row. A negative group equals nothing:
            its rows are nobody's positives, and everybody's candidates for negatives.
        targets: (B,) int64 or int32, the group of each sample.
        positives, negatives: P and K, how many to draw for each sample.
        seed: in [0, 2**64). One seed draws the same rows on every device; a trainer passes another
            in every iteration. A CUDA graph draws, whenever it is replayed, what it drew when it
            was captured.
        exclude_self: (B,) int64 or int32, a bank row that each sample does not draw (its own), or
            None. A row out of range is a ValueError on the CPU; on CUDA nothing is excluded (an
            error under `pyreid.debug()`).

    Returns:
        (B, P) and (B, K) int64 bank rows. Without replacement; where there are fewer rows than
        wanted, all in random order, again and again in that order. Where a group has no row but the
        excluded one, that row; where there is no row at all, -1.
    """
    if _torch.dispatched(groups):
        # torch's integers have a sign: the seed travels in two halves.
        return _sample_registered(
            groups, targets, exclude_self, positives, negatives, seed >> 32, seed & 0xFFFFFFFF
        )
    return _sample(groups, targets, exclude_self, positives, negatives, seed)


def _sample(
    groups: Any, targets: Any, exclude_self: Any, positives: int, negatives: int, seed: int
) -> tuple[Any, Any]:
    module, stream = _native.floor(groups)
    if exclude_self is not None:
        _native.check_range(_OP, "exclude_self", exclude_self, 0, len(groups), closed=False)
    return module.row_sampling(
        groups,
        targets,
        exclude_self,
        positives,
        negatives,
        seed,
        _native.allocator(groups),
        _native.scratch(groups),
        stream,
    )


def _sample_tensors(
    groups: torch.Tensor,
    targets: torch.Tensor,
    exclude_self: torch.Tensor | None,
    positives: int,
    negatives: int,
    seed_high: int,
    seed_low: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    seed = seed_high << 32 | seed_low
    return _sample(groups, targets, exclude_self, positives, negatives, seed)


def _sample_fake(groups, targets, exclude_self, positives, negatives, seed_high, seed_low):
    batch = targets.shape[0]
    return tuple(
        groups.new_empty((batch, count), dtype=torch.int64) for count in (positives, negatives)
    )


_sample_registered = _torch.register(_sample_tensors, name="sample_rows", fake=_sample_fake)
