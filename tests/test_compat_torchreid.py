"""torchreid's evaluation, re-ranking and triplet loss: ours against loops, with the types that it passes."""

import importlib

import loops
import numpy as np
import pytest
import torch
import trainers
import transcribed
from hypothesis import given
from hypothesis import strategies as st

from pyreid import compat
from pyreid.compat import torchreid

PACKAGE = {
    "torchreid/reid/metrics/rank.py": "def evaluate_rank(*_, **__): raise NotImplementedError\n",
    "torchreid/reid/metrics/__init__.py": "from torchreid.reid.metrics.rank import evaluate_rank\n",
    "torchreid/reid/utils/rerank.py": "def re_ranking(*_): raise NotImplementedError\n",
    "torchreid/reid/utils/__init__.py": "from .rerank import re_ranking\n",
    "torchreid/reid/losses/hard_mine_triplet_loss.py": "class TripletLoss: pass\n",
    "torchreid/reid/losses/__init__.py": "from .hard_mine_triplet_loss import TripletLoss\n",
    "torchreid/reid/engine/engine.py": """
import torch
from torchreid.reid import metrics
from torchreid.reid.utils import re_ranking

def squared(a, b):
    return ((a[:, None] - b) ** 2).sum(2)

def test(qf, gf, *ids):
    distmat = re_ranking(squared(qf, gf).numpy(), squared(qf, qf), squared(gf, gf))
    return distmat, *metrics.evaluate_rank(distmat, *ids, use_metric_cuhk03=False)
""",
}


@pytest.mark.parametrize("seed, max_rank", [(0, 50), (1, 5), (2, 100)])
def test_evaluate_rank(seed, max_rank):
    distance, ids = loops.problem(seed=seed)
    cmc, ap, _ = loops.evaluated(distance, *ids, max_rank=max_rank)
    found, mean_ap = torchreid.evaluate_rank(distance, *ids, max_rank=max_rank)
    assert found.dtype == np.float32
    assert found.shape == (min(max_rank, 60),)
    assert isinstance(mean_ap, float)
    np.testing.assert_allclose(found, cmc, atol=1e-6)
    np.testing.assert_allclose(mean_ap, np.mean(ap), atol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30), st.integers(1, 6))
def test_evaluate_rank_of_any_size(seed, queries, size, people):
    distance, ids = loops.problem(queries, size, people, seed=seed)
    ids = [x - 1 for x in ids]  # -1 is a person like others
    if not list(loops.matches(distance, *ids)):
        with pytest.raises(AssertionError, match="no query has a match"):
            torchreid.evaluate_rank(distance, *ids)
        return
    cmc, ap, _ = loops.evaluated(distance, *ids)
    found, mean_ap = torchreid.evaluate_rank(distance, *ids)
    np.testing.assert_allclose(found, cmc, atol=1e-6)
    np.testing.assert_allclose(mean_ap, np.mean(ap), atol=1e-6)


@pytest.mark.parametrize("kind", ["lists", "tensors", "float64", "int32", "strided"])
def test_evaluate_rank_takes_what_it_is_given(kind):
    distance, ids = loops.problem(seed=3)
    expected = torchreid.evaluate_rank(distance, *ids)
    given = {
        "lists": lambda: (distance, *(x.tolist() for x in ids)),
        "tensors": lambda: (torch.from_numpy(distance), *(torch.from_numpy(x) for x in ids)),
        "float64": lambda: (distance.astype(np.float64), *ids),
        "int32": lambda: (distance, *(x.astype(np.int32) for x in ids)),
        "strided": lambda: (np.asfortranarray(distance), *(np.repeat(x, 2)[::2] for x in ids)),
    }[kind]()
    found = torchreid.evaluate_rank(*given)
    np.testing.assert_array_equal(found[0], expected[0])
    assert isinstance(found[0], np.ndarray)
    assert found[1] == expected[1]


def test_evaluate_rank_says_what_is_wrong():
    distance, ids = loops.problem()
    with pytest.raises(ValueError, match=r"evaluate_rank: g_pids must have shape \(60,\), got"):
        torchreid.evaluate_rank(distance, ids[0], ids[1][1:], *ids[2:])
    with pytest.raises(ValueError, match=r"distmat must have shape \(Q, G\), got \(60,\)"):
        torchreid.evaluate_rank(distance[0], *ids)


