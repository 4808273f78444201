"""The rows of a bank that are hardest to tell from each query, without those that are no negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _panels, _torch


class Mined(NamedTuple):
    """What `mine_negatives` found, best first."""

    scores: Any  # (B, k) float32, -inf where nothing qualified any more
    rows: Any  # (B, k) int64, -1 there


def mine_negatives(
    queries: Array,
    bank: Array,
    k: int,
    *,
    skip: int = 0,
    self_rows: Array | None = None,
    query_groups: Array | None = None,
    bank_groups: Array | None = None,
    query_cameras: Array | None = None,
    bank_cameras: Array | None = None,
    camera_penalty: float = 0.0,
    precision: str = "exact",
) -> Mined:
    """The `k` bank rows with the largest `dot(query, row) - camera_penalty * [same camera]`.

    The bank is taken in panels: no (B, N) array exists at any time.

    Args:
        queries: (B, D) float32, float16 or bfloat16. In torch, `scores` are differentiable by them.
        bank: (N, D), likewise. No gradient.
        k: how many, up to 65536 together with `skip`.
        skip: how many of the first ranks to leave out (SCL's positives, say).
        self_rows: (B,) ids, the bank row of each query, which is left out; -1: none.
        query_groups, bank_groups: (B,) and (N,) ids: rows of the query's group are left out. A negative
            group equals nothing.
        query_cameras, bank_cameras: (B,) and (N,) ids: rows of the query's camera lose `camera_penalty`.
        camera_penalty: SCL's lambda_C on squared distances of unit rows is 2 * this.
        precision: "exact": products in float32. "fast": on CUDA, in the bank's half precision or by
            torch's settings.

    Returns:
        Mined(scores, rows), both (B, k), largest score first, ties by the lower row. Where fewer than k rows
        qualify, -inf and -1. A product that is NaN or -inf does not qualify.
    """
    return Mined(
        *_mine(
            queries,
            bank,
            k,
            skip,
            self_rows,
            query_groups,
            bank_groups,
            query_cameras,
            bank_cameras,
            camera_penalty,
            precision,
        )
    )


def _mine_forward(
    queries: torch.Tensor,
    bank: torch.Tensor,
    k: int,
    skip: int,
    self_rows: torch.Tensor | None,
    query_groups: torch.Tensor | None,
    bank_groups: torch.Tensor | None,
    query_cameras: torch.Tensor | None,
    bank_cameras: torch.Tensor | None,
    camera_penalty: float,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    module, stream = _native.floor(bank)
    groups = query_groups, bank_groups
    cameras = query_cameras, bank_cameras
    capacity = module.mine_check(
        queries, bank, k, skip, self_rows, *groups, *cameras, camera_penalty, precision
    )
    batch, keep = queries.shape[0], k + skip
    state = (
        _native.empty(bank, (batch, capacity), "int64"),
        _native.empty(bank, (batch,), "int64"),
        _native.empty(bank, (batch,), "int32"),
    )
    rules = (self_rows, *groups, *cameras, camera_penalty)
    wide = _native.widened_half(queries)
    for first, panel in _panels.panels(batch, bank):
        scores = _panels.product(wide, panel, precision=precision)
        module.mine_panel(scores, first, *rules, *state, keep, stream)
    scores = _native.empty(bank, (batch, k), "float32")
    rows = _native.empty(bank, (batch, k), "int64")
    module.mine_finish(*state, keep, skip, scores, rows, stream)
    return scores, rows


def _mine_fake(queries, bank, k, *_):
    scores = queries.new_empty((queries.shape[0], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _mine_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], output[1])
    ctx.dtype = inputs[0].dtype


def _mine_backward(ctx, grad, _):
    bank, rows = ctx.saved_tensors
    batch, k = rows.shape
    grad = grad.masked_fill(rows < 0, 0)
    rows = rows.clamp(min=0)
    total = torch.zeros(batch, bank.shape[1], device=bank.device)
    gathered = 2**24  # elements at a time
    ranks = max(gathered // max(batch * bank.shape[1], 1), 1)
    for begin in range(0, k, ranks):
        some = slice(begin, begin + ranks)
        total += torch.bmm(grad[:, None, some], bank[rows[:, some]].float())[:, 0]
    return total.to(ctx.dtype), *[None] * 10


_mine = _torch.register(
    _mine_forward,
    name="mine_negatives",
    fake=_mine_fake,
    setup_context=_mine_context,
    backward=_mine_backward,
)
