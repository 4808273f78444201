"""Neighbours and a miner for pytorch-metric-learning: within the package itself where it is installed, and
always within a small one of the same protocol."""

import importlib
import importlib.util
import pickle
import subprocess
import sys
import types

import loops
import pytest
import torch
import trainers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pyreid import compat
from pyreid.compat import pytorch_metric_learning as ours

NAME = "pytorch_metric_learning"
STAND_IN = {
    f"{NAME}/distances.py": """
from torch.nn.functional import normalize

class Distance:
    def __init__(self, normalize_embeddings=True, p=2):
        self.normalize_embeddings, self.p = normalize_embeddings, p

    def maybe_normalize(self, x):
        return normalize(x, p=self.p) if self.normalize_embeddings else x

class DotProductSimilarity(Distance): pass
class CosineSimilarity(DotProductSimilarity): pass
class LpDistance(Distance): pass
""",
    f"{NAME}/miners.py": """
import torch

class BaseMiner(torch.nn.Module):
    def __init__(self, distance=None):
        super().__init__()
        self.distance = self.get_default_distance() if distance is None else distance

    def add_to_recordable_attributes(self, list_of_names, is_stat): pass

    def forward(self, embeddings, labels, ref_emb=None, ref_labels=None):
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        with torch.no_grad():
            found = self.mine(embeddings, labels, ref_emb, ref_labels)
        assert len(found) == 4 and len(found[0]) == len(found[1]) and len(found[2]) == len(found[3])
        return found
""",
    f"{NAME}/losses.py": """
import torch

class ContrastiveLoss(torch.nn.Module):
    def __init__(self, pos_margin, neg_margin, distance):
        super().__init__()
        self.margins, self.distance = (pos_margin, neg_margin), distance

    def forward(self, embeddings, labels, indices, ref_emb, ref_labels):
        x, y = (self.distance.maybe_normalize(z) for z in (embeddings, ref_emb))
        a, p, b, n = indices
        terms = self.margins[0] - (x[a] * y[p]).sum(1), (x[b] * y[n]).sum(1) - self.margins[1]
        return sum(t.relu().sum() / max(int((t > 0).sum()), 1) for t in terms)

class CrossBatchMemory(torch.nn.Module):
    def __init__(self, loss, embedding_size, memory_size, miner=None):
        super().__init__()
        self.loss, self.miner, self.size = loss, miner, memory_size
        self.rows, self.labels = torch.zeros(0, embedding_size), torch.zeros(0, dtype=torch.long)

    def forward(self, embeddings, labels):
        self.rows = torch.cat([self.rows, embeddings.detach()])[-self.size :]
        self.labels = torch.cat([self.labels, labels])[-self.size :]
        if self.miner:
            pairs = self.miner(embeddings, labels, self.rows, self.labels)
        else:
            same = labels[:, None] == self.labels
            pairs = (*torch.where(same), *torch.where(~same))
        own = pairs[1] != len(self.rows) - len(labels) + pairs[0]
        pairs = pairs[0][own], pairs[1][own], *pairs[2:]
        return self.loss(embeddings, labels, pairs, self.rows, self.labels)
""",
    f"{NAME}/utils/inference.py": """
class FaissKNN:
    def __init__(self, **_): raise NameError("name 'faiss' is not defined")

class InferenceModel:
    def __init__(self, trunk, knn_func=None):
        self.trunk = trunk
        self.knn_func = knn_func or FaissKNN(reset_before=False, reset_after=False)

    def get_embeddings(self, x):
        return self.trunk(x) / self.trunk(x).norm(dim=1, keepdim=True)

    def train_knn(self, inputs): self.knn_func.train(self.get_embeddings(inputs))
    def add_to_knn(self, inputs): self.knn_func.add(self.get_embeddings(inputs))
    def get_nearest_neighbors(self, query, k): return self.knn_func(self.get_embeddings(query), k)
    def save_knn_func(self, filename): self.knn_func.save(filename)
    def load_knn_func(self, filename): self.knn_func.load(filename)
""",
    f"{NAME}/utils/accuracy_calculator.py": """
import torch
from .inference import FaissKNN

class AccuracyCalculator:
    def __init__(self, include=(), k=None, device=None, knn_func=None):
        self.k, self.knn_func = k, knn_func or FaissKNN()

    def get_accuracy(self, query, labels, reference=None, ref_labels=None, ref_includes_query=False):
        if reference is None:
            reference, ref_labels, ref_includes_query = query, labels, True
        _, rows = self.knn_func(query, self.k, reference, ref_includes_query)
        hits = ref_labels[rows] == labels[:, None]
        upto = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
        return {"precision_at_1": hits[:, 0].double().mean().item(), "map": (upto * hits).mean().item()}
""",
}
HERE = ["stand-in", *(["installed"] if importlib.util.find_spec(NAME) else [])]