@pytest.mark.parametrize("people, max_rank", [(8, 50), (20, 5), (3, 2)])
def test_single_gallery_shot_draws_what_the_loop_draws(people, max_rank):
    distance, ids = loops.problem(people=people, seed=4)
    np.random.seed(7)
    expected = loops.single_shot(distance, *ids, max_rank=max_rank)
    state = np.random.get_state()
    np.random.seed(7)
    cmc, mean_ap = torchreid.evaluate_rank(distance, *ids, max_rank, use_metric_cuhk03=True)
    np.testing.assert_allclose(cmc, expected, atol=1e-6)
    assert cmc.dtype == np.float32
    assert len(cmc) == min(max_rank, len(set(ids[1])))
    np.testing.assert_allclose(mean_ap, np.mean(loops.evaluated(distance, *ids)[1]), atol=1e-6)
    assert np.random.get_state()[2] == state[2]  # as many numbers


def test_re_ranking_of_an_array_and_two_tensors():
    rows = trainers.people(6, 5, 16, seed=0)
    queries, gallery = rows[::4], rows[torch.arange(len(rows)) % 4 != 0]
    q_g, q_q, g_g = (
        torch.cdist(a, b) ** 2
        for a, b in [(queries, gallery), (queries, queries), (gallery, gallery)]
    )
    found = torchreid.re_ranking(q_g.numpy(), q_q, g_g)
    expected = transcribed.re_ranking(q_g.numpy(), q_q.numpy(), g_g.numpy(), 20, 6, 0.3)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", [[4] * 6, [1, 5, 3, 2]])
def test_triplet_loss(sizes):
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    inputs = torch.randn(len(targets), 12, generator=torch.Generator().manual_seed(0))
    for margin in (0.3, 3.0):
        loops.same_loss(
            lambda x, m=margin: torchreid.TripletLoss(m)(x, targets),
            lambda x, m=margin: loops.triplet_loss(x, targets, m),
            inputs,
        )


def test_triplet_loss_shares_the_gradient_of_ties():
    """Two equally far positives, two equally near negatives."""
    inputs = torch.tensor([[0.0, 0], [3, 0], [-3, 0], [0, 2], [0, -2]])
    targets = torch.tensor([0, 0, 0, 1, 2])
    loops.same_loss(
        lambda x: torchreid.TripletLoss(5.0)(x, targets),
        lambda x: loops.triplet_loss(x, targets, 5.0),
        inputs,
    )


def test_triplet_loss_of_one_class_is_nothing():
    inputs = torch.randn(4, 3, requires_grad=True)
    loss = torchreid.TripletLoss()(inputs, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(inputs.grad, torch.zeros(4, 3))


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("deep-person-reid", "torchreid"),
        ("FastReID", "fast_reid"),
        ("reid-strong-baseline", "strong_baseline"),
        ("TransReID", "strong_baseline"),
        ("Person_reID_baseline_pytorch", "person_reid_baseline"),
        ("PML", "pytorch_metric_learning"),
        ("open-metric-learning", "open_metric_learning"),
        ("lightly", "lightly"),
    ],
)
def test_projects_by_their_names(spelling, name):
    with compat.patch(spelling, quiet=True) as patched:
        assert patched.project == name
    assert name in compat.projects()


@pytest.mark.parametrize("before", [True, False])
def test_patch(tmp_path, before):
    """The names that an engine holds are swapped, imported before or after, and put back."""
    trainers.write(tmp_path, PACKAGE)
    rows = trainers.people(6, 5, 16, seed=1)
    queries, gallery = rows[:10], rows[10:]
    ids = [np.arange(len(x)) // 5 for x in (queries, gallery)]
    cameras = [np.arange(len(x)) % 3 for x in (queries, gallery)]
    with trainers.importable(tmp_path, "torchreid"):
        if before:
            importlib.import_module("torchreid.reid.engine.engine")
        with compat.patch("torchreid", quiet=True) as patched:
            engine = importlib.import_module("torchreid.reid.engine.engine")
            distance, cmc, mean_ap = engine.test(queries, gallery, ids[0], ids[1], *cameras)
            assert "torchreid.reid.metrics.rank.evaluate_rank" in patched.replaced
            losses = importlib.import_module("torchreid.reid.losses")
            assert losses.TripletLoss is torchreid.TripletLoss
        expected = loops.evaluated(distance, *ids, *cameras)
        np.testing.assert_allclose(mean_ap, np.mean(expected[1]), atol=1e-6)
        np.testing.assert_allclose(cmc, expected[0], atol=1e-6)
        with pytest.raises(NotImplementedError):
            engine.test(queries, gallery, ids[0], ids[1], *cameras)
