"""ICE's losses and its script's epoch, ours against what they compute."""

import copy

import numpy as np
import pytest
import torch
import trainers
import transcribed
from torch.nn import functional as F

from pyreid import ops
from pyreid.compat import ice

PACKAGE = {
    "ice/utils/faiss_rerank.py": """
import faiss
import transcribed

def compute_jaccard_distance(
    target_features, k1=20, k2=6, print_flag=True, search_option=0, use_float16=False
):
    return transcribed.spcl_jaccard(target_features, k1, k2)
""",
    "ice/loss/__init__.py": "from .contrastive import ViewContrastiveLoss\n",
    "ice/loss/contrastive.py": """
import test_compat_ice

class ViewContrastiveLoss(test_compat_ice.ViewContrast):
    pass
""",
    "ice/trainers.py": """
import torch
import torch.nn.functional as F
from ice.loss import ViewContrastiveLoss

class ImageTrainer(object):
    def __init__(self, model, model_ema):
        self.model, self.model_ema = model, model_ema
        self.vcloss = ViewContrastiveLoss(num_instance=4, T=0.1)

    def train(self, images, labels, optimizer):
        losses = []
        for step in range(4):
            chosen = torch.randperm(int(labels.max()) + 1)[:6]
            rows = torch.cat([torch.nonzero(labels == one)[:4, 0] for one in chosen])
            with torch.no_grad():
                teacher = F.normalize(self.model_ema(images[rows]))
            loss = self.vcloss(F.normalize(self.model(images[rows])), teacher, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self._update_ema_variables(self.model, self.model_ema, 0.9, step)
            losses.append(loss.detach())
        return torch.stack(losses)

    def _update_ema_variables(self, model, ema_model, alpha, global_step):
        print("their average")
        for average, parameter in zip(ema_model.parameters(), model.parameters()):
            average.data.copy_(alpha * average.data + (1 - alpha) * parameter.data)
""",
}
SCRIPT = """
import copy
import sys
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from ice.trainers import ImageTrainer
from ice.utils.faiss_rerank import compute_jaccard_distance
from trainers import people

if __name__ == "__main__":
    torch.manual_seed(0)
    images = people(12, 8, 24, seed=3)
    model = torch.nn.Linear(24, 16)
    model_ema = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    saved = {}
    for epoch in range(2):
        cf = F.normalize(model_ema(images).detach())
        rerank_dist = compute_jaccard_distance(cf, k1=10, k2=6)
        cluster = DBSCAN(eps=0.55, min_samples=4, metric="precomputed", n_jobs=-1)
        labels = torch.from_numpy(cluster.fit_predict(rerank_dist))
        trainer = ImageTrainer(model, model_ema)
        saved[f"labels {epoch}"] = labels
        saved[f"losses {epoch}"] = trainer.train(images, labels, optimizer)
    saved["average"] = model_ema.weight.detach()
    torch.save(saved, sys.argv[1])
"""


class ViewContrast(torch.nn.Module):
    """ICE's: two full sorts, and as many negatives for every image."""

    def __init__(self, num_instance=4, T=1.0):
        super().__init__()
        self.T = T

    def forward(self, q, k, label):
        similarity = q @ k.T
        same = label[:, None] == label
        hardest = self.batch_hard(similarity, same.float(), True)[0]
        negatives = similarity[~same].reshape(len(q), -1)
        logits = torch.cat([hardest[:, None], negatives], dim=1) / self.T
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))

    def batch_hard(self, mat_sim, mat_eq, indice=False):
        up, p = torch.sort(mat_sim + 9999999.0 * (1 - mat_eq), dim=1)
        down, n = torch.sort(mat_sim - 9999999.0 * mat_eq, dim=1, descending=True)
        found = up[:, 0], down[:, 0], p[:, 0], n[:, 0]
        return found if indice else found[:2]


def views(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, 16, generator=generator)) for _ in range(2)]


