"""Person_reID_baseline_pytorch (layumi's): re-ranking, and its graph re-ranking with nothing to compile."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from pyreid import ops
from pyreid.compat import _place, _rerank

__all__ = ["gnn_reranking", "re_ranking"]

_QUERIES = 1024  # rows of the result at a time


def re_ranking(
    q_g_dist: Any,
    q_q_dist: Any,
    g_g_dist: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> np.ndarray:
    """`re_ranking.re_ranking`: (Q, G) float32 distances of cosine *similarities*, (Q, G), (Q, Q) and (G, G)
    arrays or tensors: they become 2 - 2 s, are squared, and divided by the maximum of their column."""
    blocks = [2 - 2 * torch.as_tensor(block) for block in (q_g_dist, q_q_dist, g_g_dist)]
    return _rerank.re_ranking(blocks[0], blocks[1], blocks[2], k1, k2, lambda_value)


@torch.no_grad()
def gnn_reranking(X_q: torch.Tensor, X_g: torch.Tensor, k1: int, k2: int) -> np.ndarray:
    """`gnn_reranking.gnn_reranking`: the gallery in the order of a graph's features, for each query.

    Row i's features are 1 at its k1 nearest rows. Twice: they are added to their transpose, summed over the
    k2 nearest rows with squared similarities for weights, and normalised. Rows are sparse in between, where
    theirs are as long as there are images; and any number of images is right, where theirs overflows from
    46,341 on.

    Args:
        X_q: (Q, D) unit features of queries. X_g: (G, D) of the gallery. k1, k2: 26 and 7 in the paper.

    Returns:
        (Q, G) int64: gallery rows, best first; of equal ones, the lower first.
    """
    rows = torch.cat([_place.placed(X_q), _place.placed(X_g)])
    found = ops.knn(rows, min(k1, len(rows)))
    graph = _sparse(found.rows, torch.ones_like(found.scores), len(rows))
    if k2 != 1:
        nearest = _sparse(found.rows[:, :k2], found.scores[:, :k2].square(), len(rows))
        for _ in range(2):
            both = (graph + graph.t()).coalesce()
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch calls a layout that it takes in between a beta
                graph = _unit(torch.sparse.mm(nearest, both).coalesce())
    count = len(X_q)
    gallery = graph.index_select(0, torch.arange(count, len(rows), device=rows.device))
    order = []
    for some in torch.arange(count, device=rows.device).split(_QUERIES):
        queries = graph.index_select(0, some).to_dense()
        similarity = torch.sparse.mm(gallery, queries.T).T
        order.append((-similarity).sort(dim=1, stable=True).indices.cpu())
    return torch.cat(order).numpy()


def _sparse(columns: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """(N, N), from (N, k) columns and values."""
    where = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)
    places = torch.stack([where.flatten(), columns.flatten()])
    shape = (size, size)
    made = torch.sparse_coo_tensor(places, values.flatten(), shape, check_invariants=False)
    return made.coalesce()


def _unit(graph: torch.Tensor) -> torch.Tensor:
    places, values = graph.indices(), graph.values()
    squares = values.new_zeros(graph.shape[0]).index_add(0, places[0], values.square())
    values = values / squares.sqrt()[places[0]]
    return torch.sparse_coo_tensor(
        places, values, graph.shape, is_coalesced=True, check_invariants=False
    )


REPLACEMENTS = {
    "re_ranking.re_ranking": re_ranking,
    "gnn_reranking.gnn_reranking": gnn_reranking,
}
ABSENT = ("build_adjacency_matrix", "gnn_propagate")
