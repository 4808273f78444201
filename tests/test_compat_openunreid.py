"""OpenUnReID's distances, label generator and memory, ours against what they compute."""

import collections
import copy
import types

import numpy as np
import pytest
import torch
import trainers
import transcribed
from sklearn.cluster import DBSCAN
from torch.nn.functional import normalize

from pyreid.compat import openunreid, patch

PACKAGE = {
    "openunreid/core/utils/compute_dist.py": """
import faiss
import torch
import transcribed

@torch.no_grad()
def build_dist(cfg, feat_1, feat_2=None, dist_m=None, verbose=False):
    assert cfg.dist_metric == "jaccard"
    return compute_jaccard_distance(feat_1, k1=cfg.k1, k2=cfg.k2, search_option=cfg.search_type)

@torch.no_grad()
def compute_jaccard_distance(features, k1=20, k2=6, search_option=0, fp16=False, verbose=True):
    print("their distance")
    return transcribed.openunreid_jaccard(features, k1, k2)
""",
    "openunreid/core/label_generators/dbscan.py": """
from sklearn.cluster import DBSCAN
from ..utils.compute_dist import build_dist
import test_compat_openunreid as theirs

def label_generator_dbscan_single(cfg, features, dist, eps, **kwargs):
    return theirs.single(cfg, features, dist, eps, DBSCAN)

def label_generator_dbscan(cfg, features, cuda=True, indep_thres=None, **kwargs):
    dist = build_dist(cfg.TRAIN.PSEUDO_LABELS, features, verbose=True)
    return theirs.generator(cfg, features, dist, indep_thres, label_generator_dbscan_single)
""",
    "openunreid/core/label_generators/__init__.py": """
from .dbscan import label_generator_dbscan

class LabelGenerator(object):
    __factory = {"dbscan": label_generator_dbscan}

    def __init__(self, cfg):
        self.cfg = cfg

    def __call__(self, features, indep_thres):
        return self.__factory["dbscan"](self.cfg, features, cuda=False, indep_thres=indep_thres)
""",
    "openunreid/models/losses/memory.py": """
import test_compat_openunreid

class HybridMemory(test_compat_openunreid.HybridMemory):
    pass
""",
}
SCRIPT = """
import sys
import torch
from openunreid.core.label_generators import LabelGenerator
from openunreid.models.losses.memory import HybridMemory
from test_compat_openunreid import config
from trainers import people

if __name__ == "__main__":
    torch.manual_seed(0)
    images = people(12, 8, 24, seed=3)
    model = torch.nn.Linear(24, 16)
    memory = HybridMemory(16, len(images), temp=0.05, momentum=0.2)
    memory._update_feature(model(images).detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generate = LabelGenerator(config([0.6, 0.58, 0.62], True))
    saved, indep_thres = {}, None
    for epoch in range(2):
        labels, centers, classes, indep_thres = generate(memory.features.clone(), indep_thres)
        memory._update_label(labels)
        losses = []
        for step in range(4):
            rows = torch.randint(len(images), (16,))
            loss = memory({"feat": model(images[rows])}, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        saved |= {f"labels {epoch}": labels, f"centers {epoch}": centers}
        saved |= {f"losses {epoch}": torch.stack(losses), f"classes {epoch}": torch.tensor(classes)}
        saved[f"threshold {epoch}"] = torch.tensor(indep_thres)
    saved["bank"] = memory.features
    torch.save(saved, sys.argv[1])
"""


def config(eps, use_outliers):
    settings = types.SimpleNamespace(
        eps=eps, min_samples=4, use_outliers=use_outliers, k1=10, k2=4, search_type=0
    )
    settings.dist_metric, settings.dist_cuda, settings.cluster = "jaccard", False, "dbscan"
    return types.SimpleNamespace(TRAIN=types.SimpleNamespace(PSEUDO_LABELS=settings))


