"""SpCL's functions and its script's epoch, ours against what they compute."""

import numpy as np
import pytest
import torch
import trainers
import transcribed
from sklearn.cluster import DBSCAN
from torch.nn.functional import normalize

from pyreid.compat import spcl

PACKAGE = {
    "spcl/utils/faiss_utils.py": """
import faiss

def search_raw_array_pytorch(res, xb, xq, k, metric=faiss.METRIC_L2):
    return faiss.bruteForceKnn(res, metric)
""",
    "spcl/utils/faiss_rerank.py": """
import faiss
from .faiss_utils import search_raw_array_pytorch
import transcribed

def compute_jaccard_distance(
    target_features, k1=20, k2=6, print_flag=True, search_option=0, use_float16=False
):
    print("theirs")
    return transcribed.spcl_jaccard(target_features, k1, k2)
""",
    "spcl/models/hm.py": """
import transcribed

class HybridMemory(transcribed.HybridMemory):
    pass
""",
}
SCRIPT = """
import sys
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from spcl.models.hm import HybridMemory
from spcl.utils.faiss_rerank import compute_jaccard_distance
from trainers import people
from transcribed import unequal

if __name__ == "__main__":
    torch.manual_seed(0)
    images = people(12, 8, 24, seed=3)
    model = torch.nn.Linear(24, 16, bias=False)
    memory = HybridMemory(16, len(images), temp=0.05, momentum=0.2)
    memory.features = F.normalize(model(images).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    saved = {}
    for epoch in range(2):
        features = memory.features.clone()
        rerank_dist = compute_jaccard_distance(features, k1=10, k2=4)
        if epoch == 0:
            clusters = [DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1)
                        for eps in (0.6, 0.58, 0.62)]
        found = []
        for cluster in clusters:
            pseudo_labels = cluster.fit_predict(rerank_dist)
            num_ids = len(set(pseudo_labels)) - (1 if -1 in pseudo_labels else 0)
            alone = pseudo_labels == -1
            pseudo_labels[alone] = num_ids + np.arange(alone.sum())
            found.append(torch.Tensor(pseudo_labels).long())
        saved[f"labels {epoch}"] = torch.stack(found)
        saved[f"R_comp {epoch}"] = unequal(found[0], found[1])
        memory.labels = found[0]
        losses = []
        for step in range(4):
            indexes = torch.randint(len(images), (16,))
            loss = memory(F.normalize(model(images[indexes])), indexes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        saved[f"losses {epoch}"] = torch.stack(losses)
    saved["bank"], saved["weights"] = memory.features, model.weight.detach()
    torch.save(saved, sys.argv[1])
"""


@pytest.mark.parametrize("k1, k2", [(20, 6), (15, 1), (6, 3)])
def test_jaccard_distance(k1, k2):
    features = trainers.people(10, 9, 32, seed=0)
    ours = spcl.compute_jaccard_distance(features, k1=k1, k2=k2, search_option=3)
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, transcribed.spcl_jaccard(features, k1, k2), atol=1e-5)
    sparse = spcl.compute_jaccard_distance(features, k1, k2, False, 3, sparse=True)
    np.testing.assert_array_equal(np.asarray(sparse), ours)


def test_half_precision_and_words(capsys):
    features = trainers.people(4, 6, 8, seed=0)
    assert spcl.compute_jaccard_distance(features, 6, 2, True, 3, True).dtype == np.float16
    first, last = capsys.readouterr().out.splitlines()
    assert first == "Computing jaccard distance..."
    assert last.startswith("Jaccard distance computing time cost: ")
    spcl.compute_jaccard_distance(features, 6, 2, False)
    assert capsys.readouterr().out == ""


def memories(momentum=0.2, *, labels=None):
    bank = trainers.people(6, 5, 16, seed=1)
    both = [
        maker(16, len(bank), 0.05, momentum)
        for maker in (transcribed.HybridMemory, spcl.HybridMemory)
    ]
    for memory in both:
        memory.features = bank.clone()
        memory.labels = torch.arange(len(bank)) // 4 if labels is None else labels
    return both


