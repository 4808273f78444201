"""lightly: memory banks that are not copied at every look, and do not wait for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from pyreid import distributed, ops

__all__ = ["MemoryBankModule", "NNMemoryBankModule"]


class MemoryBankModule(torch.nn.Module):
    """`lightly.models.modules.memory_bank.MemoryBankModule`: a queue of features.

    What comes in and out is theirs; when a batch reaches the end of the bank, what is beyond it is dropped,
    as there. The bank is copied when it changes, not whenever it is read: so what was read stays what it was.

    Args:
        size: (rows, dim); rows alone, as until lightly 1.5, where the first features tell dim; or 0: no
            bank.
        gather_distributed: an update takes the features of all processes, in the order of their ranks, on
            each of them, so that all have one bank; before the first, rank 0's random one. Batches may differ
            in size.
        feature_dim_first: `forward` returns the bank as (dim, rows).
    """

    bank: torch.Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ):
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if len(shape) not in (1, 2) or min(shape) < 0:
            raise ValueError(f"MemoryBankModule: size must be (rows, dim), rows or 0, got {size}")
        self.size = shape
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", normalize(torch.randn(shape), dim=-1), persistent=False)
        self._next = 0
        self._alike = False

    @property
    def bank_ptr(self) -> torch.Tensor:
        """(1,) int64: the row that the next batch begins at."""
        return torch.tensor([self._next])

    def forward(
        self,
        output: torch.Tensor,
        labels: torch.Tensor | None = None,
        update: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, dim) features -> the same, and the bank before they entered it (or None, without one).

        Args:
            labels: not looked at.
            update: whether they enter it.
        """
        if self.size[0] == 0:
            return output, None
        self._shape_for(output)
        before = self.bank
        if update:
            self.bank = before.clone()
            self._write(output)
        return output, before.T if self.feature_dim_first else before

    def _shape_for(self, output: torch.Tensor) -> None:
        if self.bank.ndim == 1:
            self.size = (*self.size, output.shape[1])
            self.bank = normalize(torch.randn(self.size, device=output.device), dim=-1)

    @torch.no_grad()
    def _write(self, batch: torch.Tensor) -> None:
        if self.gather_distributed and distributed.world_size() > 1:
            if not self._alike:
                distributed.copy_from_first_([self.bank])
                self._alike = True
            batch = distributed.gather_rows(batch)
        rows = self.bank[self._next : self._next + len(batch)]
        rows.copy_(batch[: len(rows)])
        self._next += len(batch)
        if self._next >= len(self.bank):
            self._next = 0


class NNMemoryBankModule(MemoryBankModule):
    """`lightly.models.modules.NNMemoryBankModule`: the bank's row most similar to each feature (NNCLR)."""

    def __init__(self, size: int | Sequence[int]):
        super().__init__(size)

    def forward(  # type: ignore[override]
        self, output: torch.Tensor, update: bool = False
    ) -> torch.Tensor:
        """(B, dim) features -> (B, dim) bank rows, by cosine; of equal ones, the lower."""
        self._shape_for(output)
        queries, bank = (normalize(x.detach().float(), dim=1) for x in (output, self.bank))
        rows = ops.knn(bank, 1, queries=queries).rows[:, 0]
        nearest = self.bank[rows]  # a copy: the bank may change in place
        if update:
            self._write(output)
        return nearest


REPLACEMENTS = {
    "lightly.models.modules.memory_bank.MemoryBankModule": MemoryBankModule,
    "lightly.models.modules.nn_memory_bank.NNMemoryBankModule": NNMemoryBankModule,
}
