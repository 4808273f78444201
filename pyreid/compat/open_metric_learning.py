"""open-metric-learning: retrieval without an array of all distances, and k-reciprocal re-ranking of results.

Importing this needs no open-metric-learning.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from pyreid import ops
from pyreid.compat import _place
from pyreid.compat._nearest import nearest

__all__ = ["KReciprocalReranker", "batched_knn", "batched_knn_qg"]  # noqa: F822 (one is made when asked for)

_Lists = Sequence[torch.Tensor]


def batched_knn(
    embeddings: torch.Tensor,
    ids_query: torch.Tensor,
    ids_gallery: torch.Tensor,
    top_n: int,
    sequence_ids: torch.Tensor | None = None,
    labels_gt: torch.Tensor | None = None,
    bs: int = 5_000,
    verbose: bool = False,
) -> tuple[_Lists, _Lists, _Lists | None]:
    """`oml.functional.knn.batched_knn`: the gallery items nearest to each query.

    Args:
        embeddings: (L, D). ids_query: (Q,) and ids_gallery: (G,) rows of it; they may overlap: no item is
            retrieved for itself.
        top_n: how many.
        sequence_ids: (L,); members of the query's sequence are not retrieved.
        labels_gt: (L,).
        bs, verbose: not looked at.

    Returns:
        distances: per query, of what is retrieved, ascending; at most `top_n`.
        retrieved_ids: per query, their numbers among the gallery; of equal distances, the lower first.
        gt_ids: per query, the numbers of all of its label that may be retrieved; None without labels.
    """

    def both(values: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (None, None) if values is None else (values[ids_query], values[ids_gallery])

    labels, sequences = both(labels_gt), both(sequence_ids)
    return batched_knn_qg(
        *(embeddings[ids_query], embeddings[ids_gallery], top_n),
        *(*labels, ids_query, ids_gallery, *sequences),
        bs=bs,
        verbose=verbose,
    )


def batched_knn_qg(
    embeddings_query: torch.Tensor,
    embeddings_gallery: torch.Tensor,
    top_n: int,
    labels_query: torch.Tensor | None = None,
    labels_gallery: torch.Tensor | None = None,
    ids_query: torch.Tensor | None = None,
    ids_gallery: torch.Tensor | None = None,
    sequence_ids_query: torch.Tensor | None = None,
    sequence_ids_gallery: torch.Tensor | None = None,
    bs: int = 5_000,
    verbose: bool = False,
) -> tuple[_Lists, _Lists, _Lists | None]:
    """`oml.functional.knn.batched_knn_qg`: `batched_knn` with queries and gallery apart. Items with an id in
    common are one item."""
    ids = _pair("ids", ids_query, ids_gallery)
    sequences = _pair("sequence_ids", sequence_ids_query, sequence_ids_gallery)
    labels = _pair("labels", labels_query, labels_gallery)
    top_n = min(top_n, len(embeddings_gallery))
    # The op leaves out one group: with sequences, an item's own ids are taken out of some more.
    groups, apart = (sequences, ids) if sequences is not None else (ids, None)
    more = 0 if apart is None else int(torch.unique(apart[1], return_counts=True)[1].max())
    found, rows = nearest(
        embeddings_query,
        embeddings_gallery,
        min(top_n + more, len(embeddings_gallery)),
        query_groups=None if groups is None else groups[0],
        gallery_groups=None if groups is None else groups[1],
    )
    kept = found.isfinite()
    if apart is not None:
        kept &= apart[0][:, None] != apart[1][rows]
        kept &= kept.cumsum(dim=1) <= top_n
    counts = kept.sum(dim=1).tolist()
    retrieved = rows[kept].split(counts)
    truth = None if labels is None else _relevant(labels, [x for x in (ids, sequences) if x])
    return list(found.sqrt()[kept].split(counts)), list(retrieved), truth or None


def _pair(
    name: str, query: torch.Tensor | None, gallery: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Numbers of queries and gallery, from 0 on."""
    if query is None and gallery is None:
        return None
    if query is None or gallery is None:
        missing = f"{name}_{'query' if query is None else 'gallery'}"
        raise ValueError(f"batched_knn_qg: {missing} must be given as the other is, got None")
    _, numbers = torch.cat([query, gallery]).unique(return_inverse=True)
    first, second = numbers.split([len(query), len(gallery)])
    return first.contiguous(), second.contiguous()


def _relevant(labels: tuple, left_out: list[tuple]) -> list[torch.Tensor]:
    """Per query, the gallery rows of its label, ascending, without those that share something `left_out`."""
    order = labels[1].argsort(stable=True)
    known = int(torch.cat(labels).max()) + 1 if len(labels[0]) else 0
    counts = torch.bincount(labels[1], minlength=known)
    of_label = order.split(counts.tolist())
    truth = []
    for query, label in enumerate(labels[0].tolist()):
        rows = of_label[label]
        for own, theirs in left_out:
            rows = rows[theirs[rows] != own[query]]
        truth.append(rows)
    return truth


def _reranker() -> type:
    try:
        base: Any = importlib.import_module("oml.interfaces.retrieval").IRetrievalPostprocessor
    except ImportError as error:
        raise ImportError(
            "KReciprocalReranker is a postprocessor of open-metric-learning: "
            "`pip install open-metric-learning`"
        ) from error

    class KReciprocalReranker(base):
        """Re-orders what was retrieved by (1 - lambda) Jaccard distance + lambda distance: `ops.rerank`.

        What is retrieved for each query stays; its order and distances change.

        Args:
            embeddings: (L, D) of the data set, queries and gallery.
            k1, k2, lambda_value: as in Zhong et al.
        """

        def __init__(
            self,
            embeddings: torch.Tensor,
            k1: int = 20,
            k2: int = 6,
            lambda_value: float = 0.3,
        ):
            self.embeddings = embeddings
            self.k1 = k1
            self.k2 = k2
            self.lambda_value = lambda_value

        def process(self, rr: Any, dataset: Any) -> Any:
            """RetrievalResults of a data set with `get_query_ids()` and `get_gallery_ids()`."""
            queries, gallery = (
                _place.placed(self.embeddings[ids])
                for ids in (dataset.get_query_ids(), dataset.get_gallery_ids())
            )
            mixed = ops.rerank(queries, gallery, self.k1, self.k2, self.lambda_value)
            distances, retrieved = [], []
            for row, rows in zip(mixed.cpu(), rr.retrieved_ids, strict=True):
                distance, order = row[rows.cpu()].sort(stable=True)
                distances.append(distance)
                retrieved.append(rows[order.to(rows.device)])
            return type(rr)(distances=distances, retrieved_ids=retrieved, gt_ids=rr.gt_ids)

    KReciprocalReranker.__module__ = __name__
    KReciprocalReranker.__qualname__ = "KReciprocalReranker"
    return KReciprocalReranker


def __getattr__(name: str) -> Any:
    if name != "KReciprocalReranker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made = _reranker()
    return made


REPLACEMENTS = {
    "oml.functional.knn.batched_knn": batched_knn,
    "oml.functional.knn.batched_knn_qg": batched_knn_qg,
}