@pytest.mark.parametrize("rows", [[3], [0, 4, 9, 21], [5, 5, 6, 5, 6, 30]])
def test_hybrid_memory(rows):
    theirs, ours = memories()
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    inputs = normalize(torch.randn(len(rows), 16, generator=torch.Generator().manual_seed(2)))
    found = []
    for memory in (theirs, ours):
        x = inputs.clone().requires_grad_()
        loss = memory(x, torch.tensor(rows))
        before = memory.features.clone()
        torch.testing.assert_close(before, memory.features)  # not yet
        (3 * loss).backward()
        found.append((loss.detach(), x.grad, memory.features))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_hybrid_memory_with_labels_left_out():
    """Labels that no image has, as after some images have become clusters of their own."""
    labels = torch.arange(33) // 3 * 2
    theirs, ours = memories(labels=labels)
    x = normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([0, 7, 7, 32])
    torch.testing.assert_close(ours(x, rows), theirs(x, rows), rtol=1e-5, atol=1e-5)


def test_a_hopeless_query_costs_what_it_does_there():
    """1e-6 within the logarithm bounds the loss, and so its gradient."""
    theirs, ours = memories()
    far = -theirs.features[:1].clone()
    gradients = []
    for memory in (theirs, ours):
        x = far.clone().requires_grad_()
        loss = memory(x, torch.tensor([0]))
        loss.backward()
        gradients.append(x.grad)
        assert 13 < loss < 13.9
    torch.testing.assert_close(*gradients[::-1], rtol=1e-4, atol=1e-5)


def test_without_gradient_nothing_moves():
    _, ours = memories()
    before = ours.features.clone()
    with torch.no_grad():
        ours(before[:3], torch.arange(3))
    assert torch.equal(ours.features, before)


def test_products():
    bank = trainers.people(4, 4, 8, seed=0)
    rows = torch.tensor([2, 2, 5])
    found = []
    for hm in (transcribed.Sequential.apply, spcl.hm):
        x, own = bank[:3].clone().requires_grad_(), bank.clone()
        products = hm(x, rows, own, 0.2)
        products.square().sum().backward()
        found.append((products.detach(), x.grad, own))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_reliability():
    labels, others = torch.randint(9, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(spcl.reliability(labels, others), transcribed.unequal(labels, others))


def test_re_ranking():
    features = trainers.people(8, 8, 24, seed=5)
    distance = torch.cdist(features, features).square()
    queries = 14
    blocks = (
        distance[:queries, queries:],
        distance[:queries, :queries],
        distance[queries:, queries:],
    )
    expected = transcribed.re_ranking(*(block.numpy() for block in blocks), 20, 6, 0.3)
    ours = spcl.re_ranking(blocks[0].numpy(), *blocks[1:], k1=20, k2=6, lambda_value=0.3)
    assert isinstance(ours, np.ndarray)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_dbscan_of_both_forms():
    features = trainers.people(10, 8, 24, seed=4, spread=0.5)
    dense = spcl.compute_jaccard_distance(features, 10, 4, False)
    sparse = spcl.compute_jaccard_distance(features, 10, 4, False, sparse=True)
    for eps in (0.4, 0.6, 0.62, 1.0):
        theirs = DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1).fit(dense)
        for distance in (dense, dense.astype(np.float64), sparse):
            ours = spcl.DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1)
            np.testing.assert_array_equal(ours.fit_predict(distance), theirs.labels_)
            np.testing.assert_array_equal(ours.core_sample_indices_, theirs.core_sample_indices_)
            assert ours.labels_.dtype == theirs.labels_.dtype


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_a_script(tmp_path, capsys, options):
    trainers.write(tmp_path, PACKAGE)
    plain = trainers.outcome(tmp_path, SCRIPT, "spcl")
    assert "theirs" in capsys.readouterr().out
    ours = trainers.outcome(tmp_path, SCRIPT, "spcl", *options, project="SpCL")
    captured = capsys.readouterr()
    assert "theirs" not in captured.out
    wanted = "compute_jaccard_distance" if options else "sparse_jaccard_distance"
    where = "spcl.utils.faiss_rerank.compute_jaccard_distance -> pyreid.compat._jaccard."
    assert where + wanted in captured.err
    assert len(plain["labels 0"].unique()) > 8
    trainers.same(plain, ours)