def single(cfg, features, dist, eps, cluster):
    """OpenUnReID's labels at one eps, their centres, and how many classes."""
    assert isinstance(dist, np.ndarray)
    settings = cfg.TRAIN.PSEUDO_LABELS
    found = cluster(eps=eps, min_samples=settings.min_samples, metric="precomputed", n_jobs=-1)
    labels = found.fit_predict(dist)
    count = len(set(labels)) - (1 if -1 in labels else 0)
    outliers = 0
    if settings.use_outliers:
        for i in np.flatnonzero(labels == -1):
            labels[i] = count + outliers
            outliers += 1
    labels = torch.from_numpy(labels).long()
    return labels, transcribed.cluster_centres(labels, features), count + outliers


def generator(cfg, features, dist, threshold, one=None):
    """OpenUnReID's label generator: one eps, or three with the criterion of reliability."""
    one = one or (lambda cfg, features, dist, eps: single(cfg, features, dist, eps, DBSCAN))
    eps = sorted(cfg.TRAIN.PSEUDO_LABELS.eps)
    if len(eps) == 1:
        return *one(cfg, features, dist, eps[0]), threshold
    tight = one(cfg, features, dist, eps[0])[0]
    labels, _, classes = one(cfg, features, dist, eps[1])
    loose = one(cfg, features, dist, eps[2])[0]
    comp, indep = transcribed.unequal(labels, tight), transcribed.unequal(labels, loose)
    scores = [collections.defaultdict(list) for _ in range(2)]
    for i, label in enumerate(labels.tolist()):
        scores[0][label].append(comp[i].item())
        scores[1][label].append(indep[i].item())
    sizes = {label: len(values) for label, values in scores[0].items()}
    least = [[min(score[label]) for label in sorted(score)] for score in scores]
    if threshold is None:
        several = [x for x, label in zip(least[1], sorted(sizes), strict=True) if sizes[label] > 1]
        place = min(len(several) - 1, int(np.round(len(several) * 0.9)))
        threshold = np.sort(several)[place]
    for i, label in enumerate(labels.tolist()):
        doubtful = least[1][label] > threshold or comp[i].item() > least[0][label]
        if label != -1 and doubtful and sizes[label] > 1:
            labels[i] = classes
            sizes[label] -= 1
            classes += 1
    return labels, transcribed.cluster_centres(labels, features), classes, threshold


class HybridMemory(transcribed.HybridMemory):
    """OpenUnReID's, of one process."""

    @torch.no_grad()
    def _update_feature(self, features):
        self.features.copy_(normalize(features))

    @torch.no_grad()
    def _update_label(self, labels):
        self.labels.copy_(labels)

    def forward(self, results, indexes):
        return super().forward(normalize(results["feat"]), indexes)


@pytest.mark.parametrize("k1, k2", [(20, 6), (10, 1)])
def test_jaccard_distance(k1, k2):
    features = 1.3 * trainers.people(10, 9, 32, seed=0)
    ours = openunreid.compute_jaccard_distance(features, k1, k2, 3, False, False)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, transcribed.openunreid_jaccard(features, k1, k2), atol=1e-5)


def test_build_dist():
    cfg = config([0.6], True).TRAIN.PSEUDO_LABELS
    a, b = trainers.people(3, 6, 16, seed=0), 2 * trainers.people(4, 6, 16, seed=1)
    squared = ((a[:, None] - b) ** 2).sum(dim=2).numpy()
    np.testing.assert_allclose(openunreid.build_dist(cfg, a, b, "euclidean"), squared, atol=1e-5)
    cosine = 1 - (normalize(a) @ normalize(b).T).numpy()
    np.testing.assert_allclose(openunreid.build_dist(cfg, a, b, "cosine"), cosine, atol=1e-6)
    whole = transcribed.openunreid_jaccard(torch.cat([a, b]), cfg.k1, cfg.k2)
    ours = openunreid.build_dist(cfg, a, b)
    np.testing.assert_allclose(ours, whole[: len(a), len(a) :], atol=1e-5)
    with pytest.raises(ValueError) as error:
        openunreid.build_dist(cfg, a, dist_m="manhattan")
    assert str(error.value) == (
        "build_dist: metric must be 'euclidean', 'cosine' or 'jaccard', got 'manhattan'"
    )