@pytest.fixture(params=HERE)
def pml(request, tmp_path, monkeypatch):
    """Its modules by name; our miner made anew of them."""
    monkeypatch.delitem(vars(ours), "TopKNegativeMiner", raising=False)
    if request.param == "stand-in":
        trainers.write(tmp_path, STAND_IN)
    with trainers.importable(tmp_path, NAME):
        parts = ("distances", "losses", "utils.inference", "utils.accuracy_calculator")
        found = {part.split(".")[-1]: importlib.import_module(f"{NAME}.{part}") for part in parts}
        yield types.SimpleNamespace(**found, stand_in=request.param == "stand-in")
    monkeypatch.delitem(vars(ours), "TopKNegativeMiner", raising=False)


def brute(query, k, reference, ref_includes_query=False):
    """Squared distances, sorted, without the query's own row."""
    distance = loops.squared_distances(query.double(), reference.double())
    if ref_includes_query:
        distance[range(len(query)), range(len(query))] = torch.inf
    found = distance.sort(dim=1, stable=True)
    return found.values[:, :k].float(), found.indices[:, :k]


def agree(found, expected, query, reference):
    """Distances, and those of the rows that are named: rounding may exchange rows at one distance."""
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    named = (query[:, None] - reference[found[1]]).square().sum(-1)
    torch.testing.assert_close(named, expected[0], rtol=1e-4, atol=1e-4)


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 30),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)
def test_neighbours(seed, queries, more, k, unit, includes):
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(queries + more, 5, generator=generator)
    reference = F.normalize(reference) if unit else reference * 3
    query = reference[:queries] if includes else torch.randn(queries, 5, generator=generator)
    k = min(k, len(reference) - includes)
    found = ours.FaissKNN()(query, k, reference, includes)
    assert found[0].shape == found[1].shape == (queries, k)
    agree(found, brute(query, k, reference, includes), query, reference)
    if includes:
        assert (found[1] != torch.arange(queries)[:, None]).all()


@pytest.mark.parametrize("unit", [True, False])
def test_neighbours_among_themselves(unit):
    rows = trainers.people(10, 6, 16, seed=0) * (1 if unit else torch.linspace(1, 2, 65)[:, None])
    agree(ours.FaissKNN()(rows, 7, rows, True), brute(rows, 7, rows, True), rows, rows)


def test_equal_rows_and_too_few():
    rows = torch.ones(5, 3)
    distances, found = ours.FaissKNN()(rows, 2, rows, True)
    assert found.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    assert torch.equal(distances, torch.zeros(5, 2))
    distances, found = ours.FaissKNN()(rows[:1], 7, rows)
    assert found.tolist() == [[0, 1, 2, 3, 4, -1, -1]]
    assert (distances[0, 5:] == torch.finfo(torch.float32).max).all()  # as faiss has it


def test_what_is_added_and_kept(tmp_path):
    rows = trainers.people(6, 4, 8, seed=1)
    knn = ours.FaissKNN(reset_before=False, reset_after=False)
    with pytest.raises(ValueError, match="reference must be given, or train"):
        knn(rows, 2)
    knn.train(rows[:10].numpy())
    knn.add(rows[10:])
    expected = brute(rows, 3, rows)
    agree(knn(rows, 3), expected, rows, rows)
    knn.save(str(tmp_path / "index"))
    other = ours.FaissKNN(reset_before=False)
    other.load(str(tmp_path / "index"))
    agree(other(rows, 3), expected, rows, rows)
    with pytest.raises(ValueError, match="reference must be given"):  # reset_after
        other(rows, 3)


def test_what_has_no_counterpart():
    with pytest.raises(ValueError, match="index_init_fn must be None"):
        ours.FaissKNN(index_init_fn=dict)
    with pytest.raises(TypeError, match="gpus must be a list, got 1"):
        ours.FaissKNN(gpus=1)
    with pytest.raises(ValueError, match="gpus must have at least one"):
        ours.FaissKNN(gpus=[])
    with pytest.raises(AttributeError, match="no attribute 'KMeans'"):
        _ = ours.KMeans


@pytest.mark.parametrize("apart", [False, True])
def test_accuracy(pml, apart):
    """The same metrics as with a brute-force knn_func."""
    rows = trainers.people(8, 6, 12, seed=2, spread=0.8)
    labels = torch.arange(len(rows)) // 6
    given = (rows[::3], labels[::3], rows, labels, False) if apart else (rows, labels)
    include = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    found = [
        pml.accuracy_calculator.AccuracyCalculator(
            include=include, k=5, device=torch.device("cpu"), knn_func=knn
        ).get_accuracy(*given)
        for knn in (ours.FaissKNN(), brute)
    ]
    assert found[0] == pytest.approx(found[1], nan_ok=True)
    assert len(found[0]) >= 2


