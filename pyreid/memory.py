"""A memory bank as a torch module: rows that follow their images through training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyreid import ops


class MemoryBank(torch.nn.Module):
    """Rows of features with a label and a camera each, moved by `update`, searched by `mine`.

    All state is in buffers: it follows `.to(device)` and `state_dict`. Loading a checkpoint of another size
    resizes the bank. Nothing here carries gradients, and nothing changes the bank but `update` and
    `reset`.

    Args:
        features: (N, D) first content of the bank, as it is: normalise it if rows should be unit.
        labels, cameras: (N,) ids. Without labels, -1: no row has any; without cameras, all 0.
        momentum, repeats, parts, normalize: of `ops.memory_update_`, for every update.
        search_dtype: torch.float16 or torch.bfloat16 keeps a copy of the bank in half precision for
            `mine(..., precision="fast")`, in step with every update.
    """

    features: torch.Tensor
    labels: torch.Tensor
    cameras: torch.Tensor
    search_features: torch.Tensor | None

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        cameras: torch.Tensor | None = None,
        *,
        momentum: float = 0.2,
        repeats: str = "sequential",
        parts: int | Sequence[int] = 1,
        normalize: bool = True,
        search_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.momentum = momentum
        self.repeats = repeats
        self.parts = parts
        self.normalize = normalize
        self.search_dtype = search_dtype
        for name in ("features", "labels", "cameras"):
            self.register_buffer(name, None)
        self.register_buffer("search_features", None, persistent=False)
        self.reset(features, labels, cameras)

    @torch.no_grad()
    def reset(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None = None,
        cameras: torch.Tensor | None = None,
    ) -> None:
        """Starts over from (N, D) features and (N,) ids, of any N: after new pseudo labels, say."""
        size = len(features)
        for name, ids in (("labels", labels), ("cameras", cameras)):
            if ids is not None and tuple(ids.shape) != (size,):
                raise ValueError(
                    f"MemoryBank: {name} must have shape ({size},), got {tuple(ids.shape)}"
                )
        self.features = features.detach().clone().contiguous()
        self.labels = self._ids(labels, -1)
        self.cameras = self._ids(cameras, 0)
        self._renew_search_features()

    def _ids(self, ids: torch.Tensor | None, default: int) -> torch.Tensor:
        if ids is None:
            return torch.full((len(self),), default, device=self.features.device)
        return ids.detach().to(self.features.device, torch.int64, copy=True)

    def _renew_search_features(self) -> None:
        self.search_features = (
            None if self.search_dtype is None else self.features.to(self.search_dtype)
        )

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def update(
        self,
        features: torch.Tensor,
        rows: torch.Tensor,
        *,
        momentum: float | torch.Tensor | None = None,
    ) -> None:
        """Moves `rows` (E,) towards `features` (E, D); `momentum` once instead of the bank's own."""
        ops.memory_update_(
            self.features,
            features.detach(),
            rows,
            momentum=self.momentum if momentum is None else momentum,
            repeats=self.repeats,
            parts=self.parts,
            normalize=self.normalize,
        )
        if self.search_features is not None:
            self.search_features[rows] = self.features[rows].to(self.search_features.dtype)

    def mine(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        skip: int = 0,
        self_rows: torch.Tensor | None = None,
        query_labels: torch.Tensor | None = None,
        query_cameras: torch.Tensor | None = None,
        camera_penalty: float = 0.0,
        precision: str = "exact",
    ) -> ops.Mined:
        """`ops.mine_negatives` in this bank: rows of the query's label are left out, those of its camera
        penalised, where `query_labels`, `query_cameras` (B,) are given. `precision="fast"` searches the
        half-precision copy."""
        bank = self.features
        if precision == "fast" and self.search_features is not None:
            bank = self.search_features
        return ops.mine_negatives(
            queries,
            bank,
            k,
            skip=skip,
            self_rows=self_rows,
            query_groups=query_labels,
            bank_groups=None if query_labels is None else self.labels,
            query_cameras=query_cameras,
            bank_cameras=None if query_cameras is None else self.cameras,
            camera_penalty=camera_penalty,
            precision=precision,
        )

    def extra_repr(self) -> str:
        size, dim = self.features.shape
        return f"{size} x {dim}, momentum={self.momentum}, repeats={self.repeats!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any):
        for name in ("features", "labels", "cameras"):
            buffer = getattr(self, name)
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        self._renew_search_features()
