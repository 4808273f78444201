"""pytorch-metric-learning: exact neighbours without faiss, and a miner for large memories.

Importing this needs no pytorch-metric-learning; `TopKNegativeMiner` does, as it is one of its miners.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.compat._nearest import nearest

__all__ = ["FaissKNN", "TopKNegativeMiner"]  # noqa: F822 (made when asked for)


class FaissKNN:
    """`pytorch_metric_learning.utils.inference.FaissKNN`, for `AccuracyCalculator(knn_func=...)` and
    `InferenceModel(knn_func=...)`: neighbours by squared Euclidean distance, all of them, without faiss.

    Args:
        reset_before, reset_after: whether a call forgets what was added before it, and what it was given.
        index_init_fn: None: there is no faiss index to choose.
        gpus: the first of them does the work, if there is one. None: the device of the query.
    """

    def __init__(
        self,
        reset_before: bool = True,
        reset_after: bool = True,
        index_init_fn: Any = None,
        gpus: list[int] | tuple[int, ...] | None = None,
    ):
        if index_init_fn is not None:
            raise ValueError(
                f"FaissKNN: index_init_fn must be None (neighbours are exact), got {index_init_fn!r}"
            )
        if gpus is not None and not isinstance(gpus, list | tuple):
            raise TypeError(f"FaissKNN: gpus must be a list, got {gpus!r}")
        if gpus is not None and not gpus:
            raise ValueError("FaissKNN: gpus must have at least one, got none")
        self.reset_before = reset_before
        self.reset_after = reset_after
        self.gpus = gpus
        self._parts: list[torch.Tensor] = []

    def __call__(
        self,
        query: torch.Tensor,
        k: int,
        reference: torch.Tensor | None = None,
        ref_includes_query: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            query: (B, D). reference: (G, D), added to what there is; None: nothing is added.
            k: how many.
            ref_includes_query: the first B reference rows are the query, and no row is its own neighbour.

        Returns:
            (B, k) squared distances, ascending, and rows, on the query's device. Where there are fewer
            reference rows, the largest float and -1, as faiss has it.
        """
        if self.reset_before:
            self.reset()
        if reference is not None:
            self._parts.append(reference.detach())
        place = query.device
        if self.gpus is not None and torch.cuda.is_available():
            place = torch.device("cuda", self.gpus[0])
        rows = query.detach().to(place)
        alone = query is reference and len(self._parts) == 1
        index = rows if alone else self._index().to(place)
        distances, found = nearest(rows, index, k + ref_includes_query)
        distances = distances.nan_to_num(posinf=torch.finfo(torch.float32).max)
        if self.reset_after:
            self.reset()
        if ref_includes_query:
            distances, found = _without_own(distances, found)
        return distances.to(query.device), found.to(query.device)

    def train(self, embeddings: torch.Tensor | np.ndarray) -> None:
        """(N, D): what is searched from now on."""
        self.reset()
        self.add(embeddings)

    def add(self, embeddings: torch.Tensor | np.ndarray) -> None:
        """(N, D): to what is searched."""
        self._parts.append(torch.as_tensor(embeddings).detach().cpu())

    def save(self, filename: str) -> None:
        """What is searched, as a tensor: not faiss's format."""
        torch.save(self._index(), filename)

    def load(self, filename: str) -> None:
        """What `save` wrote."""
        self._parts = [torch.load(filename, weights_only=True)]

    def reset(self) -> None:
        self._parts = []

    def _index(self) -> torch.Tensor:
        if not self._parts:
            raise ValueError(
                "FaissKNN: reference must be given, or train() called before, got neither"
            )
        if len(self._parts) > 1:
            place = self._parts[0].device
            self._parts = [torch.cat([part.to(place) for part in self._parts])]
        return self._parts[0]


def _without_own(distances: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i without neighbour i; without its last, where equal rows have pushed i out of the list."""
    own = rows == torch.arange(len(rows), device=rows.device)[:, None]
    own[:, -1] |= ~own.any(dim=1)
    kept = (len(rows), rows.shape[1] - 1)
    return distances[~own].view(kept), rows[~own].view(kept)


def _miner() -> type:
    try:
        distances = importlib.import_module("pytorch_metric_learning.distances")
        base: Any = importlib.import_module("pytorch_metric_learning.miners").BaseMiner
    except ImportError as error:
        raise ImportError(
            "TopKNegativeMiner is a miner of pytorch-metric-learning: `pip install pytorch-metric-learning`"
        ) from error

    class TopKNegativeMiner(base):
        """All positive pairs, and for each anchor the `k` nearest rows of other labels.

        For `losses.CrossBatchMemory(loss, embedding_size, memory_size, miner=TopKNegativeMiner(50))` and any
        loss that takes pairs: B x k negative pairs in place of all B x M, which are never listed.

        Args:
            k: how many; fewer where there are fewer.
            distance: CosineSimilarity (the default), DotProductSimilarity, or LpDistance of unit rows.
        """

        def __init__(self, k: int = 50, **kwargs: Any):
            super().__init__(**kwargs)
            unit = isinstance(self.distance, distances.LpDistance) and (
                self.distance.normalize_embeddings and self.distance.p == 2
            )
            if not (unit or isinstance(self.distance, distances.DotProductSimilarity)):
                raise ValueError(
                    f"TopKNegativeMiner: distance must be CosineSimilarity, DotProductSimilarity or an "
                    f"LpDistance of unit rows, got {self.distance!r}"
                )
            self.k = k
            self.add_to_recordable_attributes(list_of_names=["k"], is_stat=False)

        def get_default_distance(self):
            return distances.CosineSimilarity()

        def mine(
            self,
            embeddings: torch.Tensor,
            labels: torch.Tensor,
            ref_emb: torch.Tensor,
            ref_labels: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            """(B, D), (B,), (M, D), (M,) -> (anchors, positives, anchors, negatives), each (pairs,)."""
            queries = self.distance.maybe_normalize(embeddings).contiguous()
            bank = self.distance.maybe_normalize(ref_emb).to(queries.dtype).contiguous()
            lowest = torch.minimum(labels.min(), ref_labels.min())  # -1 is a label like others
            found = ops.mine_negatives(
                queries,
                bank,
                min(self.k, len(bank)),
                query_groups=(labels - lowest).long(),
                bank_groups=(ref_labels - lowest).long(),
            ).rows
            same = labels[:, None] == ref_labels
            if ref_emb is embeddings:
                same.fill_diagonal_(False)
            anchors, positives = torch.where(same)
            there = found >= 0
            return anchors, positives, torch.where(there)[0], found[there]

    TopKNegativeMiner.__module__ = __name__
    TopKNegativeMiner.__qualname__ = "TopKNegativeMiner"  # so that it can be pickled
    return TopKNegativeMiner


def __getattr__(name: str) -> Any:
    if name != "TopKNegativeMiner":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _miner()
    return made


REPLACEMENTS = {"pytorch_metric_learning.utils.inference.FaissKNN": FaissKNN}
