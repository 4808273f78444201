"""The label step of an epoch, features to pseudo labels: pseudo_labels against the published pipeline."""

import torch
from sklearn.cluster import DBSCAN

from pyreid import ops

from .bench_jaccard import features_of, product_of, published, published_name
from .timing import Case, Growth, pytest_benchmark, sizes

EPS = 0.6


def cases(device, quick=False):
    for size in sizes(quick):
        yield case(device, size, 128, "D=128")
    known = {3000: "a first try"}
    if not quick:
        known |= {12_936: "Market-1501", 16_522: "DukeMTMC-reID", 32_621: "MSMT17"}
    if device == "cuda":
        known |= {100_000: "beyond"}
    for size, what in known.items():
        yield case(device, size, 2048, "D=2048", what)
    if device == "cuda" and not quick:
        yield case(device, 1_000_000, 2048, "D=2048", "beyond")


def released(x, k1=30, k2=6):
    """Faiss's search, dense distances by NumPy, scikit-learn's clusters: as SpCL and all after it."""
    distance = published(x, k1, k2)
    found = DBSCAN(eps=EPS, min_samples=4, metric="precomputed").fit(distance)
    return torch.from_numpy(found.labels_).to(x.device)


def case(device, size, dim, line, what=None, k1=30, k2=6):
    name = f"{published_name(device)}, scikit-learn"
    return Case(
        op="pseudo_labels",
        size=f"N={size} D={dim} k1={k1} k2={k2}" + (f" ({what})" if what else ""),
        device=device,
        make=lambda: features_of(size, dim).to(device),
        ours=lambda x: ops.pseudo_labels(x, k1=k1, k2=k2, eps=EPS),
        baselines={name: lambda x: released(x, k1, k2)},
        bounds={"product alone": product_of},
        bytes=4 * size * dim,
        flops=size * size * dim,
        growth=Growth(line, size, time=2, memory=1),
        needs={name: 16 * size**2},
        headline=what is not None,
        whole=True,
        patience=60.0 if what == "Market-1501" else 0.0,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
