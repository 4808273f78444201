"""How unlikely it is that two images are of one person, by what they look like and by where and when they
were taken (JVTC)."""

from __future__ import annotations

from typing import Any

import torch

from pyreid import _native
from pyreid._native import Array
from pyreid.ops import _panels, _torch

_QUERIES = 1024  # rows whose products with a panel are held at a time


def time_histogram(
    labels: Any,
    cameras: Any,
    frames: Any,
    *,
    bin: int = 100,
    bins: int = 3000,
    sigma: float = 50.0,
    cut: float = 3.0,
    num_cameras: int | None = None,
) -> Any:
    """How long people take from one camera to another, as clusters tell it: for each pair of cameras, the
    shares of `bins` spans of `bin` frames.

    A cluster counts once for each pair of cameras that it has images in: at the difference of the mean
    frames of its images in the two, in [later camera][earlier camera] (at no difference, the larger camera is
    the later one). Within a camera, each image of a cluster counts at its distance from the cluster's first
    there, as often as the cluster has images there. Counts are smoothed by a Gaussian of `sigma` bins, cut
    off at `cut` sigma and at the ends, and divided by their sum.

    Args:
        labels: (N,) int64 or int32. Images whose label is negative are left out.
        cameras: (N,) int64 or int32 ids from 0 on. On the CPU a negative one, or one beyond num_cameras, is
            an error; on CUDA its images are left out.
        frames: (N,) int64 or int32 frame numbers, comparable between cameras. Images whose number is
            negative, which is to say unknown, are left out.
        bin: frames. What lies beyond the last of the `bins` is left out.
        sigma: 0: nothing is smoothed.
        num_cameras: C. Default: as many as are among `cameras`.

    Returns:
        (C, C, bins) float32: pairs sum to 1, those that nobody has been seen in are 0. The same, bit for bit,
        in every run. On CUDA, waits for the device.
    """
    module, stream = _native.floor(labels)
    module.time_histogram_check(labels, cameras, frames, num_cameras, bin, bins, sigma, cut)
    xp = _native.namespace(labels)
    if num_cameras is None:
        num_cameras = int(cameras.max()) + 1 if cameras.shape[0] else 0
    num_cameras = max(num_cameras, 0)
    _native.check_range("time_histogram", "cameras", cameras, 0, num_cameras, closed=False)
    names, clusters = xp.unique(labels, return_inverse=True)
    clusters = xp.where(labels < 0, -1, clusters.reshape(labels.shape))
    histogram = _native.empty(labels, (num_cameras, num_cameras, bins), "float32")
    reach = min(int(cut * sigma), bins)
    allocate = _native.scratch(labels)
    seen = (cameras, frames, bin, sigma, reach)
    module.time_histogram(clusters, len(names), *seen, histogram, allocate, stream)
    return histogram


def joint_distance(
    features: Array,
    cameras: Array,
    frames: Array,
    histogram: Array,
    *,
    bin: int = 100,
    gamma: float = 5.0,
    lambdas: tuple[float, float] = (1.0, 2.0),
    queries: Array | None = None,
    query_cameras: Array | None = None,
    query_frames: Array | None = None,
) -> Array:
    """JVTC's distance by looks and time, of all rows to all, or of queries to all:

        1 - 1 / (1 + lambda_v e^(-gamma s)) * 1 / (1 + lambda_t e^(-gamma t))

    s is the dot product of the features as they are, and t the histogram's share for the two cameras at the
    difference of the two frames; 0 beyond the last bin, and where a frame is not known: such pairs are as far
    apart as if nobody had ever taken so long.

    Args:
        features: (N, D) float32, float16 or bfloat16.
        cameras: (N,) int64 or int32 ids, below those that the histogram has; on CUDA, others have no time.
        frames: (N,) int64 or int32 frame numbers, negative where they are not known.
        histogram: (C, C, bins) float32, of `time_histogram`.
        bin: frames, as there.
        gamma: how steep both terms are. lambdas: lambda_v and lambda_t, at least 0.
        queries, query_cameras, query_frames: (Q, D), (Q,), (Q,) likewise: JVTC+'s test distance. None: the
            rows themselves.

    Returns:
        (Q, N) float32, or (N, N). Memory beyond it: a panel of products. No gradient.
    """
    visual, temporal = lambdas
    beside = (queries, query_cameras, query_frames)
    return _joint(features, cameras, frames, histogram, bin, gamma, visual, temporal, *beside)


def _joint_forward(
    features: torch.Tensor,
    cameras: torch.Tensor,
    frames: torch.Tensor,
    histogram: torch.Tensor,
    bin: int,
    gamma: float,
    visual: float,
    temporal: float,
    queries: torch.Tensor | None,
    query_cameras: torch.Tensor | None,
    query_frames: torch.Tensor | None,
) -> torch.Tensor:
    module, stream = _native.floor(features)
    given = (queries, query_cameras, query_frames)
    module.joint_check(features, cameras, frames, histogram, *given, bin, gamma, visual, temporal)
    _native.check_range("joint_distance", "cameras", cameras, 0, histogram.shape[0], closed=False)
    own: Any = (features, cameras, frames) if queries is None else given
    terms = (histogram, bin, gamma, visual, temporal)
    count, size = own[0].shape[0], features.shape[0]
    distances = _native.empty(features, (count, size), "float32")
    for begin in range(0, count, _QUERIES):
        some = slice(begin, min(begin + _QUERIES, count))
        wide = _native.widened_half(own[0][some])
        sighted = (own[1][some], own[2][some])
        for first, panel in _panels.panels(len(wide), features):
            scores = _panels.product(wide, panel)
            their = slice(first, first + len(panel))
            others = (cameras[their], frames[their])
            module.joint_block(scores, sighted, others, terms, distances[some], first, stream)
    return distances


def _joint_fake(features, cameras, frames, histogram, bin, gamma, visual, temporal, queries, *_):
    count = (features if queries is None else queries).shape[0]
    return features.new_empty((count, features.shape[0]), dtype=torch.float32)


_joint = _torch.register(_joint_forward, name="joint_distance", fake=_joint_fake)