@pytest.mark.parametrize("use_outliers", [True, False])
@pytest.mark.parametrize("eps", [[0.5], [1.0], [0.5, 0.35, 0.65]])
def test_label_generator(eps, use_outliers):
    features = trainers.people(14, 8, 24, seed=4, spread=0.55)
    cfg = config(eps, use_outliers)
    settings = cfg.TRAIN.PSEUDO_LABELS
    dist = openunreid.compute_jaccard_distance(features, settings.k1, settings.k2, 3)
    threshold = None
    for _ in range(2):
        expected = generator(cfg, features, dist, threshold)
        ours = openunreid.label_generator_dbscan(cfg, features, False, threshold)
        assert settings.search_type == 3
        assert torch.equal(ours[0], expected[0])
        torch.testing.assert_close(ours[1], expected[1])
        assert ours[2:] == expected[2:]
        threshold = None if expected[3] is None else expected[3] / 2
    if len(eps) == 3:
        plain = single(cfg, features, dist, 0.5, DBSCAN)
        assert not torch.equal(plain[0], ours[0])  # some were taken apart


def test_hybrid_memory():
    rows = torch.tensor([5, 5, 6, 0, 5, 30])
    inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for maker in (HybridMemory, openunreid.HybridMemory):
        memory = maker(16, 33, temp=0.05, momentum=0.2)
        memory._update_feature(3 * trainers.people(6, 5, 16, seed=1))
        memory._update_label(torch.arange(33) // 4)
        x = inputs.clone().requires_grad_()
        loss = memory({"feat": x}, rows)
        loss.backward()
        found.append((loss.detach(), x.grad, memory.features))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_two_processes(tmp_path, processes):
    """Each bank moves by the features of both, in the order of ranks."""
    results = processes.Queue()
    arguments = [(rank, tmp_path / "store", results) for rank in range(2)]
    started = [processes.Process(target=trainers.rank_of_two, args=each) for each in arguments]
    for process in started:
        process.start()
    found = sorted((results.get(timeout=120) for _ in started), key=lambda each: each[0])
    for process in started:
        process.join()
        assert process.exitcode == 0
    inputs = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    memory = HybridMemory(16, 33)
    memory._update_feature(trainers.people(6, 5, 16, seed=1))
    memory._update_label(torch.arange(33) // 4)
    x = inputs.clone().requires_grad_()
    memory({"feat": x}, torch.tensor([5, 5, 6, 0, 5, 30])).backward()
    for rank, bank, gradient in found:
        np.testing.assert_allclose(bank, memory.features.numpy(), atol=1e-5)
        # Each process takes the mean over its own three images.
        expected = 2 * x.grad[3 * rank : 3 * rank + 3].numpy()
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_a_script(tmp_path, capsys, options):
    trainers.write(tmp_path, PACKAGE)
    plain = trainers.outcome(tmp_path, SCRIPT, "openunreid")
    assert "their distance" in capsys.readouterr().out
    ours = trainers.outcome(tmp_path, SCRIPT, "openunreid", *options, project="OpenUnReID")
    assert "their distance" not in capsys.readouterr().out
    trainers.same(plain, ours)


def test_patched_after_the_import(tmp_path):
    """The generator's table of functions holds theirs by then; what they call is ours all the same."""
    trainers.write(tmp_path, {**PACKAGE, "faiss.py": trainers.FAISS})
    features = trainers.people(12, 8, 24, seed=3)
    with trainers.importable(tmp_path, "openunreid", "faiss"):
        from openunreid.core.label_generators import LabelGenerator, dbscan

        cfg = config([0.6], True)
        plain = LabelGenerator(copy.deepcopy(cfg))(features, None)
        with patch("openunreid", quiet=True):
            assert dbscan.build_dist is openunreid.build_dist
            ours = LabelGenerator(cfg)(features, None)
        assert dbscan.build_dist is not openunreid.build_dist
    assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])
