"""fast-reid's distances, evaluation, mining and MoCo's queue: ours against loops."""

import importlib

import loops
import numpy as np
import pytest
import torch
import trainers
import transcribed
from torch.nn import functional as F

from pyreid import compat
from pyreid.compat import fast_reid

PACKAGE = {
    "fastreid/utils/compute_dist.py": """
import faiss

def compute_jaccard_distance(*_, **__): raise NotImplementedError
def build_dist(*_, **__): raise NotImplementedError
""",
    "fastreid/evaluation/rank.py": "def evaluate_rank(*_): raise NotImplementedError\n",
    "fastreid/evaluation/reid_evaluation.py": """
import numpy as np
from fastreid.utils.compute_dist import build_dist

def evaluate(queries, gallery, ids, lambda_value=0.3):
    dist = build_dist(queries, gallery, "cosine")
    rerank_dist = build_dist(queries, gallery, metric="jaccard", k1=10, k2=4)
    dist = rerank_dist * (1 - lambda_value) + dist * lambda_value
    from .rank import evaluate_rank
    cmc, all_AP, all_INP = evaluate_rank(dist, *ids)
    return {"Rank-1": cmc[0] * 100, "mAP": np.mean(all_AP) * 100, "mINP": np.mean(all_INP) * 100}
""",
}


def features(seed=0):
    return 2 * trainers.people(8, 5, 16, seed=seed) + 0.1  # not unit


@pytest.mark.parametrize("k1, k2, search_option", [(20, 6, 0), (6, 1, 3), (9, 3, 2)])
def test_compute_jaccard_distance(k1, k2, search_option):
    found = fast_reid.compute_jaccard_distance(features(), k1, k2, search_option)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    expected = transcribed.openunreid_jaccard(features(), k1, k2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    half = fast_reid.compute_jaccard_distance(features(), k1, k2, search_option, fp16=True)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, expected, atol=1e-3)


def test_build_dist():
    queries, gallery = features()[:11].requires_grad_(), features()[11:]
    squared = loops.squared_distances(queries.detach(), gallery)
    cosine = torch.stack([F.cosine_similarity(q[None], gallery) for q in queries.detach()])
    jaccard = transcribed.openunreid_jaccard(torch.cat([queries.detach(), gallery]), 10, 4)
    for found, expected in [
        (fast_reid.build_dist(queries, gallery), squared.numpy()),
        (fast_reid.build_dist(queries, gallery, "cosine"), 1 - cosine.numpy()),
        (fast_reid.build_dist(queries, gallery, "jaccard", k1=10, k2=4), jaccard[:11, 11:]),
    ]:
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"metric must be 'cosine', .* got 'manhattan'"):
        fast_reid.build_dist(queries, gallery, "manhattan")


