"""MMT's Jaccard distance and its script's clustering, ours against what they compute."""

import pytest
import torch
import trainers
import transcribed

from pyreid.compat import mmt

PACKAGE = {
    "mmt/utils/rerank.py": """
import transcribed

def re_ranking(q_g_dist, q_q_dist, g_g_dist, k1=20, k2=6, lambda_value=0.3):
    return transcribed.re_ranking(q_g_dist, q_q_dist, g_g_dist, k1, k2, lambda_value)

def compute_jaccard_dist(
    target_features, k1=20, k2=6, print_flag=True, lambda_value=0, source_features=None, use_gpu=False
):
    return transcribed.mmt_jaccard(target_features, k1, k2, lambda_value, source_features)
""",
}
SCRIPT = """
import sys
import numpy as np
import torch
from sklearn.cluster import DBSCAN
from mmt.utils.rerank import compute_jaccard_dist, re_ranking
from trainers import people

if __name__ == "__main__":
    cf = people(10, 12, 24, seed=3, spread=0.5)
    cf_s = people(5, 8, 24, seed=4)
    saved = {}
    for lambda_value in (0, 0.1):
        if lambda_value > 0:
            rerank_dist = compute_jaccard_dist(
                cf, k2=1, lambda_value=lambda_value, source_features=cf_s, use_gpu=False).numpy()
        else:
            rerank_dist = compute_jaccard_dist(cf, k1=8, k2=1, use_gpu=False).numpy()
        tri_mat = np.triu(rerank_dist, 1)
        tri_mat = tri_mat[np.nonzero(tri_mat)]
        tri_mat = np.sort(tri_mat, axis=None)
        top_num = np.round(0.05 * tri_mat.size).astype(int)
        eps = tri_mat[:top_num].mean()
        cluster = DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1)
        saved[f"labels {lambda_value}"] = torch.from_numpy(cluster.fit_predict(rerank_dist))
        saved[f"eps {lambda_value}"] = torch.tensor(eps)
    d = torch.cdist(cf, cf).square().numpy()
    final = re_ranking(d[:20, 20:], d[:20, :20], d[20:, 20:], 10, 4)
    saved["re-ranked"] = torch.from_numpy(final)
    torch.save(saved, sys.argv[1])
"""


@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0), (9, 1, 0), (12, 4, 0.1)])
def test_jaccard_distance(k1, k2, lambda_value):
    features = trainers.people(10, 9, 32, seed=0)
    source = trainers.people(4, 5, 32, seed=1)
    ours = mmt.compute_jaccard_dist(
        features, k1, k2, lambda_value=lambda_value, source_features=source
    )
    assert isinstance(ours, torch.Tensor)
    expected = transcribed.mmt_jaccard(features, k1, k2, lambda_value, source)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_sparse_or_dense():
    features = trainers.people(10, 9, 32, seed=0)
    dense = mmt.compute_jaccard_dist(features, 10, 4, False)
    sparse = mmt.compute_jaccard_dist(features, 10, 4, False, sparse=True)
    assert isinstance(sparse, mmt.SparseDistance)
    torch.testing.assert_close(torch.tensor(sparse[:]), dense, rtol=0, atol=0)
    mixed = mmt.compute_jaccard_dist(features, 10, 4, False, 0.1, features[:9], sparse=True)
    assert isinstance(mixed, torch.Tensor)


@pytest.mark.parametrize("options", [(), ("--dense",)])
def test_a_script(tmp_path, options):
    trainers.write(tmp_path, PACKAGE)
    plain = trainers.outcome(tmp_path, SCRIPT, "mmt")
    ours = trainers.outcome(tmp_path, SCRIPT, "mmt", *options, project="mmt")
    assert len(plain["labels 0"].unique()) > 8
    trainers.same(plain, ours)
