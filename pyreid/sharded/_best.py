"""The best of what several searches found."""

from __future__ import annotations

import torch

from pyreid import _native

_QUERIES = 8192  # whose candidates are held at a time


def best_of(
    scores: torch.Tensor, rows: torch.Tensor, keep: int, skip: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, keep - skip) scores and rows of ranks `skip`, ..., `keep` - 1 among (B, C) candidates, best first.

    Of two candidates with one score the first wins: lists stand side by side in the order of their rows.
    Where there are fewer, -inf and -1.
    """
    module, stream = _native.floor(scores)
    found = (
        _native.empty(scores, (len(scores), keep - skip), "float32"),
        _native.empty(scores, (len(scores), keep - skip), "int64"),
    )
    for first in range(0, len(scores), _QUERIES):
        some = slice(first, first + _QUERIES)
        batch = len(scores[some])
        state = (
            _native.empty(scores, (batch, keep + max(keep, 1024)), "int64"),
            _native.empty(scores, (batch,), "int64"),
            _native.empty(scores, (batch,), "int32"),
        )
        given = scores[some].contiguous()
        module.mine_panel(given, 0, None, None, None, None, None, 0.0, *state, keep, stream)
        module.mine_finish(*state, keep, skip, *(part[some] for part in found), stream)
    places = found[1]
    return found[0], torch.where(places < 0, -1, rows.gather(1, places.clamp(min=0)))
