"""GCL's memory, its rule for eps and its script's epoch, ours against what they compute."""

import pytest
import torch
import trainers
import transcribed
from torch.nn.functional import normalize

from pyreid.compat import gcl

PACKAGE = {
    "gcl/utils/faiss_rerank.py": """
import faiss
import transcribed

def compute_jaccard_distance(
    target_features, k1=20, k2=6, print_flag=True, search_option=0, use_float16=False
):
    return transcribed.spcl_jaccard(target_features, k1, k2)
""",
    "gcl/models/memory.py": """
import transcribed

class Memory(transcribed.Memory):
    pass
""",
    "gcl/trainer.py": """
import torch
from .models.memory import Memory

class DGNet_Trainer(torch.nn.Module):
    def __init__(self, id_net):
        super().__init__()
        self.id_net = id_net
        self.memory = Memory(2048, 12936, temp=0.04, momentum=0.2, K=60)
""",
}
SCRIPT = """
import sys
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from gcl.trainer import DGNet_Trainer
from gcl.utils.faiss_rerank import compute_jaccard_distance
from trainers import people

if __name__ == "__main__":
    torch.manual_seed(0)
    images = people(10, 12, 24, seed=3, spread=0.5)
    trainer = DGNet_Trainer(torch.nn.Linear(24, 16, bias=False))
    optimizer = torch.optim.SGD(trainer.id_net.parameters(), lr=1e-2)
    trainer.memory.features = F.normalize(trainer.id_net(images).detach())
    saved = {}
    for epoch in range(2):
        cf = trainer.memory.features.clone()
        # Without means over k2 neighbours, which make some distances 0 up to rounding: whether these count
        # as non-zero is left to chance, there and here.
        rerank_dist = compute_jaccard_distance(cf, k1=8, k2=1)
        tri_mat = np.triu(rerank_dist, 1)
        tri_mat = tri_mat[np.nonzero(tri_mat)]
        tri_mat = np.sort(tri_mat, axis=None)
        top_num = np.round(0.05 * tri_mat.size).astype(int)
        eps = tri_mat[:top_num].mean()
        cluster = DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1)
        labels = cluster.fit_predict(rerank_dist)
        trainer.memory.labels = torch.from_numpy(labels)
        kept = torch.nonzero(trainer.memory.labels >= 0)[:, 0]
        losses = []
        for step in range(4):
            index = kept[torch.randperm(len(kept))[:8]]
            f = F.normalize(trainer.id_net(images[index]))
            f_nv = F.normalize(trainer.id_net(images[index] + 0.1 * torch.randn(8, 24)))
            loss = trainer.memory(f, f_nv, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        saved |= {f"labels {epoch}": torch.from_numpy(labels), f"eps {epoch}": torch.tensor(eps)}
        saved[f"losses {epoch}"] = torch.stack(losses)
    saved["bank"], saved["weights"] = trainer.memory.features, trainer.id_net.weight.detach()
    torch.save(saved, sys.argv[1])
"""


def problem(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bank = normalize(torch.randn(size, 16, generator=generator))
    labels = torch.randint(-1, 6, (size,), generator=generator)
    rows = torch.nonzero(labels >= 0)[:, 0][[4, 9, 0, 4, 17]]  # one of them twice
    views = [normalize(torch.randn(5, 16, generator=generator)) for _ in range(2)]
    return bank, labels, rows, views


def test_memory():
    """The same random numbers, loss, gradients of both views, and rows, changed before backward."""
    bank, labels, rows, views = problem(70)
    found = []
    for maker in (transcribed.Memory, gcl.Memory):
        memory = maker(2048, 12936, temp=0.04, momentum=0.2, K=40)
        memory.features, memory.labels = bank.clone(), labels
        f, f_nv = (view.clone().requires_grad_() for view in views)
        torch.manual_seed(3)
        loss = memory(f, f_nv, rows)
        moved = memory.features.clone()
        assert not torch.equal(moved, bank)
        loss.backward()
        assert torch.equal(memory.features, moved)
        after = torch.randint(1000, ())  # the generator has gone as far
        found.append((loss.detach(), f.grad, f_nv.grad, moved, after))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_more_negatives_than_there_are():
    """Every image of its own label: all others are negatives, whatever is drawn."""
    bank, _, rows, views = problem(30)
    losses = []
    for make in (transcribed.Memory, gcl.Memory):
        memory = make(16, 30, K=8192)
        memory.features, memory.labels = bank.clone(), torch.arange(30)
        losses.append(memory(*views, rows))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_fast_draws():
    """Drawn otherwise, and alike: the loss over many draws has the mean that theirs has."""
    bank, labels, rows, views = problem(70)
    means = []
    for memory in (transcribed.Memory(16, 70, K=30), gcl.Memory(16, 70, K=30, fast_draws=True)):
        torch.manual_seed(0)
        losses = []
        for _ in range(200):
            memory.features, memory.labels = bank.clone(), labels
            losses.append(memory(*views, rows))
        losses = torch.stack(losses)
        means.append((losses.mean(), losses.std() / 200**0.5))
    (theirs, error), (ours, _) = means
    assert error > 0
    assert abs(theirs - ours) < 5 * error


@pytest.mark.parametrize("rho", [0.002, 0.05, 0.9, 1.0])
def test_eps_of_both_forms(rho):
    features = trainers.people(10, 8, 24, seed=4, spread=0.5)
    dense = gcl.compute_jaccard_distance(features, 10, 6, False)
    sparse = gcl.compute_jaccard_distance(features, 10, 6, False, sparse=True)
    expected = transcribed.rho_eps(dense, rho)
    assert transcribed.rho_eps(sparse, rho) == expected
    assert gcl.eps_from_rho(sparse, rho) == pytest.approx(expected, rel=1e-5)


def test_a_script(tmp_path):
    trainers.write(tmp_path, PACKAGE)
    plain = trainers.outcome(tmp_path, SCRIPT, "gcl")
    ours = trainers.outcome(tmp_path, SCRIPT, "gcl", project="gcl")
    assert len(plain["labels 0"].unique()) > 8
    trainers.same(plain, ours)
