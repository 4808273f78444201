"""open-metric-learning's retrieval and our postprocessor of it: against loops, within the package itself
where it is installed, and always within a small one of the same protocol."""

import importlib
import importlib.util
import types

import loops
import pytest
import torch
import trainers
import transcribed
from hypothesis import given
from hypothesis import strategies as st

from pyreid import compat
from pyreid.compat import open_metric_learning as ours

STAND_IN = {
    "oml/functional/knn.py": """
def batched_knn(*_, **__): raise NotImplementedError
def batched_knn_qg(*_, **__): raise NotImplementedError
""",
    "oml/interfaces/retrieval.py": """
class IRetrievalPostprocessor:
    def process(self, *args, **kwargs): raise NotImplementedError
""",
    "oml/retrieval/__init__.py": """
from oml.functional.knn import batched_knn

class RetrievalResults:
    def __init__(self, distances, retrieved_ids, gt_ids=None):
        assert all((d[1:] >= d[:-1]).all() for d in distances)
        assert all(len(r.unique()) == len(r) == len(d) for r, d in zip(retrieved_ids, distances))
        self.distances, self.retrieved_ids = tuple(distances), tuple(retrieved_ids)
        self.gt_ids = gt_ids and tuple(gt_ids)

    @classmethod
    def from_embeddings(cls, embeddings, dataset, n_items=100):
        distances, retrieved_ids, gt_ids = batched_knn(
            embeddings=embeddings,
            ids_query=dataset.get_query_ids(),
            ids_gallery=dataset.get_gallery_ids(),
            labels_gt=dataset.get_labels(),
            sequence_ids=None,
            top_n=n_items,
            verbose=False,
        )
        return cls(distances=distances, retrieved_ids=retrieved_ids, gt_ids=gt_ids)
""",
}


def installed():
    try:
        importlib.import_module("oml.retrieval")
    except ImportError:
        return False
    return True


@pytest.fixture(params=["stand-in", *(["installed"] if installed() else [])])
def oml(request, tmp_path, monkeypatch):
    """`.retrieval`, `.knn`, under our patch."""
    monkeypatch.delitem(vars(ours), "KReciprocalReranker", raising=False)
    if request.param == "stand-in":
        trainers.write(tmp_path, STAND_IN)
    with trainers.importable(tmp_path, "oml"), compat.patch("open-metric-learning", quiet=True):
        yield types.SimpleNamespace(
            retrieval=importlib.import_module("oml.retrieval"),
            interfaces=importlib.import_module("oml.interfaces"),
            interface=importlib.import_module("oml.interfaces.retrieval"),
            stand_in=request.param == "stand-in",
        )
    monkeypatch.delitem(vars(ours), "KReciprocalReranker", raising=False)


def by_hand(queries, gallery, top_n, labels=None, ids=None, sequences=None):
    """Per query: distances, retrieved rows, relevant rows."""
    found, truth = [], []
    distance = loops.squared_distances(queries.double(), gallery.double()).sqrt()
    for i in range(len(queries)):
        left_out = torch.zeros(len(gallery), dtype=torch.bool)
        for pair in (ids, sequences):
            if pair is not None:
                left_out |= pair[1] == pair[0][i]
        order = [j for j in distance[i].argsort(stable=True).tolist() if not left_out[j]][:top_n]
        found.append((distance[i, order].float(), torch.tensor(order, dtype=torch.long)))
        if labels is not None:
            truth.append(torch.where((labels[1] == labels[0][i]) & ~left_out)[0])
    return *(list(part) for part in zip(*found, strict=True)), truth or None


def agree(found, expected):
    for ours_, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-3)
        assert ours_.dtype == torch.float32
    for part in (1, 2):
        assert (found[part] is None) == (expected[part] is None)
        for ours_, theirs in zip(found[part] or [], expected[part] or [], strict=True):
            assert torch.equal(ours_, theirs)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 20), st.integers(1, 25))
