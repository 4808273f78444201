"""Rows of a plan to batches of transformed views, the same ones whatever the number of workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """B images, each in one or more views."""

    views: tuple[torch.Tensor, ...]  # each (B, 3, H, W) float32
    rows: torch.Tensor  # (B,) int64, of the image set
    labels: torch.Tensor  # (B,) int64
    cameras: torch.Tensor  # (B,) int64
    skipped: tuple[str, ...] = ()  # names of corrupt images that others of the batch stand in for

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: Any) -> Batch:
        """The batch on `device`; from pinned memory without waiting for the copy."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            views=tuple(moved(view) for view in self.views),
            rows=moved(self.rows),
            labels=moved(self.labels),
            cameras=moved(self.cameras),
        )