def test_evaluate_rank():
    distance, ids = loops.problem(queries=30, people=40)  # some have no match
    cmc, ap, inp = loops.evaluated(distance, *ids, max_rank=20)
    found = fast_reid.evaluate_rank(distance, *ids, max_rank=20)
    assert len(ap) < 30
    assert all(x.dtype == np.float32 for x in found)
    for ours, theirs in zip(found, (cmc, ap, inp), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_evaluate_rank_of_cuhk03_has_two_results():
    distance, ids = loops.problem()
    np.random.seed(3)
    expected = loops.single_shot(distance, *ids)
    np.random.seed(3)
    cmc, mean_ap = fast_reid.evaluate_rank(distance, *ids, use_metric_cuhk03=True)
    np.testing.assert_allclose(cmc, expected, atol=1e-6)
    np.testing.assert_allclose(mean_ap, np.mean(loops.evaluated(distance, *ids)[1]), atol=1e-6)


def test_re_ranking():
    rows = features()
    queries, gallery = rows[:9], rows[9:]
    blocks = [
        torch.cdist(a, b).numpy() for a, b in [(queries, gallery), (queries,) * 2, (gallery,) * 2]
    ]
    found = fast_reid.re_ranking(*blocks, k1=12, k2=3, lambda_value=0.4)
    np.testing.assert_allclose(found, transcribed.re_ranking(*blocks, 12, 3, 0.4), atol=1e-5)


@pytest.mark.parametrize("sizes", [[4] * 5, [2, 5, 3]])
def test_hard_example_mining(sizes):
    """Against distances of another process's rows too, and of persons with different numbers of images."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    everybody = torch.cat([labels, labels.flip(0)])
    distance = torch.rand(len(labels), len(everybody), generator=torch.Generator().manual_seed(0))
    positive = labels[:, None] == everybody
    leaf = distance.clone().requires_grad_()
    found = fast_reid.hard_example_mining(leaf, positive, ~positive)
    expected = loops.mined(distance, positive.numpy(), ~positive.numpy())
    for ours, theirs in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (found[0] - 2 * found[1]).sum().backward()
    gradient = torch.zeros_like(distance)
    gradient[range(len(labels)), expected[2]] = 1
    gradient[range(len(labels)), expected[3]] = -2
    torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


def test_memory():
    """Over more batches than the queue holds: losses, gradients, and the queue itself."""
    torch.manual_seed(0)
    ours = fast_reid.Memory(dim=8, K=24)
    theirs = loops.MoCoMemory(ours.queue, ours.queue_label[0])
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        batch = torch.randn(8, 8, generator=generator)
        targets = torch.randint(0, 4, (8,), generator=generator)
        state = ours.state_dict()
        other = loops.MoCoMemory(theirs.queue, theirs.labels)
        other.begin = theirs.begin
        fresh = fast_reid.Memory(dim=8, K=24)
        fresh.load_state_dict(state)
        loops.same_loss(
            lambda x, m=fresh, t=targets: m(x, t), lambda x, m=other, t=targets: m(x, t), batch
        )
        ours, theirs = fresh, other
        torch.testing.assert_close(ours.queue, theirs.queue)
        assert torch.equal(ours.queue_label[0], theirs.labels)
        assert int(ours.queue_ptr) == theirs.begin
    with pytest.raises(AssertionError, match="K must be a multiple of 7 rows, got 24"):
        ours(torch.randn(7, 8), torch.zeros(7, dtype=torch.long))


def test_memory_under_autocast():
    """Half-precision products; what bars a column from the sum has no place in half precision."""
    memory = fast_reid.Memory(dim=8, K=16)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 0, 1])
    theirs = loops.MoCoMemory(memory.queue, memory.queue_label[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = memory(x, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs(x, targets), rtol=0.05, atol=0.05)


def test_a_row_without_other_positives_has_no_loss():
    memory = fast_reid.Memory(dim=4, K=8)
    memory.queue_label.fill_(5)
    x = torch.randn(2, 4, requires_grad=True)
    loss = memory(x, torch.tensor([0, 1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(2, 4))


def test_patch(tmp_path):
    """An evaluator that imports one name at the top and one when it runs; faiss is not installed."""
    trainers.write(tmp_path, PACKAGE)
    rows = features(seed=5)
    queries, gallery = rows[::4], rows[torch.arange(len(rows)) % 4 != 0]
    people = torch.arange(len(rows)) // 5
    cameras = torch.arange(len(rows)) % 3
    some = torch.arange(len(rows)) % 4 == 0
    ids = [x.numpy() for x in (people[some], people[~some], cameras[some], cameras[~some])]
    with trainers.importable(tmp_path, "fastreid", "faiss"), compat.patch("fast-reid", quiet=True):
        evaluator = importlib.import_module("fastreid.evaluation.reid_evaluation")
        found = evaluator.evaluate(queries, gallery, ids)
    count = len(queries)
    union = torch.cat([queries, gallery])
    jaccard = transcribed.openunreid_jaccard(union, 10, 4)[:count, count:]
    cosine = 1 - (F.normalize(queries) @ F.normalize(gallery).T).numpy()
    cmc, ap, inp = loops.evaluated(0.7 * jaccard + 0.3 * cosine, *ids)
    expected = {"Rank-1": cmc[0] * 100, "mAP": np.mean(ap) * 100, "mINP": np.mean(inp) * 100}
    assert found == pytest.approx(expected, abs=1e-3)
