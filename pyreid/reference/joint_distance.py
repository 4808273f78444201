"""Distances by looks and by the time that people take between cameras (Li, Zhang, JVTC)."""

import numpy as np


def time_histogram(
    labels, cameras, frames, *, bin=100, bins=3000, sigma=50.0, cut=3.0, num_cameras=None
):
    """(C, C, bins) float32, [later camera][earlier camera]."""
    if num_cameras is None:
        num_cameras = max(cameras, default=-1) + 1
    counts = np.zeros((num_cameras, num_cameras, bins))

    def add(later, earlier, time, more):
        place = int(time // bin)
        if place < bins:
            counts[later, earlier, place] += more

    known = (labels >= 0) & (frames >= 0)
    for label in np.unique(labels[known]):
        seen = {
            camera: frames[known & (labels == label) & (cameras == camera)]
            for camera in np.unique(cameras[known & (labels == label)])
        }
        for a, own in seen.items():
            for frame in own:
                add(a, a, frame - own.min(), len(own))
            for b, other in seen.items():
                time = own.sum() / len(own) - other.sum() / len(other)
                if time > 0 or (time == 0 and a > b):
                    add(a, b, time, 1)
    reach = int(cut * sigma)
    smooth = np.zeros_like(counts)
    for i in range(bins):
        for j in range(max(0, i - reach), min(bins, i + reach + 1)):
            tap = np.exp(-((i - j) ** 2) / (2 * sigma**2)) if i != j else 1
            smooth[:, :, i] += counts[:, :, j] * tap
    total = smooth.sum(axis=2, keepdims=True)
    return np.where(total > 0, smooth / np.where(total > 0, total, 1), 0).astype(np.float32)


def joint_distance(
    features,
    cameras,
    frames,
    histogram,
    *,
    bin=100,
    gamma=5.0,
    lambdas=(1.0, 2.0),
    queries=None,
    query_cameras=None,
    query_frames=None,
):
    """(Q, N) float32, or (N, N)."""
    if queries is None:
        queries, query_cameras, query_frames = features, cameras, frames
    looks = np.asarray(queries, np.float64) @ np.asarray(features, np.float64).T
    times = np.zeros(looks.shape)
    for i, (a, frame) in enumerate(zip(query_cameras, query_frames, strict=True)):
        for j, (b, other) in enumerate(zip(cameras, frames, strict=True)):
            if frame < 0 or other < 0 or abs(frame - other) // bin >= histogram.shape[2]:
                continue
            later, earlier = (a, b) if (frame, a) > (other, b) else (b, a)
            times[i, j] = histogram[later, earlier, abs(frame - other) // bin]
    visual, temporal = (
        1 / (1 + weight * np.exp(-gamma * x))
        for weight, x in zip(lambdas, (looks, times), strict=True)
    )
    return (1 - visual * temporal).astype(np.float32)
