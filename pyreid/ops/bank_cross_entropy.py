"""Softmax cross entropy of queries against a memory bank, without the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _panels, _torch

_OP = "bank_cross_entropy"
_MEANS = 2**24  # elements of means of labels that are held at a time: 64 MB
_RUNNING, _MATCHED = (
    6,
    4,
)  # floats of the native RunningSoftmax, and which counts the columns of the target


def bank_cross_entropy(
    queries: Array,
    bank: Array,
    targets: Array,
    *,
    scale: float,
    labels: Array | None = None,
    reduce: str = "row",
    label_smoothing: float = 0.0,
) -> Array:
    """Cross entropy of softmax(scale * queries @ bank.T), one loss per query.

    The logits are made a panel of bank rows at a time and never kept. Where a gradient is wanted, it is
    computed along with the losses, so that backward is next to nothing and the bank may change before it.

    Args:
        queries: (B, D) float32, float16 or bfloat16. Differentiable, if a torch tensor.
        bank: (N, D), of any of these dtypes, N >= 1. No gradient flows to it.
        targets: (B,) int64 or int32: rows of the bank, or labels of its rows. A row out of range, or a
            label that no row has, is a ValueError on the CPU; on CUDA, that loss and its gradient are 0
            (an error under `pyreid.debug()`).
        scale: one over the temperature; positive.
        labels: (N,) int64 or int32 label of each row, where `reduce` is not "row"; any below 2**31 - 1.
            A negative one is no label: that row is no target.
        reduce: what the softmax runs over, and what a target is.
            "row": the rows; the target is one of them (Cluster Contrast; ICE, camera-agnostic).
            "cluster_mean": the labels present, by the mean logit of their rows; the target is one of
            them (SpCL). Rows without a label are left out.
            "label_uniform": the rows; the target is spread evenly over those of a label (JVTC).
        label_smoothing: in [0, 1]: the part of the target that is spread evenly over all that the softmax
            runs over, as in `torch.nn.functional.cross_entropy`.

    Returns:
        (B,) float32 losses. They and the gradients are the same, bit for bit, in every run, as far as the
        array library's matrix product is.
    """
    if isinstance(bank, torch.Tensor) and bank.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: bank must not require gradients, got requires_grad=True")
    with_gradients = (
        isinstance(queries, torch.Tensor) and queries.requires_grad and torch.is_grad_enabled()
    )
    call: Callable = _registered if isinstance(queries, torch.Tensor) else _forward
    losses, _ = call(queries, bank, targets, labels, scale, reduce, label_smoothing, with_gradients)
    return losses


def _forward(
    queries: torch.Tensor,
    bank: torch.Tensor,
    targets: torch.Tensor,
    labels: torch.Tensor | None,
    scale: float,
    reduce: str,
    label_smoothing: float,
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) losses, and (B, D) gradients of each by its query, or (0, D) without."""
    module, stream = _native.floor(queries)
    loss = module.BankCrossEntropy(
        queries, bank, targets, labels, scale, reduce, label_smoothing, stream
    )
    if reduce == "row":
        _native.check_range(_OP, "targets", targets, 0, bank.shape[0], closed=False)
    batch, (size, dim) = queries.shape[0], bank.shape
    if reduce != "row":
        groups = _native.empty(queries, (2 * size + 2,), "int32")
        target_columns = _native.empty(queries, (batch,), "int32")
        loss.group_labels(groups, target_columns, _native.scratch(queries))
        if _native.checks_values(targets):
            _check_labels(targets, target_columns)

    wide = _native.widened_half(queries)
    if label_smoothing > 0:
        wide = _with_a_row_of_zeros(wide)  # it weighs all columns alike
    running = _native.empty(queries, (wide.shape[0], _RUNNING), "float32")
    sums = _native.empty(queries, wide.shape, "float32") if with_gradients else None
    columns = _means(loss, bank) if reduce == "cluster_mean" else [(0, bank)]
    for start, block in columns:
        for first, panel in _panels.panels(wide.shape[0], block):
            scores = _panels.product(wide, panel)
            loss.fold_scores(start + first, scores, running, sums)
            if sums is not None:
                _panels.accumulate(sums, scores, panel)
    losses = _native.empty(queries, (batch,), "float32")
    loss.finish_losses(running, losses, sums)
    return losses, _native.empty(queries, (0, dim), "float32") if sums is None else sums[:batch]


def _with_a_row_of_zeros(rows: Any) -> Any:
    longer = _native.empty(rows, (rows.shape[0] + 1, rows.shape[1]), "float32")
    longer[:-1] = rows
    longer[-1] = 0
    return longer


def _means(loss: Any, bank: Any) -> Iterator[tuple[int, Any]]:
    """(first column, means) of the labels, as many at a time as _MEANS allows."""
    columns, dim = loss.label_columns(), bank.shape[1]
    step = max(_MEANS // max(dim, 1), 1)
    means = _native.empty(bank, (min(columns, step), dim), "float32")
    for start in range(0, columns, step):
        block = means[: columns - start]
        loss.label_means(start, block)
        yield start, block


def _check_labels(targets: Any, target_columns: Any) -> None:
    if 0 in targets.shape or target_columns.min().item() >= 0:
        return
    position = int(target_columns.argmin())
    raise ValueError(
        f"{_OP}: targets must be labels that a row of the bank has, got {int(targets[position])} "
        f"at position {position}"
    )


def _setup_context(ctx, inputs, output) -> None:
    queries, (_, gradients) = inputs[0], output
    ctx.save_for_backward(gradients)
    ctx.dtype = queries.dtype
    ctx.mark_non_differentiable(gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx, of_losses, _):
    (gradients,) = ctx.saved_tensors
    return (of_losses[:, None] * gradients).to(ctx.dtype), *[None] * 7


def _fake(queries, bank, targets, labels, scale, reduce, label_smoothing, with_gradients):
    batch, dim = queries.shape
    return tuple(
        queries.new_empty(shape, dtype=torch.float32)
        for shape in [(batch,), (batch if with_gradients else 0, dim)]
    )


_registered = _torch.register(
    _forward, name=_OP, fake=_fake, setup_context=_setup_context, backward=_backward
)
