"""OpenUnReID (open-mmlab), `openunreid`: its distances, label generator, hybrid memory and re-ranking."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from pyreid import distributed, ops
from pyreid.compat._jaccard import jaccard
from pyreid.compat._memory import UpdateInBackward, hybrid_loss
from pyreid.compat._rerank import re_ranking
from pyreid.compat._sparse import DBSCAN, SparseDistance

__all__ = [
    "DBSCAN",
    "HybridMemory",
    "SparseDistance",
    "build_dist",
    "compute_jaccard_distance",
    "label_generator_dbscan",
    "label_generator_dbscan_single",
    "re_ranking_cpu",
]

re_ranking_cpu = re_ranking


def compute_jaccard_distance(
    features: torch.Tensor,
    k1: int = 20,
    k2: int = 6,
    search_option: int = 0,
    fp16: bool = False,
    verbose: bool = True,
    *,
    sparse: bool = False,
    max_distance: float | None = None,
) -> Any:
    """(N, N) float32 NumPy distances of (N, D) features, which need not be unit.

    Args:
        search_option: 0, 1, 2: on the GPU if there is one. Else: where the features are.
        fp16: the result is float16. Arithmetic is float32 all the same.
        sparse: a SparseDistance in place of the array.
        max_distance: of it, what DBSCAN's eps will not exceed: less time and memory, but no dense array.
    """
    started = time.time()
    if verbose:
        print("Computing jaccard distance...")
    gpu, cut = search_option < 3, max_distance
    distance = jaccard(features, k1, k2, "openunreid", gpu=gpu, sparse=sparse, max_distance=cut)
    if fp16 and not sparse:
        distance = distance.astype(np.float16)
    if verbose:
        print(f"Jaccard distance computing time cost: {time.time() - started}")
    return distance


@torch.no_grad()
def build_dist(
    cfg: Any,
    feat_1: torch.Tensor,
    feat_2: torch.Tensor | None = None,
    dist_m: str | None = None,
    verbose: bool = False,
    *,
    sparse: bool = False,
    max_distance: float | None = None,
) -> Any:
    """NumPy distances of rows, or from the rows of one matrix to those of another.

    Args:
        cfg: with dist_metric, and for "jaccard" k1, k2, search_type, for the others dist_cuda.
        dist_m: "euclidean" (squared), "cosine" or "jaccard", in place of cfg's.
        sparse, max_distance: for "jaccard" of one matrix, as for `compute_jaccard_distance`.
    """
    metric = cfg.dist_metric if dist_m is None else dist_m
    if metric == "jaccard":
        both = feat_1 if feat_2 is None else torch.cat([feat_1, feat_2])
        options = (cfg.k1, cfg.k2, cfg.search_type, False, verbose)
        if feat_2 is None:
            return compute_jaccard_distance(
                both, *options, sparse=sparse, max_distance=max_distance
            )
        return compute_jaccard_distance(both, *options)[: len(feat_1), len(feat_1) :]
    if metric not in ("euclidean", "cosine"):
        raise ValueError(
            f"build_dist: metric must be 'euclidean', 'cosine' or 'jaccard', got {metric!r}"
        )
    sides = [feat_1, feat_1 if feat_2 is None else feat_2]
    if cfg.dist_cuda:
        sides = [side.cuda() for side in sides]
    if metric == "cosine":
        a, b = map(normalize, sides)
        return (1 - a @ b.T).cpu().numpy()
    a, b = sides
    norms = [side.square().sum(dim=1) for side in sides]
    return torch.addmm(norms[0][:, None] + norms[1], a, b.T, alpha=-2).cpu().numpy()


@torch.no_grad()
def label_generator_dbscan_single(
    cfg: Any, features: torch.Tensor, dist: Any, eps: float, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(labels (N,) int64, centers (C, D), C) by DBSCAN at one eps; `dist` may be a SparseDistance."""
    settings = cfg.TRAIN.PSEUDO_LABELS
    found = _dbscan(dist, [eps], settings.min_samples)[0]
    labels, classes = _with_outliers(found, settings.use_outliers)
    return labels, _centers(features, labels), classes


