"""Class means as trainers take them: cluster centroids, and ICE's proxies, camera by camera."""

import numpy as np


def class_means(features, labels, cameras=None, *, normalize):
    """(means, labels, cameras, counts) of the labels that are not negative; float64 inside."""
    features = np.asarray(features, np.float64)
    groups = np.zeros_like(labels) if cameras is None else cameras
    found = []
    for camera in np.unique(groups):
        for label in np.unique(labels[(groups == camera) & (labels >= 0)]):
            rows = features[(groups == camera) & (labels == label)]
            mean = rows.mean(axis=0)
            if normalize:
                mean = mean / max(np.linalg.norm(mean), 1e-12)
            found.append((mean, label, camera, len(rows)))
    means = np.array([row for row, *_ in found], np.float32).reshape(len(found), features.shape[1])
    ids = np.array([rest for _, *rest in found], np.int64).reshape(-1, 3)
    return means, ids[:, 0], None if cameras is None else ids[:, 1], ids[:, 2]
