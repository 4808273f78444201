"""class_means at the sizes of real trainers: once an epoch, over all training images."""

import torch

from pyreid import ops

from .timing import Case, pytest_benchmark


def cases(device, quick=False):
    yield case(device, 12936, 2048, 700, 0, "Market-1501: centroids")
    yield case(device, 12936, 2048, 700, 6, "Market-1501: camera proxies")
    if not quick:
        yield case(device, 32621, 2048, 1041, 0, "MSMT17: centroids")
        yield case(device, 32621, 2048, 1041, 15, "MSMT17: camera proxies")
        yield case(device, 12936, 2048, 700, 0, "centroids of float16", dtype=torch.float16)
        yield case(device, 32621, 2048, 2, 0, "two classes")


def case(device, size, dim, classes, cameras, what, *, dtype=torch.float32):
    def make():
        generator = torch.Generator().manual_seed(0)
        features = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
        labels = torch.randint(0, classes, (size,), generator=generator)
        labels[torch.rand(size, generator=generator) < 0.2] = -1  # outliers
        seen = torch.randint(0, cameras, (size,), generator=generator) if cameras else None
        return [None if x is None else x.to(device) for x in (features.to(dtype), labels, seen)]

    def ours(state):
        found = ops.class_means(*state, normalize=True)
        return [found.means, found.labels, found.counts]

    features, labels, seen = make()
    found = ops.class_means(features, labels, seen, normalize=True)
    return Case(
        op="class_means",
        size=f"N={size} D={dim} M={len(found.labels)} ({what})",
        device=device,
        make=make,
        ours=ours,
        baselines={"index_add": index_add, "Python loop": loop},
        bytes=int(found.counts.sum()) * dim * features.element_size() + 4 * found.means.numel(),
    )


def loop(state):
    """As ICE and Cluster Contrast do: per camera and label, a mask, and the mean of its rows."""
    features, labels, cameras = state
    means, mean_labels, counts = [], [], []
    groups = [None] if cameras is None else cameras.unique().tolist()
    for camera in groups:
        here = torch.ones_like(labels, dtype=torch.bool) if camera is None else cameras == camera
        for label in labels[here].unique().tolist():
            if label < 0:
                continue
            rows = features[here & (labels == label)]
            means.append(rows.float().mean(dim=0))
            mean_labels.append(label)
            counts.append(len(rows))
    means = torch.nn.functional.normalize(torch.stack(means))
    return [means, *(torch.tensor(x, device=means.device) for x in (mean_labels, counts))]


def index_add(state):
    """The best that torch offers; on CUDA its sums are not the same twice."""
    features, labels, cameras = state
    kept = labels >= 0
    keys = labels[kept]
    if cameras is not None:
        keys = keys + cameras[kept] * 2**32
    keys, classes, counts = keys.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(keys), features.shape[1], device=features.device)
    sums.index_add_(0, classes, features[kept].float())
    return [torch.nn.functional.normalize(sums / counts[:, None]), keys % 2**32, counts]


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
