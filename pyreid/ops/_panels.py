"""The bank in panels: dot products with a few thousand rows at a time, so that a kernel can use them up
while they are in cache and no (B, N) array ever exists."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pyreid import _native
from pyreid.ops import _shards

# Scores of one panel: on the CPU a share of the last cache, on CUDA half of a Hopper's L2.
_CPU_SCORES, _CUDA_SCORES = 2**20, 7 * 2**20
_PACKED = 4  # queries, from which on the floor's own product beats one that need not pack the rows
_CONVERTED = 2**24  # elements of a half-precision bank that are widened at a time


def panels(batch: int, bank: Any) -> Iterator[tuple[int, Any]]:
    """(first row, rows) of consecutive panels of `bank`, for products with `batch` queries; at least one."""
    size, dim = bank.shape
    rows = width(batch, _shards.like(bank))
    if not _is_float32(bank):
        rows = min(rows, _CONVERTED // max(dim, 1))
    rows = max(rows // 256, 1) * 256
    if isinstance(bank, _shards.Shards):
        yield from bank.panels(rows)
        return
    for first in range(0, max(size, 1), rows):
        yield first, bank[first : first + rows]


def width(batch: int, like: Any) -> int:
    """Rows that meet `batch` queries at a time."""
    scores = _CUDA_SCORES if _native.on_cuda(like) else _CPU_SCORES
    return max(scores // max(batch, 1) // 256, 1) * 256


def product(queries: Any, panel: Any, *, precision: str = "exact", alike: bool = False) -> Any:
    """(B, P) float32 dot products of float32 queries and a panel of the bank.

    "exact": float32 throughout, whatever torch's matmul precision and autocast are set to. "fast": on CUDA
    in the bank's half precision, or as torch's settings allow for a float32 bank.

    `alike`: on the CPU, the bits of a product do not depend on how many queries come together, which for very
    few of them takes longer.
    """
    module, stream = _native.floor(panel)
    if module.has_product and (alike or len(queries) >= _PACKED):
        scores = _native.empty(panel, (len(queries), len(panel)), "float32")
        module.product(queries, panel, scores, stream)
        return scores
    if not _native.is_torch(queries):
        return queries @ _native.widened_half(panel).T
    with _plain_float32(queries, precision):
        if precision == "fast" and queries.is_cuda and panel.dtype != torch.float32:
            return (queries.to(panel.dtype) @ panel.T).float()
        return queries @ _native.widened_half(panel).T


def has_half_product(array: Any) -> bool:
    """Whether `half_product` can be had for arrays like this one."""
    if not _native.on_cuda(array):
        return True  # in the emulator
    if not _native.is_torch(array):
        return False
    return _mm_widens() and not getattr(
        torch.backends.cuda.matmul, "allow_fp16_accumulation", False
    )


def half_product(queries: Any, panel: Any) -> Any:
    """(B, P) dot products of float16 rows, added up in float32."""
    if not _native.on_cuda(queries):
        return _native.widened_half(queries) @ _native.widened_half(panel).T
    with _plain_float32(queries, "fast"):
        return torch.mm(queries, panel.T, out_dtype=torch.float32)


@functools.cache
def _mm_widens() -> bool:
    """Since torch 2.8."""
    return "dtype" in torch.ops.aten.mm.overloads()


def accumulate(total: Any, weights: Any, panel: Any) -> None:
    """total (B, D) += weights (B, P) @ panel (P, D), in float32; all of one library."""
    if not _native.is_torch(total):
        total += weights @ _native.widened_half(panel)
        return
    with _plain_float32(total, "exact"):
        total.addmm_(weights, _native.widened_half(panel))


def _is_float32(array: Any) -> bool:
    return array.dtype in (torch.float32, np.dtype("float32"))


def _autocast_is_on(kind: str) -> bool:
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # before torch 2.4, one function per device
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


@contextlib.contextmanager
def _plain_float32(tensor: torch.Tensor, precision: str):
    """No autocast; with "exact", no TF32 or bfloat16 inside float32 products either."""
    kind = tensor.device.type
    setting = torch.get_float32_matmul_precision()
    lower = precision == "exact" and setting != "highest"
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if _autocast_is_on(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if lower:
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, setting)
        yield
