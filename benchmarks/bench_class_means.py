"""class_means at the sizes of real trainers: once an epoch, over all training images."""

import warnings

import torch

from pyreid import ops

from .timing import Case, Growth, pytest_benchmark, sizes

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


def cases(device, quick=False):
    yield case(device, 12936, 2048, 700, 0, "Market-1501: centroids")
    yield case(device, 12936, 2048, 700, 6, "Market-1501: camera proxies")
    for size in sizes(quick):
        line = Growth("D=128, 17 rows a class", size, time=1, memory=1)
        yield case(device, size, 128, size // 17, 0, "17 rows a class", loops=False, growth=line)
    if not quick:
        yield case(device, 16522, 2048, 702, 0, "DukeMTMC-reID: centroids")
        yield case(device, 32621, 2048, 1041, 0, "MSMT17: centroids")
        yield case(device, 32621, 2048, 1041, 15, "MSMT17: camera proxies")
        yield case(device, 12936, 2048, 700, 0, "centroids of float16", dtype=torch.float16)
        yield case(device, 32621, 2048, 2, 0, "two classes")


def case(
    device, size, dim, classes, cameras, what, *, dtype=torch.float32, loops=True, growth=None
):
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
        baselines={"index_add": index_add, "sparse product": sparse_product}
        | ({"Python loop": loop} if loops else {}),
        bytes=int(found.counts.sum()) * dim * features.element_size() + 4 * found.means.numel(),
        growth=growth,
        headline=growth is None,
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


def classes_of(labels, cameras):
    """Which rows are in a class, the class's keys, every such row's class, and how many it has."""
    kept = labels >= 0
    keys = labels[kept]
    if cameras is not None:
        keys = keys + cameras[kept] * 2**32
    return kept, *keys.unique(return_inverse=True, return_counts=True)


def index_add(state):
    """By torch; on CUDA its sums are not the same twice."""
    features, labels, cameras = state
    kept, keys, classes, counts = classes_of(labels, cameras)
    sums = torch.zeros(len(keys), features.shape[1], device=features.device)
    sums.index_add_(0, classes, features[kept].float())
    return [torch.nn.functional.normalize(sums / counts[:, None]), keys % 2**32, counts]


def sparse_product(state):
    """By torch: a row of ones for each class, in compressed rows, times the features."""
    features, labels, cameras = state
    kept, keys, classes, counts = classes_of(labels, cameras)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    members = kept.nonzero()[:, 0][classes.argsort(stable=True)]
    ones = torch.ones(len(members), device=features.device)
    rows = torch.sparse_csr_tensor(
        starts, members, ones, (len(keys), len(labels)), check_invariants=False
    )
    sums = rows @ features.float()
    return [torch.nn.functional.normalize(sums / counts[:, None]), keys % 2**32, counts]


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
