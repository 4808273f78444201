"""Momentum update of a memory bank, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _torch

_OP = "memory_update_"


def memory_update_(
    bank: Array,
    features: Array,
    rows: Array,
    *,
    momentum: float | Array,
    repeats: str = "sequential",
    parts: int | Sequence[int] = 1,
    normalize: bool = True,
) -> Array:
    """Moves rows of `bank` towards features: `bank[rows[e]] = m * old + (1 - m) * features[e]`, normalised.

    Every event e of the batch moves one row, then each part of the row is divided by its L2 norm (at least
    1e-12). No gradient flows; autograd notices that `bank` has changed.

    Args:
        bank: (N, D) float32, float16 or bfloat16. Changed in place. Arithmetic is float32; a half-precision
            row is rounded once, however many events move it.
        features: (E, D), of the bank's dtype, or float32, or any of these if the bank is float32.
        rows: (E,) int64 or int32, in [0, N). A row out of range is a ValueError on the CPU; on CUDA its
            event is left out (an error under `pyreid.debug()`).
        momentum: weight of the OLD row, in [0, 1]: a float, or (E,) float32, one per event.
        repeats: what happens to a row named by several events.
            "sequential": one after another in batch order, normalising after each (SpCL, Cluster Contrast,
            SCL's mixture bank). "last": each starts from the old row, the last wins (GCL, JVTC, SCL's
            ranking banks). "hardest": the event with the smallest dot product to the old row, once; the
            first on ties (Cluster Contrast's hard update). "mean": the mean of what each event alone makes
            of the old row, normalised once.
        parts: what is normalised on its own: a count of equal parts, or their sizes in columns.
        normalize: whether to normalise at all.

    Returns:
        `bank`.

    The result is the same, bit for bit, in every run.
    """
    if _torch.dispatched(bank):
        array_momentum = isinstance(momentum, torch.Tensor)
        sizes = [bank.shape[1] // parts] * parts if isinstance(parts, int) else list(parts)
        _update_registered(
            bank,
            features,
            rows,
            momentum if array_momentum else None,
            0.0 if array_momentum else momentum,
            repeats,
            sizes,
            normalize,
        )
    else:
        _update(bank, features, rows, momentum, repeats, parts, normalize)
    return bank


def _update(
    bank: Any,
    features: Any,
    rows: Any,
    momentum: Any,
    repeats: str,
    parts: int | Sequence[int],
    normalize: bool,
) -> None:
    module, stream = _native.floor(bank)
    _native.check_range(_OP, "rows", rows, 0, bank.shape[0], closed=False)
    if _native.on_cuda(momentum):
        _native.check_range(_OP, "momentum", momentum, 0, 1, closed=True)
    is_torch = _native.is_torch(bank)
    if is_torch and bank.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: bank must not require gradients, got requires_grad=True")
    module.memory_update(
        bank, features, rows, momentum, repeats, parts, normalize, _native.scratch(bank), stream
    )
    if is_torch and not bank.is_inference():
        torch.autograd.graph.increment_version(bank)


def _update_tensors(
    bank: torch.Tensor,
    features: torch.Tensor,
    rows: torch.Tensor,
    momenta: torch.Tensor | None,
    momentum: float,
    repeats: str,
    parts: Sequence[int],
    normalize: bool,
) -> None:
    weight = momentum if momenta is None else momenta
    _update(bank, features, rows, weight, repeats, parts, normalize)


_update_registered = _torch.register(
    _update_tensors, name="memory_update_", mutates=("bank",), fake=lambda *_: None
)
