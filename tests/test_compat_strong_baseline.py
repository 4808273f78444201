"""reid-strong-baseline's evaluation, re-ranking and mining: ours against loops."""

import importlib

import loops
import numpy as np
import pytest
import torch
import trainers

from pyreid import compat
from pyreid.compat import strong_baseline

PACKAGE = {
    "data/datasets/eval_reid.py": "def eval_func(*_): raise NotImplementedError\n",
    "utils/re_ranking.py": "def re_ranking(*_, **__): raise NotImplementedError\n",
    "utils/reid_metric.py": """
import numpy as np
import torch
from data.datasets.eval_reid import eval_func
from .re_ranking import re_ranking

class R1_mAP_reranking:
    def __init__(self, num_query):
        self.num_query = num_query
        self.feats, self.pids, self.camids = [], [], []

    def update(self, output):
        feat, pid, camid = output
        self.feats.append(feat)
        self.pids.extend(np.asarray(pid))
        self.camids.extend(np.asarray(camid))

    def compute(self):
        feats = torch.nn.functional.normalize(torch.cat(self.feats))
        n = self.num_query
        distmat = re_ranking(feats[:n], feats[n:], k1=20, k2=6, lambda_value=0.3)
        pids, camids = np.asarray(self.pids), np.asarray(self.camids)
        return eval_func(distmat, pids[:n], pids[n:], camids[:n], camids[n:])
""",
    "layers/triplet_loss.py": """
import torch

def euclidean_dist(x, y): raise NotImplementedError
def hard_example_mining(*_): raise NotImplementedError

class TripletLoss:
    def __call__(self, global_feat, labels):
        dist_ap, dist_an = hard_example_mining(euclidean_dist(global_feat, global_feat), labels)
        return torch.nn.functional.margin_ranking_loss(
            dist_an, dist_ap, torch.ones_like(dist_an), margin=0.3
        )
""",
}


def test_eval_func():
    distance, ids = loops.problem(seed=6)
    cmc, ap, _ = loops.evaluated(distance, *ids, max_rank=10)
    found, mean_ap = strong_baseline.eval_func(distance, *ids, max_rank=10)
    np.testing.assert_allclose(found, cmc, atol=1e-6)
    assert mean_ap == pytest.approx(np.mean(ap), abs=1e-6)


@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0.3), (7, 1, 0.0), (25, 4, 0.8)])
@pytest.mark.parametrize("local", ["none", "added", "only"])
def test_re_ranking(k1, k2, lambda_value, local):
    rows = trainers.people(8, 5, 16, seed=2)
    distance = loops.squared_distances(rows, rows).numpy()
    other = loops.squared_distances(rows[:, :3], rows[:, :3]).numpy() * 2
    given = {"none": {}, "added": {"local_distmat": other}}.get(
        local, {"local_distmat": other, "only_local": True}
    )
    meant = {"none": distance, "added": distance + other, "only": other}[local]
    found = strong_baseline.re_ranking(rows[:10], rows[10:], k1, k2, lambda_value, **given)
    assert isinstance(found, np.ndarray)
    assert found.shape == (10, len(rows) - 10)
    expected = loops.strong_baseline_re_ranking(meant, 10, k1, k2, lambda_value)
    np.testing.assert_allclose(
        found, expected, atol=4e-3
    )  # theirs is in half precision, as is ours


@pytest.mark.parametrize("sizes", [[4] * 5, [2, 5, 3]])
def test_hard_example_mining(sizes):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    distance = strong_baseline.euclidean_dist(rows, rows)
    torch.testing.assert_close(distance.fill_diagonal_(0), torch.cdist(rows, rows))
    same = (labels[:, None] == labels).numpy()
    found = strong_baseline.hard_example_mining(distance, labels, return_inds=True)
    for ours, theirs in zip(found, loops.mined(distance, same, ~same), strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=0)
    assert len(strong_baseline.hard_example_mining(distance, labels)) == 2


def test_patch(tmp_path):
    trainers.write(tmp_path, PACKAGE)
    rows = trainers.people(8, 5, 16, seed=3)
    people, cameras = np.arange(len(rows)) // 5, np.arange(len(rows)) % 3
    order = np.argsort(np.arange(len(rows)) % 4, kind="stable")  # queries from all persons first
    rows, people, cameras = rows[order], people[order], cameras[order]
    labels = torch.repeat_interleave(torch.arange(5), 4)
    packages = ("data", "utils", "layers")
    with trainers.importable(tmp_path, *packages), compat.patch("strong-baseline", quiet=True):
        metric = importlib.import_module("utils.reid_metric").R1_mAP_reranking(12)
        for some in np.array_split(np.arange(len(rows)), 3):
            metric.update((rows[some], people[some], cameras[some]))
        cmc, mean_ap = metric.compute()
        loss = importlib.import_module("layers.triplet_loss").TripletLoss()
        loops.same_loss(
            lambda x: loss(x, labels), lambda x: loops.triplet_loss(x, labels), rows[:20].clone()
        )
    distance = loops.squared_distances(rows, rows).numpy()
    mixed = loops.strong_baseline_re_ranking(distance, 12, 20, 6, 0.3)
    expected = loops.evaluated(mixed, people[:12], people[12:], cameras[:12], cameras[12:])
    assert mean_ap == pytest.approx(np.mean(expected[1]), abs=0.02)  # half precision makes ties
    np.testing.assert_allclose(cmc[:5], expected[0][:5], atol=0.1)
