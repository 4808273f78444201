import time

import numpy as np
import pytest
from sklearn.cluster import DBSCAN

import pyreid
from pyreid import ops, reference
from pyreid.ops import _work
from pyreid.ops import jaccard as jaccard_room

NEAR = {"k1": 8, "k2": 3, "min_samples": 4}


def people(size, ids, *, seed=0, noise=0.5):
    """Unit features around the centres of `ids` people; every tenth is of nobody."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ids, 24))[np.arange(size) % ids]
    x = x + noise * rng.standard_normal(x.shape)
    x[::10] = rng.standard_normal(x[::10].shape)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def scikit(distances, eps, min_samples=4):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_


def test_is_the_two_calls(library):
    features = library(people(70, 6))
    labels = ops.pseudo_labels(features, eps=0.6, **NEAR)
    graph = ops.jaccard_graph(features, 8, 3, max_distance=0.6)
    expected = library.back(ops.dbscan(graph, 0.6, 4))
    assert type(labels) is type(features)
    assert library.back(labels).dtype == np.int64
    np.testing.assert_array_equal(library.back(labels), expected)


def between_pairs(distances, low, high):
    """The eps in the widest gap, so that rounding moves no pair across it."""
    values = np.unique(distances[(low < distances) & (distances < high)])
    widest = np.diff(values).argmax()
    assert values[widest + 1] - values[widest] > 1e-4
    return float(values[widest : widest + 2].mean())


@pytest.mark.parametrize("variant", ["spcl", "openunreid", "zhong", "mmt", "ca-jaccard"])
def test_is_scikit_on_the_reference(library, variant):
    features, cameras = people(70, 6), np.arange(70) % 3
    host = {"cameras": cameras} if variant == "ca-jaccard" else {}
    given = {name: library(value) for name, value in host.items()}
    distances = reference.jaccard_distance(features, 8, 3, variant=variant, **host)
    eps = between_pairs(distances, 0.5, 0.6)
    labels = ops.pseudo_labels(library(features), eps=eps, variant=variant, **NEAR, **given)
    expected = scikit(np.maximum(distances, 0), eps)
    assert expected.max() > 0
    np.testing.assert_array_equal(library.back(labels), expected)


def test_more_people():
    features = people(900, 40)
    distances = reference.jaccard_distance(features, 20, 6)
    eps = between_pairs(distances, 0.4, 0.6)
    labels, stats = ops.pseudo_labels(features, k1=20, eps=eps, return_stats=True)
    expected = scikit(distances, eps)
    np.testing.assert_array_equal(labels, expected)
    assert stats.clusters == expected.max() + 1 > 20
    assert stats.noise == (expected == -1).sum() > 0


def test_several_eps(library):
    features = library(people(70, 6))
    levels = [0.6, 0.3, 0.5]
    labels, stats = ops.pseudo_labels(features, eps=levels, return_stats=True, **NEAR)
    labels = library.back(labels)
    assert labels.shape == (3, 70)
    for row, level in zip(labels, levels, strict=True):
        alone = library.back(ops.pseudo_labels(features, eps=level, **NEAR))
        np.testing.assert_array_equal(row, alone)
    assert stats.clusters == tuple(labels.max(axis=1) + 1)
    assert stats.noise == tuple((labels == -1).sum(axis=1))


def test_stats_add_up(library):
    features = library(people(70, 6))
    start = time.perf_counter()
    labels, stats = ops.pseudo_labels(features, eps=0.6, return_stats=True, **NEAR)
    elapsed = time.perf_counter() - start
    assert list(stats.seconds) == ["neighbours", "jaccard", "dbscan"]
    assert min(stats.seconds.values()) > 0
    assert sum(stats.seconds.values()) <= elapsed
    graph = ops.jaccard_graph(features, 8, 3, max_distance=0.6)
    assert stats.pairs == graph.indices.shape[0]
    labels = library.back(labels)
    assert stats.noise == (labels == -1).sum() == 70 - (labels >= 0).sum()
    assert stats.clusters == len(set(labels.tolist()) - {-1})


STAGES = ["neighbours", "jaccard", "dbscan"]


def assert_progress(told, size, stages=STAGES):
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == stages
    assert {total for _, _, total in told} == {size}
    for stage in stages:
        rows = [done for name, done, _ in told if name == stage]
        assert rows[0] == 0
        assert rows[-1] == size
        assert rows == sorted(set(rows))  # each step is one forward


@pytest.mark.parametrize("options", [
    {},
    {"variant": "zhong"},
    {"variant": "ca-jaccard", "cameras": True},
    {"shards": True},
])  # fmt: skip
def test_progress(torch_library, monkeypatch, options):
    """Told in blocks, with the bits of one."""
    monkeypatch.setattr(_work, "_FEWEST", 16)
    monkeypatch.setattr(jaccard_room, "_QUERIES", 32)
    size = 90
    x, given = people(size, 5), {name: options[name] for name in ("variant",) if name in options}
    if "cameras" in options:
        given["cameras"] = torch_library(np.arange(size) % 3)
    features = torch_library(x)
    expected = ops.jaccard_graph(features, 8, 3, max_distance=0.6, **given)
    if "shards" in options and torch_library.floor != "cuda":
        features = [features[:50], features[50:]]
    told = []
    graph = ops.jaccard_graph(
        features, 8, 3, max_distance=0.6, progress=lambda *some: told.append(some), **given
    )
    assert_progress(told, size, STAGES[:2])
    assert len([stage for stage, _, _ in told if stage == "jaccard"]) > 20
    for part, wanted in zip(graph[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(torch_library.back(part), torch_library.back(wanted))
    told = []
    ops.pseudo_labels(features, progress=lambda *some: told.append(some), **NEAR, **given)
    assert_progress(told, size)


def test_progress_within_the_search():
    features, told = people(3000, 200), []
    labels = ops.pseudo_labels(features, progress=lambda *some: told.append(some))
    assert_progress(told, 3000)
    rows = [done for stage, done, _ in told if stage == "neighbours"]
    assert len(rows) == 5  # the beginning, and panels of 768
    assert rows[1] > 2 * 768 * 0.8  # a first panel meets all rows, and they meet it
    np.testing.assert_array_equal(labels, ops.pseudo_labels(features))


def test_progress_that_raises_ends_the_work():
    def stop(stage, done, _):
        if stage == "neighbours" and done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ops.pseudo_labels(people(2000, 100), progress=stop)
    assert ops.pseudo_labels(people(70, 6), **NEAR).max() > 0


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_same_labels_for_every_number_of_threads(threads):
    features, before = people(900, 40), pyreid.get_num_threads()
    expected = ops.pseudo_labels(features, eps=(0.4, 0.6))
    try:
        pyreid.set_num_threads(threads)
        for _ in range(2):
            np.testing.assert_array_equal(ops.pseudo_labels(features, eps=(0.4, 0.6)), expected)
    finally:
        pyreid.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_few_rows(library, size):
    labels, stats = ops.pseudo_labels(library(people(size, 2)), min_samples=1, return_stats=True)
    assert library.back(labels).shape == (size,)
    assert (stats.clusters, stats.noise) == (library.back(labels).max(initial=-1) + 1, 0)
    labels = ops.pseudo_labels(library(people(size, 2)), eps=(0.5, 1.0))
    np.testing.assert_array_equal(library.back(labels), np.full((2, size), -1))


def test_wrong_arguments(library):
    features = library(people(20, 2))
    cases = [
        ({"eps": 0.0}, "pseudo_labels: eps must lie in (0, 1], got 0.0"),
        ({"eps": 1.5}, "pseudo_labels: eps must lie in (0, 1], got 1.5"),
        ({"eps": [0.5, float("nan")]}, "pseudo_labels: eps must lie in (0, 1], got nan"),
        ({"eps": []}, "dbscan: eps must hold 1 to 64 values, got 0"),
        ({"min_samples": 0}, "dbscan: min_samples must be at least 1, got 0"),
        ({"k1": 0}, "jaccard_graph: k1 must be at least 1, got 0"),
        ({"k2": 0}, "jaccard_graph: k2 must be at least 1, got 0"),
        ({"variant": "ca-jaccard"},
         "jaccard_graph: cameras must be given for variant 'ca-jaccard', got None"),
        ({"features": library(np.zeros(20, np.float32))},
         "jaccard_graph: features must have shape (any, any), got (20,)"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError) as error:
            ops.pseudo_labels(**({"features": features} | changes))
        assert str(error.value) == message
