"""Means of the features of each class: cluster centroids and camera proxies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from pyreid import _native
from pyreid.ops import _torch


class Means(NamedTuple):
    """The M classes of a `class_means`, in order."""

    means: Any  # (M, D) float32
    labels: Any  # (M,) int64
    cameras: Any  # (M,) int64, or None
    counts: Any  # (M,) int64, the rows of each class


def class_means(features: Any, labels: Any, cameras: Any = None, *, normalize: bool) -> Means:
    """The mean feature of each label, or of each label in each camera.

    Args:
        features: (N, D) float32, float16 or bfloat16. Summed in float32, a class's rows in
            ascending order, without loss of digits in large classes. No gradient flows.
        labels: (N,) int64 or int32, any values. A row whose label is negative is left out.
        cameras: (N,) int64 or int32, any values, or None.
        normalize: whether to divide each mean by its L2 norm (at least 1e-12). ICE normalises its
            camera proxies and not its centroids.

    Returns:
        Means(means, labels, cameras, counts): ordered by label, or by camera, then label. Only what
        occurs is a class: none is empty. The result is the same, bit for bit, in every run.

    How many classes there are is in the data, so that on CUDA this op waits for the device once,
    and a CUDA graph cannot capture it. `torch.compile(fullgraph=True)` takes it with
    `torch._dynamo.config.capture_dynamic_output_shape_ops = True`.
    """
    call = _means
    if _torch.dispatched(features):
        features, call = features.detach(), _means_registered
    means, mean_labels, mean_cameras, counts = call(features, labels, cameras, normalize)
    return Means(means, mean_labels, None if cameras is None else mean_cameras, counts)


def _means(features: Any, labels: Any, cameras: Any, normalize: bool) -> tuple[Any, Any, Any, Any]:
    module, stream = _native.floor(features)
    inputs = features, labels, cameras
    empty = _native.allocator(features)
    count = empty((), "int64")
    workspace = module.class_means_count(
        *inputs, normalize, count, _native.scratch(features), stream
    )
    classes = int(count)
    means = empty((classes, features.shape[1]), "float32")
    mean_labels, counts = empty((classes,), "int64"), empty((classes,), "int64")
    mean_cameras = None if cameras is None else empty((classes,), "int64")
    module.class_means_fill(
        *inputs, normalize, means, mean_labels, mean_cameras, counts, workspace, stream
    )
    return means, mean_labels, mean_cameras, counts


# An operator returns tensors: without cameras, those of the classes are an empty one.
def _means_tensors(
    features: torch.Tensor, labels: torch.Tensor, cameras: torch.Tensor | None, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    means, mean_labels, mean_cameras, counts = _means(features, labels, cameras, normalize)
    if mean_cameras is None:
        mean_cameras = _native.empty(features, (0,), "int64")
    return means, mean_labels, mean_cameras, counts


def _means_fake(features, labels, cameras, normalize):
    classes = torch.library.get_ctx().new_dynamic_size()

    def ids(size):
        return features.new_empty((size,), dtype=torch.int64)

    means = features.new_empty((classes, features.shape[1]), dtype=torch.float32)
    return means, ids(classes), ids(0 if cameras is None else classes), ids(classes)


_means_registered = _torch.register(_means_tensors, name="class_means", fake=_means_fake)
