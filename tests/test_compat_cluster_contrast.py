"""Cluster Contrast's functions and its script's epoch, ours against what they compute."""

import pytest
import torch
import trainers
import transcribed
from torch.nn.functional import normalize

from pyreid.compat import cluster_contrast

PACKAGE = {
    "clustercontrast/utils/faiss_rerank.py": """
import faiss
import transcribed

def compute_jaccard_distance(
    target_features, k1=20, k2=6, print_flag=True, search_option=0, use_float16=False
):
    return transcribed.spcl_jaccard(target_features, k1, k2)
""",
    "clustercontrast/models/cm.py": """
import transcribed

class ClusterMemory(transcribed.ClusterMemory):
    pass
""",
}
SCRIPT = """
import sys
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from clustercontrast.models.cm import ClusterMemory
from clustercontrast.utils.faiss_rerank import compute_jaccard_distance
from trainers import people
from transcribed import cluster_centres

def main_worker(use_hard):
    torch.manual_seed(0)
    images = people(12, 8, 24, seed=3)
    model = torch.nn.Linear(24, 16, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    saved = {}
    for epoch in range(2):
        with torch.no_grad():
            features = F.normalize(model(images))
            rerank_dist = compute_jaccard_distance(features, k1=10, k2=4)
            if epoch == 0:
                cluster = DBSCAN(eps=0.6, min_samples=4, metric="precomputed", n_jobs=-1)
            pseudo_labels = cluster.fit_predict(rerank_dist)
            num_cluster = len(set(pseudo_labels)) - (1 if -1 in pseudo_labels else 0)
        memory = ClusterMemory(16, num_cluster, temp=0.05, momentum=0.1, use_hard=use_hard)
        memory.features = F.normalize(cluster_centres(pseudo_labels, features), dim=1)
        labels = torch.from_numpy(pseudo_labels)
        kept = torch.nonzero(labels >= 0)[:, 0]
        losses = []
        for step in range(4):
            rows = kept[torch.randint(len(kept), (24,))]
            loss = memory(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        saved |= {f"labels {epoch}": labels, f"losses {epoch}": torch.stack(losses)}
    saved["bank"], saved["weights"] = memory.features, model.weight.detach()
    return saved

if __name__ == "__main__":
    torch.save(main_worker(use_hard=USE_HARD), sys.argv[1])
"""


@pytest.mark.parametrize("use_hard", [False, True])
def test_cluster_memory(use_hard):
    bank = trainers.people(6, 1, 16, seed=1)
    inputs = torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([3, 1, 3, 3, 8, 0, 1, 1, 8, 5, 5, 3])
    found = []
    for maker in (transcribed.ClusterMemory, cluster_contrast.ClusterMemory):
        memory = maker(16, len(bank), temp=0.05, momentum=0.1, use_hard=use_hard)
        assert list(dict(memory.named_buffers())) == ["features"]
        memory.features = bank.clone()
        x = inputs.clone().requires_grad_()
        loss = memory(x, targets)
        loss.backward()
        found.append((loss.detach(), x.grad, memory.features))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[1][2], bank)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (transcribed.Sequential, cluster_contrast.cm),
        (transcribed.Hardest, cluster_contrast.cm_hard),
        (transcribed.Hardest, cluster_contrast.CM_Hard.apply),
    ],
)
def test_products(theirs, ours):
    bank = trainers.people(4, 2, 8, seed=0)
    rows = torch.tensor([2, 2, 5, 2])
    found = []
    for products in (theirs.apply, ours):
        x, own = normalize(bank[:4] + bank[4:8]).requires_grad_(), bank.clone()
        out = products(x, rows, own, 0.3)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, own))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["numpy", "list", "tensor"])
def test_cluster_features(kind):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (40,), generator=generator)
    features = torch.randn(40, 8, generator=generator)
    given = {"numpy": labels.numpy(), "list": labels.tolist(), "tensor": labels}[kind]
    ours = cluster_contrast.generate_cluster_features(given, features)
    torch.testing.assert_close(ours, transcribed.cluster_centres(labels, features))


@pytest.mark.parametrize("use_hard", [False, True])
def test_a_script(tmp_path, use_hard):
    trainers.write(tmp_path, PACKAGE)
    script = SCRIPT.replace("USE_HARD", str(use_hard))
    plain = trainers.outcome(tmp_path, script, "clustercontrast")
    ours = trainers.outcome(tmp_path, script, "clustercontrast", project="cluster-contrast")
    assert len(plain["labels 0"].unique()) > 8
    trainers.same(plain, ours)