def test_patch(pml, tmp_path):
    """A model for inference makes a FaissKNN of its own: ours."""
    images = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with compat.patch("pytorch-metric-learning", quiet=True) as patched:
        assert pml.accuracy_calculator.FaissKNN is ours.FaissKNN  # held by name
        assert f"{NAME}.utils.inference.FaissKNN" in patched.replaced
        on_cpu = {} if pml.stand_in else {"data_device": torch.device("cpu")}
        model = pml.inference.InferenceModel(torch.nn.Linear(8, 4), **on_cpu)
        assert isinstance(model.knn_func, ours.FaissKNN)
        with torch.no_grad():
            model.train_knn(images[:12])
            model.add_to_knn(images[12:])
            rows = model.get_embeddings(images)
            agree(model.get_nearest_neighbors(images, 3), brute(rows, 3, rows), rows, rows)
            model.save_knn_func(str(tmp_path / "knn"))
            model.load_knn_func(str(tmp_path / "knn"))
            agree(model.get_nearest_neighbors(images, 3), brute(rows, 3, rows), rows, rows)
    assert pml.inference.FaissKNN is not ours.FaissKNN


def batch(seed, count=16, dim=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (count,), generator=generator)
    return torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("memory", [None, 40])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_miner_takes_the_nearest_of_other_labels(pml, memory, k):
    rows, labels = batch(0)
    reference = () if memory is None else batch(1, memory)
    miner = ours.TopKNegativeMiner(k)
    anchors, positives, others, negatives = miner(rows, labels, *reference)
    bank, of_bank = reference or (rows, labels)
    cosine = F.normalize(rows) @ F.normalize(bank).T
    expected_pairs, expected = [], []
    for i in range(len(rows)):
        same = of_bank == labels[i]
        expected_pairs += [(i, int(j)) for j in torch.where(same)[0] if memory or j != i]
        order = cosine[i].masked_fill(same, -9).argsort(descending=True)
        expected += [(i, int(j)) for j in order[: min(k, int((~same).sum()))]]
    assert list(zip(anchors.tolist(), positives.tolist(), strict=True)) == expected_pairs
    assert list(zip(others.tolist(), negatives.tolist(), strict=True)) == expected


def test_with_all_negatives_nothing_changes(pml):
    """CrossBatchMemory with the miner and without: losses, gradients, over more than the memory holds."""
    distance = pml.distances.CosineSimilarity()
    made = [
        pml.losses.CrossBatchMemory(
            pml.losses.ContrastiveLoss(pos_margin=0.9, neg_margin=0.2, distance=distance),
            *(6, 48),
            miner=miner,
        )
        for miner in (ours.TopKNegativeMiner(48), None)
    ]
    for step in range(5):
        rows, labels = batch(step)
        loops.same_loss(*(lambda x, m=m, y=labels: m(x, y) for m in made), rows)


def test_fewer_negatives_are_the_hardest(pml):
    """With a margin that only the nearest exceed, leaving out the others changes no loss either."""
    rows, labels = batch(2, count=32)
    bank, of_bank = batch(3, count=64)
    cosine = (F.normalize(rows) @ F.normalize(bank).T).masked_fill(labels[:, None] == of_bank, -9)
    margin = float(cosine.topk(9, dim=1).values[:, 8].max()) + 1e-5  # at most 8 of a row exceed it
    loss = pml.losses.ContrastiveLoss(
        pos_margin=1, neg_margin=margin, distance=pml.distances.CosineSimilarity()
    )
    same = labels[:, None] == of_bank
    every = (*torch.where(same), *torch.where(~same))
    few = ours.TopKNegativeMiner(8)(rows, labels, bank, of_bank)
    assert len(few[2]) < len(every[2]) / 3
    loops.same_loss(*(lambda x, p=p: loss(x, labels, p, bank, of_bank) for p in (few, every)), rows)


def test_miner_is_one_of_theirs(pml):
    miner = ours.TopKNegativeMiner(7, distance=pml.distances.LpDistance())
    assert isinstance(miner, importlib.import_module(f"{NAME}.miners").BaseMiner)
    assert ours.TopKNegativeMiner is type(miner)
    assert pickle.loads(pickle.dumps(miner)).k == 7
    with pytest.raises(ValueError, match="distance must be CosineSimilarity"):
        ours.TopKNegativeMiner(distance=pml.distances.LpDistance(normalize_embeddings=False))


def test_without_the_package(monkeypatch):
    for package in (NAME, f"{NAME}.distances", "oml", "oml.interfaces.retrieval"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(vars(ours), "TopKNegativeMiner", raising=False)
    with pytest.raises(ImportError, match="pip install pytorch-metric-learning"):
        _ = ours.TopKNegativeMiner
    from pyreid.compat import open_metric_learning

    monkeypatch.delitem(vars(open_metric_learning), "KReciprocalReranker", raising=False)
    with pytest.raises(ImportError, match="pip install open-metric-learning"):
        _ = open_metric_learning.KReciprocalReranker


def test_importing_ours_imports_none_of_theirs():
    modules = ("fast_reid", "torchreid", "strong_baseline", NAME, "open_metric_learning", "lightly")
    code = "import sys\n" + "".join(f"import pyreid.compat.{name}\n" for name in modules)
    code += f"theirs = {{'oml', 'sklearn', 'faiss', 'torchreid', 'lightly', '{NAME}'}}\n"
    code += "print(sorted(theirs & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