@pytest.mark.parametrize("known", ["", "l", "i", "s", "li", "ls", "is", "lis"])
def test_batched_knn_qg(known, seed, queries, size, top_n):
    """Labels, ids (that repeat) and sequences (-1: unknown, is one too) in all mixtures."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(queries + size, 6, generator=generator)
    given_, meant = {}, {}
    for key, name in {"l": "labels", "i": "ids", "s": "sequence_ids"}.items():
        if key in known:
            values = torch.randint(-1, 5, (queries + size,), generator=generator)
            pair = values[:queries], values[queries:]
            given_ |= {f"{name}_query": pair[0], f"{name}_gallery": pair[1]}
            meant[name.removesuffix("_ids") + "s" * (key == "s")] = pair
    found = ours.batched_knn_qg(rows[:queries], rows[queries:], top_n, **given_)
    agree(found, by_hand(rows[:queries], rows[queries:], top_n, **meant))


@pytest.mark.parametrize("top_n", [1, 7, 500])
@pytest.mark.parametrize("sequences", [False, True])
def test_batched_knn(top_n, sequences):
    """Queries that are in the gallery, too."""
    rows = trainers.people(8, 5, 16, seed=4)
    labels = torch.arange(len(rows)) // 5
    of_sequence = torch.arange(len(rows)) // 2 if sequences else None
    query, gallery = torch.arange(0, len(rows), 3), torch.arange(len(rows) - 1, 5, -1)
    query = torch.cat([query, torch.arange(6)]).unique()
    found = ours.batched_knn(
        rows, query, gallery, top_n, sequence_ids=of_sequence, labels_gt=labels, bs=3, verbose=True
    )
    pairs = {"labels": (labels[query], labels[gallery]), "ids": (query, gallery)}
    if sequences:
        pairs["sequences"] = of_sequence[query], of_sequence[gallery]
    agree(found, by_hand(rows[query], rows[gallery], top_n, **pairs))


def test_says_what_is_missing():
    rows = torch.randn(4, 3)
    with pytest.raises(ValueError, match="labels_gallery must be given as the other is, got None"):
        ours.batched_knn_qg(rows, rows, 2, labels_query=torch.arange(4))


def data_set(oml, labels, query, gallery):
    """With queries and a gallery, as their RetrievalResults want it."""
    bases = [] if oml.stand_in else [oml.interfaces.datasets.IQueryGalleryLabeledDataset]
    methods = {
        "__len__": lambda self: len(labels),
        "__getitem__": lambda self, item: {},
        "get_query_ids": lambda self: query,
        "get_gallery_ids": lambda self: gallery,
        "get_labels": lambda self: labels,
        "extra_data": {},
    }
    return type("DataSet", tuple(bases), methods)()


def test_retrieval_and_re_ranking(oml):
    """Their results of our retrieval; then in our postprocessor's order, of what was retrieved."""
    rows = trainers.people(8, 5, 16, seed=5, spread=0.6)
    labels = torch.arange(len(rows)) // 5
    some = torch.arange(len(rows)) % 4 == 0
    query, gallery = torch.where(some)[0], torch.where(~some)[0]
    data = data_set(oml, labels, query, gallery)
    results = oml.retrieval.RetrievalResults.from_embeddings(rows, data, n_items=15)
    pairs = {"labels": (labels[query], labels[gallery]), "ids": (query, gallery)}
    expected = by_hand(rows[query], rows[gallery], 15, **pairs)
    agree((results.distances, results.retrieved_ids, results.gt_ids), expected)

    reranker = ours.KReciprocalReranker(rows, k1=10, k2=4, lambda_value=0.2)
    assert isinstance(reranker, oml.interface.IRetrievalPostprocessor)
    found = reranker.process(results, dataset=data)
    assert type(found) is oml.retrieval.RetrievalResults
    blocks = [
        torch.cdist(rows[a], rows[b]).numpy()
        for a, b in [(query, gallery), (query,) * 2, (gallery,) * 2]
    ]
    mixed = torch.from_numpy(transcribed.re_ranking(*blocks, 10, 4, 0.2))
    for i, retrieved in enumerate(results.retrieved_ids):
        assert sorted(found.retrieved_ids[i].tolist()) == sorted(retrieved.tolist())
        torch.testing.assert_close(
            found.distances[i], mixed[i, retrieved].sort().values, rtol=0, atol=1e-5
        )
        of_rows = mixed[i, found.retrieved_ids[i]]
        torch.testing.assert_close(of_rows, found.distances[i], rtol=0, atol=1e-5)
    assert found.gt_ids == results.gt_ids


def test_patch_is_undone(tmp_path):
    trainers.write(tmp_path, STAND_IN)
    with trainers.importable(tmp_path, "oml"):
        knn = importlib.import_module("oml.functional.knn")
        with compat.patch("oml", quiet=True):
            assert knn.batched_knn is ours.batched_knn
        with pytest.raises(NotImplementedError):
            knn.batched_knn()
