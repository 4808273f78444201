"""MMT (Ge et al., ICLR 2020), `mmt`: its Jaccard distance, rule for eps, DBSCAN and re-ranking."""

from __future__ import annotations

from pyreid.compat._rerank import compute_jaccard_dist, re_ranking, sparse_jaccard_dist
from pyreid.compat._sparse import DBSCAN, SparseDistance

__all__ = ["DBSCAN", "SparseDistance", "compute_jaccard_dist", "re_ranking"]

REPLACEMENTS = {
    "mmt.utils.rerank.compute_jaccard_dist": compute_jaccard_dist,
    "mmt.utils.rerank.re_ranking": re_ranking,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {"mmt.utils.rerank.compute_jaccard_dist": sparse_jaccard_dist}
