"""Contrastive loss of queries against chosen rows of a bank."""

from __future__ import annotations

from typing import Any

import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _torch

_OP = "set_contrast"


def set_contrast(
    queries: Array,
    bank: Array,
    positives: Array,
    negatives: Array | None = None,
    *,
    weights: Array | None = None,
    scale: float,
    denominator: str = "joint",
) -> Array:
    """Cross-entropy of each query's positives among its positives and negatives, all of them bank rows.

    With scores `s = scale * dot(query, bank row)`, the loss of a query is
    `sum_j weights[j] * (logsumexp(S_j) - s_j)` over its positives j. Differentiable in `queries`.

    Args:
        queries: (B, D), or (Q, B, D): several sets of queries over the same lists, whose rows are then
            read once for all sets. float32, float16 or bfloat16. Arithmetic is float32.
        bank: (N, D) float32, float16 or bfloat16. Gets no gradient. Backward reads it again: update it
            after backward, or pass a copy (autograd raises an error otherwise).
        positives, negatives: (B, J) and (B, K) bank rows, int64 or int32; -1 is a pad and counts nothing. Any
            other row outside [0, N) is a ValueError on the CPU, and a pad on CUDA (an error under
            `pyreid.debug()`). A row that is listed twice counts twice.
        weights: of the positives, (J,) or (B, J) float32. Default: 1 / the number of the row's positives.
        scale: 1 / temperature.
        denominator: what S_j holds. "joint": all positives and negatives (SCL, ICE). "own": positive j and
            the negatives (GCL, MoCo).

    Returns:
        (B,) or (Q, B) float32. 0, with gradient 0, for a query without positives.

    Kept for backward, beside the arguments: one float per listed row and query set. Loss and gradient are
    the same, bit for bit, in every run.
    """
    loss, _ = _contrast(queries, bank, positives, negatives, weights, scale, denominator)
    return loss


def _forward(
    queries: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None,
    weights: torch.Tensor | None,
    scale: float,
    denominator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (B,) or (Q, B), and slopes (..., J + K): d loss / d dot product."""
    queries = _native.widened_half(queries)
    module, stream = _native.floor(queries)
    allocate = _native.allocator(queries)
    result = module.set_contrast(
        queries, bank, positives, negatives, weights, scale, denominator, allocate, stream
    )
    _native.check_range(_OP, "positives", positives, -1, bank.shape[0], closed=False)
    if negatives is not None:
        _native.check_range(_OP, "negatives", negatives, -1, bank.shape[0], closed=False)
    return result


def _fake_forward(
    queries: Any,
    bank: Any,
    positives: Any,
    negatives: Any,
    weights: Any,
    scale: float,
    denominator: str,
) -> Any:
    count = positives.shape[1] + (0 if negatives is None else negatives.shape[1])
    loss = queries.new_empty(queries.shape[:-1], dtype=torch.float32)
    return loss, loss.new_empty((*loss.shape, count))


def _gradient(
    grad_loss: torch.Tensor,
    slopes: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor | None,
) -> torch.Tensor:
    module, stream = _native.floor(slopes)
    allocate = _native.allocator(slopes)
    return module.set_contrast_backward(
        grad_loss, slopes, bank, positives, negatives, allocate, stream
    )


def _fake_gradient(grad_loss: Any, slopes: Any, bank: Any, positives: Any, negatives: Any) -> Any:
    return slopes.new_empty((*slopes.shape[:-1], bank.shape[1]))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    queries, bank, positives, negatives, *_ = inputs
    _, slopes = output
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slopes, bank, positives, negatives)
    ctx.dtype = queries.dtype


def _backward(ctx: Any, grad_loss: Any, _: Any) -> Any:
    grad = None
    if ctx.needs_input_grad[0]:
        grad = _gradient_registered(grad_loss.contiguous(), *ctx.saved_tensors).to(ctx.dtype)
    return grad, None, None, None, None, None, None


_gradient_registered = _torch.register(_gradient, name=f"{_OP}_backward", fake=_fake_gradient)
_contrast = _torch.register(
    _forward, name=_OP, fake=_fake_forward, setup_context=_setup_context, backward=_backward
)