def test_view_contrast():
    q, k = views(24, 0)
    labels = torch.arange(24) // 4
    found = []
    for maker in (ViewContrast, ice.ViewContrastiveLoss):
        x = q.clone().requires_grad_()
        loss = maker(num_instance=4, T=0.1)(x, k, labels)
        loss.backward()
        found.append((loss.detach(), x.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_view_contrast_of_uneven_clusters():
    """Where theirs cannot make a rectangle: each image by itself, by the same formula."""
    q, k = views(7, 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    terms = []
    for i, similarity in enumerate(q @ k.T):
        same = labels == labels[i]
        logits = torch.cat([similarity[same].min()[None], similarity[~same]]) / 0.1
        terms.append(-F.log_softmax(logits, dim=0)[0])
    ours = ice.ViewContrastiveLoss(T=0.1)(q, k, labels)
    torch.testing.assert_close(ours, torch.stack(terms).mean())


@pytest.mark.parametrize("indice", [False, True])
def test_batch_hard(indice):
    q, k = views(20, 2)
    same = (torch.arange(20)[:, None] // 5 == torch.arange(20) // 5).float()
    expected = ViewContrast().batch_hard(q @ k.T, same, indice)
    ours = ice.ViewContrastiveLoss().batch_hard(q @ k.T, same, indice)
    assert len(ours) == (4 if indice else 2)
    for got, wanted in zip(ours, expected, strict=True):
        assert torch.equal(got, wanted)


def camera_loss(features, targets, cameras, proxies, labels, beta, bg_knn):
    """ICE's loop: camera by camera, image by image; a sort of all proxies for each."""
    total = 0.0
    for camera in torch.unique(cameras):
        members = torch.nonzero(cameras == camera)[:, 0]
        similarity = F.normalize(features[members]) @ F.normalize(proxies.T)
        part = 0.0
        for row, target in zip(similarity, targets[members], strict=True):
            positive = torch.nonzero(labels == target)[:, 0]
            masked = row.detach().clone()
            masked[positive] = -10000.0
            hardest = torch.sort(masked)[1][-bg_knn:]
            logits = torch.cat([row[positive], row[hardest]]) / beta
            part = part - F.log_softmax(logits, dim=0)[: len(positive)].mean()
        total = total + 0.5 * part / len(members)
    return total


def test_camera_loss():
    generator = torch.Generator().manual_seed(0)
    images = trainers.people(20, 9, 24, seed=6)
    clusters = torch.cat([torch.arange(180) // 9, torch.full((10,), -1)])
    cameras = torch.randint(3, (190,), generator=generator)
    means = ops.class_means(images, clusters, cameras, normalize=True)
    batch = torch.randperm(180, generator=generator)[:16]
    features = torch.randn(16, 24, generator=generator)
    found = []
    for ours in (False, True):
        x = features.clone().requires_grad_()
        ids = clusters[batch], cameras[batch]
        if ours:
            loss = ice.CameraLoss(means.means, means.labels, beta=0.07, bg_knn=20)(x, *ids)
        else:
            loss = camera_loss(x, *ids, means.means, means.labels, 0.07, 20)
        loss.backward()
        found.append((loss.detach(), x.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_moving_average(device, request):
    if device == "cuda":
        request.getfixturevalue("cuda")
    model, average = (
        torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)).to(device)
        for _ in range(2)
    )
    theirs = copy.deepcopy(average)
    for old, new in zip(theirs.parameters(), model.parameters(), strict=True):
        old.data.mul_(0.999).add_(new.data, alpha=1 - 0.999)
    ice.update_ema_variables(None, model, average, 0.999, 0)
    for ours, expected in zip(average.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_jaccard_distance_of_k2_1():
    features = trainers.people(6, 6, 16, seed=0)
    ours = ice.compute_jaccard_distance(features, k1=8, k2=1, print_flag=False)
    np.testing.assert_allclose(ours, transcribed.spcl_jaccard(features, 8, 1), atol=1e-5)


def test_a_script(tmp_path, capsys):
    trainers.write(tmp_path, PACKAGE)
    plain = trainers.outcome(tmp_path, SCRIPT, "ice")
    assert "their average" in capsys.readouterr().out
    ours = trainers.outcome(tmp_path, SCRIPT, "ice", project="ICE")
    assert "their average" not in capsys.readouterr().out
    assert len(plain["labels 0"].unique()) > 8
    trainers.same(plain, ours)