@torch.no_grad()
def label_generator_dbscan(
    cfg: Any,
    features: torch.Tensor,
    cuda: bool = True,
    indep_thres: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, int, float | None]:
    """Pseudo labels by DBSCAN at one eps, or at three, with SpCL's criterion of which clusters to trust.

    The Jaccard distance is kept as a graph, DBSCAN runs once for all eps, and the overlap of clusters is
    counted instead of compared pair by pair.

    Args:
        cfg: TRAIN.PSEUDO_LABELS has eps (a list of one or three), min_samples, use_outliers, k1, k2,
            search_type, dist_metric.
        features: (N, D).
        indep_thres: R_indep above which a cluster is taken apart; None: that of this call, the 90th
            percentile of its clusters of more than one image.

    Returns:
        (labels (N,) int64, centers (C, D), C, indep_thres).
    """
    settings = cfg.TRAIN.PSEUDO_LABELS
    if not cuda:
        settings.search_type = 3
    levels = sorted(settings.eps)
    # From 1 on, pairs that a graph does not store are neighbours, too.
    near = {"sparse": levels[-1] < 1, "max_distance": levels[-1]}
    dist = build_dist(settings, features, verbose=True, **near)
    features = features.cpu()
    if len(levels) == 1:
        return *label_generator_dbscan_single(cfg, features, dist, levels[0]), indep_thres
    if len(levels) != 3:
        raise ValueError(
            f"label_generator_dbscan: eps must be one or three numbers, got {settings.eps}"
        )
    print("adopt the reliability criterion for filtering clusters")
    found = [
        _with_outliers(labels, settings.use_outliers)
        for labels in _dbscan(dist, levels, settings.min_samples)
    ]
    (tight, _), (labels, classes), (loose, _) = found
    comp, indep = (_apart(labels, other) for other in (tight, loose))

    # By rank of the label, so that where outliers are left out, which are of label -1 and first in order,
    # cluster 0 is judged by their score, and each other one by that of its predecessor: as released.
    present, place = torch.unique(labels, return_inverse=True)
    least = [
        torch.full((len(present),), 2.0).scatter_reduce_(0, place, scores, "amin").numpy()
        for scores in (comp, indep)
    ]
    sizes = np.bincount(place, minlength=len(present))
    if indep_thres is None:
        several = np.sort(least[1][sizes > 1].astype(np.float64))
        indep_thres = several[min(len(several) - 1, int(np.round(len(several) * 0.9)))]
    ids = labels.numpy()
    doubtful = (least[1][ids] > indep_thres) | (comp.numpy() > least[0][ids])
    left = dict(zip(present.tolist(), sizes.tolist(), strict=True))
    for row in np.flatnonzero(doubtful & (ids >= 0)):
        label = int(ids[row])
        if left[label] > 1:  # the last of a cluster keeps its label
            left[label] -= 1
            ids[row] = classes
            classes += 1
    return labels, _centers(features, labels), classes, indep_thres


class HybridMemory(torch.nn.Module):
    """SpCL's hybrid memory, moved by the features of all processes.

    `forward(results, indexes)`: {"feat": (B, D)}, normalised here, and their (B,) rows -> scalar. Features
    and rows of all ranks, B each, are gathered in forward; in backward the rows move in the order of ranks,
    so that all banks stay equal.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self, num_features: int, num_memory: int, temp: float = 0.05, momentum: float = 0.2
    ):
        super().__init__()
        self.num_features = num_features
        self.num_memory = num_memory
        self.momentum = momentum
        self.temp = temp
        self.register_buffer("features", torch.zeros(num_memory, num_features))
        self.register_buffer("labels", torch.zeros(num_memory, dtype=torch.int64))

    @torch.no_grad()
    def _update_feature(self, features: torch.Tensor) -> None:
        self.features.copy_(normalize(features))

    @torch.no_grad()
    def _update_label(self, labels: torch.Tensor) -> None:
        self.labels.copy_(labels)

    def forward(self, results: dict[str, torch.Tensor], indexes: torch.Tensor) -> torch.Tensor:
        inputs = normalize(results["feat"])
        gathered = [distributed.gather_rows(part, equal=True) for part in (inputs, indexes)]
        queries = UpdateInBackward.apply(
            inputs, indexes, self.features, self.momentum, "sequential", *gathered
        )
        return hybrid_loss(queries, self.features, self.labels, indexes, self.temp)


def _dbscan(dist: Any, levels: list[float], min_samples: int) -> torch.Tensor:
    """(E, N) on the CPU."""
    dist = dist if isinstance(dist, SparseDistance) else np.ascontiguousarray(dist)
    return torch.as_tensor(ops.dbscan(dist, levels, min_samples)).cpu()


def _with_outliers(labels: torch.Tensor, use_outliers: bool) -> tuple[torch.Tensor, int]:
    """Labels, those of outliers made new ones if they are used, and how many classes there are."""
    labels = labels.clone()
    classes = int(labels.max()) + 1
    if use_outliers:
        alone = labels == -1
        classes += int(alone.sum())
        labels[alone] = torch.arange(classes - int(alone.sum()), classes)
    return labels, classes


def _centers(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    features = features.cpu().contiguous()
    return ops.class_means(features, labels.contiguous(), normalize=False).means


def _apart(labels: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 - overlap of each image's clusters, (N,). Label -1 is a cluster like any other here, as released."""
    shared, size, other_size = ops.cluster_overlap(labels + 1, others + 1)
    return 1 - shared.float() / (size + other_size - shared).float()


_COMPUTE = "openunreid.core.utils.compute_dist"
_GENERATORS = "openunreid.core.label_generators.dbscan"
REPLACEMENTS = {
    f"{_COMPUTE}.compute_jaccard_distance": compute_jaccard_distance,
    f"{_COMPUTE}.build_dist": build_dist,
    "openunreid.core.utils.rerank.re_ranking_cpu": re_ranking_cpu,
    "openunreid.models.losses.memory.HybridMemory": HybridMemory,
    "sklearn.cluster.DBSCAN": DBSCAN,
}
SPARSE = {
    f"{_GENERATORS}.label_generator_dbscan_single": label_generator_dbscan_single,
    f"{_GENERATORS}.label_generator_dbscan": label_generator_dbscan,
}
ABSENT = ("faiss",)
