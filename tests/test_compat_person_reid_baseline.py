"""Person_reID_baseline_pytorch's re-ranking, by its similarities and by its graph: ours
against dense arrays."""

import importlib

import loops
import numpy as np
import pytest
import torch
import trainers
import transcribed

from pyreid import compat
from pyreid.compat import person_reid_baseline

PACKAGE = {
    "re_ranking.py": "def re_ranking(*_): raise NotImplementedError\n",
    "gnn_reranking.py": """
import build_adjacency_matrix
import gnn_propagate

def gnn_reranking(*_): raise NotImplementedError
""",
    "evaluate_rerank.py": """
from re_ranking import re_ranking
from gnn_reranking import gnn_reranking
""",
}


def rows():
    # As many of a person as there are neighbours, and no two at one distance.
    return trainers.people(6, 8, 12, seed=7)


def dense(rows, queries, k1, k2):
    """(Q, G) similarities of the graph's features, from an N x N array."""
    similarity = (rows @ rows.T).double().numpy()
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k1]
    graph = np.zeros_like(similarity)
    np.put_along_axis(graph, nearest, 1, axis=1)
    for _ in range(2 if k2 != 1 else 0):
        both = graph + graph.T
        for i, near in enumerate(nearest[:, :k2]):
            graph[i] = sum(similarity[i, j] ** 2 * both[j] for j in near)
        graph /= np.linalg.norm(graph, axis=1, keepdims=True)
    return graph[:queries] @ graph[queries:].T


def test_re_ranking():
    queries, gallery = rows()[::4], rows()[torch.arange(len(rows())) % 4 != 0]
    similar = [(a @ b.T).numpy() for a, b in [(queries, gallery), (queries,) * 2, (gallery,) * 2]]
    found = person_reid_baseline.re_ranking(*similar, k1=9, k2=3)
    expected = transcribed.re_ranking(*(2 - 2 * s.astype(np.float64) for s in similar), 9, 3, 0.3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("k1, k2", [(8, 3), (26, 7), (5, 1), (500, 4)])
def test_gnn_reranking(k1, k2):
    """The order, where similarities differ by more than rounding."""
    count = 11
    found = person_reid_baseline.gnn_reranking(rows()[:count], rows()[count:], k1, k2)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.int64
    similarity = dense(rows(), count, k1, k2)
    assert (np.sort(found, axis=1) == np.arange(len(rows()) - count)).all()
    ordered = np.take_along_axis(similarity, found, axis=1)
    assert (np.diff(ordered, axis=1) < 1e-5).all()


def test_patch(tmp_path):
    """Its extensions are not compiled."""
    trainers.write(tmp_path, PACKAGE)
    packages = ("re_ranking", "gnn_reranking", "evaluate_rerank", "build_adjacency_matrix")
    ids = torch.arange(len(rows())) // 8
    with trainers.importable(tmp_path, *packages), compat.patch("person_reid_baseline", quiet=True):
        script = importlib.import_module("evaluate_rerank")
        assert script.re_ranking is person_reid_baseline.re_ranking
        order = script.gnn_reranking(rows()[:40:8], rows()[1:40:8], 6, 3)
    assert (ids[1:40:8][order[:, 0]] == ids[:40:8]).all()
    assert loops.squared_distances(rows()[:40:8], rows()[1:40:8]).argmin(1).tolist() == list(
        range(5)
    )
