import contextlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN

import pyreid
from pyreid import _native, ops, reference


def scikit(distances, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(distances).labels_


def random_pairs(samples, kept, rng, *, symmetric=True, diagonal=True, steps=8):
    """(N, N) float32 distances that are multiples of 1 / steps, so that many equal eps; infinite where none
    is kept."""
    distance = (rng.integers(0, steps + 1, (samples, samples)) / steps).astype(np.float32)
    distance[rng.random((samples, samples)) >= kept] = np.inf
    if symmetric:
        distance = np.tril(distance, -1)
        distance[distance == 0] = np.inf
        distance = np.minimum(distance, distance.T)
    if diagonal:
        np.fill_diagonal(distance, 0)
    return distance


def csr(distance):
    """The finite entries, explicit zeros included."""
    rows, columns = np.nonzero(np.isfinite(distance))
    values = distance[rows, columns]
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=distance.shape)


def edges(samples, pairs, distance=0.5):
    """A symmetric graph with these edges and a diagonal of zeros."""
    first, second = np.array(pairs, np.int64).reshape(-1, 2).T
    own = np.arange(samples)
    rows, columns = np.r_[first, second, own], np.r_[second, first, own]
    values = np.r_[np.full(2 * len(first), distance), np.zeros(samples)].astype(np.float32)
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=(samples, samples))


def to_graph(library, matrix, index="int64", **more):
    return SimpleNamespace(
        indptr=library(matrix.indptr, "int64"),
        indices=library(matrix.indices, index),
        distances=library(matrix.data, "float32"),
        shape=matrix.shape,
        **more,
    )


def check(library, matrix, eps, min_samples):
    """Labels of a CSR matrix and of its graph, as scikit-learn has them; twice the same."""
    labels = library.back(ops.dbscan(to_graph(library, matrix), eps, min_samples))
    again = library.back(ops.dbscan(to_graph(library, matrix, "int32"), eps, min_samples))
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, scikit(matrix, eps, min_samples))
    np.testing.assert_array_equal(again, labels)
    return labels


@contextlib.contextmanager
def threads(count):
    before = pyreid.get_num_threads()
    pyreid.set_num_threads(count)
    try:
        yield
    finally:
        pyreid.set_num_threads(before)


# --- labels ---------------------------------------------------------------------------------------


def test_equals_scikit_learn_on_random_graphs(library):
    for seed in range(30 if library.floor == "emulated" else 1000):
        rng = np.random.default_rng(seed)
        samples = int(rng.integers(1, 40))
        distance = random_pairs(
            samples,
            rng.choice([0.05, 0.1, 0.3]),
            rng,
            symmetric=seed % 3 > 0,
            diagonal=seed % 2 > 0,
        )
        eps, min_samples = float(rng.choice([0.125, 0.25, 0.5])), int(rng.integers(1, 6))
        matrix, dense = csr(distance), np.minimum(distance, 2)
        found = ops.dbscan(to_graph(library, matrix), eps, min_samples)
        np.testing.assert_array_equal(library.back(found), scikit(matrix, eps, min_samples))
        expected = scikit(dense, eps, min_samples)
        np.testing.assert_array_equal(reference.dbscan(distance, eps, min_samples), expected)
        found = ops.dbscan(library(dense), eps, min_samples)
        np.testing.assert_array_equal(library.back(found), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("samples", [257, 1100])
def test_several_eps_at_once(library, samples, symmetric):
    rng = np.random.default_rng(samples)
    distance = random_pairs(samples, 4 / samples, rng, symmetric=symmetric, steps=64)
    matrix, levels = csr(distance), [0.5, 0.25, 0.75, 0.5, 0.0]
    graph = to_graph(library, matrix)
    labels = library.back(ops.dbscan(graph, levels, 3))
    assert labels.shape == (5, samples)
    for eps, found in zip(levels, labels, strict=True):
        expected = reference.dbscan(distance, eps, 3)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(library.back(ops.dbscan(graph, eps, 3)), expected)
    dense = library.back(ops.dbscan(library(distance), levels, 3))
    np.testing.assert_array_equal(dense, labels)


def test_eps_is_inclusive(library):
    eps = 0.6
    at = np.float32(eps)
    for value, together in [(at, True), (np.nextafter(at, np.float32(1)), False)]:
        labels = check(library, edges(2, [(0, 1)], value), eps, 2)
        assert (labels == (0 if together else -1)).all()


def test_border_between_two_clusters(library):
    # 4 and 5 are near a core sample of each cluster but no core samples themselves.
    pairs = [(0, 1), (0, 2), (0, 3), (6, 7), (6, 8), (6, 9), (6, 5), (0, 5), (6, 4), (0, 4)]
    labels = check(library, edges(10, pairs), 0.5, 5)
    np.testing.assert_array_equal(labels, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    relabelled = check(library, edges(10, [(9 - a, 9 - b) for a, b in pairs]), 0.5, 5)
    np.testing.assert_array_equal(relabelled, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1])


def test_noise_and_single_cluster(library):
    apart = edges(70, [])
    assert (check(library, apart, 0.5, 2) == -1).all()
    np.testing.assert_array_equal(check(library, apart, 0.5, 1), np.arange(70))
    everybody = np.zeros((70, 70), np.float32)
    assert (check(library, csr(everybody), 0.1, 70) == 0).all()
    assert (library.back(ops.dbscan(library(everybody), 0.0, 70)) == 0).all()
    assert (library.back(ops.dbscan(library(everybody), 0.0, 71)) == -1).all()


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_long_chain(library, order):
    samples = 5000
    names = {
        "ascending": np.arange(samples),
        "descending": np.arange(samples)[::-1],
        "shuffled": np.random.default_rng(0).permutation(samples),
    }[order]
    check(library, edges(samples, np.stack([names[:-1], names[1:]], 1)), 0.5, 2)
    cut = np.delete(np.stack([names[:-1], names[1:]], 1), [100, 2500, 4000], axis=0)
    assert check(library, edges(samples, cut), 0.5, 3).max() == 3


@pytest.mark.parametrize("centre", [0, 1234, 2999])
def test_star(library, centre):
    leaves = np.delete(np.arange(3000), centre)
    pairs = np.stack([np.full_like(leaves, centre), leaves], 1)
    for min_samples in (2, 3):
        assert (check(library, edges(3000, pairs), 0.5, min_samples) == 0).all()


def test_one_way_streets(library):
    """Distances that are not symmetric, as k-reciprocal re-ranking's are: labels follow the arrows."""
    samples = 600
    rng = np.random.default_rng(0)
    for names in (np.arange(samples), np.arange(samples)[::-1], rng.permutation(samples)):
        values = np.full(samples - 1, 0.5, np.float32)
        matrix = scipy.sparse.csr_matrix((values, (names[:-1], names[1:])), shape=(samples,) * 2)
        check(library, matrix, 0.5, 2)
    nearest = np.argsort(rng.random((samples, samples)), axis=1)[:, :3]
    rows = np.repeat(np.arange(samples), 3)
    values = rng.random(3 * samples).astype(np.float32)
    matrix = scipy.sparse.csr_matrix((values, (rows, nearest.ravel())), shape=(samples,) * 2)
    for min_samples in (1, 2, 3):
        check(library, matrix, 0.6, min_samples)


def test_none_and_one(library):
    for samples in (0, 1):
        graph = to_graph(library, edges(samples, []))
        dense = library(np.zeros((samples, samples), np.float32))
        for distances in (graph, dense):
            for min_samples, label in [(1, 0), (2, -1)]:
                labels = library.back(ops.dbscan(distances, 0.5, min_samples))
                np.testing.assert_array_equal(labels, [label] * samples)
                assert ops.dbscan(distances, [0.5, 0.6], min_samples).shape == (2, samples)


def test_diagonal(library):
    """Not stored, one is near oneself; stored, or in a matrix, the diagonal says."""
    pair = np.array([[np.inf, 0.5], [0.5, np.inf]], np.float32)
    assert (check(library, csr(pair), 0.5, 2) == 0).all()
    far = np.array([[1, 0.5], [0.5, 1]], np.float32)
    assert (check(library, csr(far), 0.5, 2) == -1).all()
    for distance in (np.minimum(pair, 2), far):
        labels = library.back(ops.dbscan(library(distance), 0.5, 2))
        np.testing.assert_array_equal(labels, scikit(distance, 0.5, 2))


def test_columns_in_any_order(library):
    distance = random_pairs(300, 0.02, np.random.default_rng(3))
    matrix = csr(distance)
    expected = reference.dbscan(distance, 0.5, 4)
    for i in range(300):
        row = slice(matrix.indptr[i], matrix.indptr[i + 1])
        matrix.indices[row] = matrix.indices[row][::-1].copy()
        matrix.data[row] = matrix.data[row][::-1].copy()
    labels = library.back(ops.dbscan(to_graph(library, matrix), 0.5))
    np.testing.assert_array_equal(labels, expected)


def test_nan_is_near_nobody(library):
    distance = np.full((3, 3), np.nan, np.float32)
    assert (library.back(ops.dbscan(library(distance), 1.0, 1)) == -1).all()
    assert (library.back(ops.dbscan(library(distance, "float64"), 1.0, 1)) == -1).all()
    labels = library.back(ops.dbscan(to_graph(library, csr(np.zeros((3, 3)) + distance)), 1.0, 1))
    np.testing.assert_array_equal(labels, [0, 1, 2])


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_scipy(kind):
    distance = random_pairs(400, 0.02, np.random.default_rng(0))
    for dtype in (np.float32, np.float64):
        matrix = kind(csr(distance).astype(dtype))
        labels = ops.dbscan(matrix, [0.125, 0.5], 4)
        assert isinstance(labels, np.ndarray)
        for found, eps in zip(labels, [0.125, 0.5], strict=True):
            np.testing.assert_array_equal(found, scikit(matrix, eps, 4))
    assert (ops.dbscan(kind((3, 3), dtype=np.float32), 0.5, 2) == -1).all()


def test_float64_distances_are_compared_as_such(library):
    eps = 0.6  # float32(0.6) is larger
    values = [eps, np.nextafter(eps, 1), float(np.float32(eps)), np.nextafter(eps, 0)]
    for value in values:
        distance = np.array([[0, value], [value, 0]])
        expected = [scikit(distance, level, 2) for level in (eps, 0.7, eps, 0.1)]
        labels = ops.dbscan(library(distance, "float64"), [eps, 0.7, eps, 0.1], 2)
        np.testing.assert_array_equal(library.back(labels), expected)
        labels = ops.dbscan(library(distance, "float32"), eps, 2)
        np.testing.assert_array_equal(library.back(labels), scikit(distance.astype("f"), eps, 2))


def test_number_of_threads():
    rng = np.random.default_rng(0)
    samples = 5000
    near = (np.arange(samples)[:, None] + rng.integers(1, 40, (samples, 6))) % samples
    pairs = np.stack([np.repeat(np.arange(samples), 6), near.ravel()], 1)
    matrix = edges(samples, np.unique(np.sort(pairs), axis=0))
    matrix.data *= rng.random(matrix.nnz).astype(np.float32) * 2
    distance = rng.random((700, 700)).astype(np.float32)
    results = []
    for count in (1, 2, 8):
        with threads(count):
            results.append((
                ops.dbscan(matrix, [0.3, 0.5], 6).tobytes(),
                ops.dbscan(distance, 0.01, 4).tobytes(),
                ops.mean_smallest(matrix, 1e-4),
                ops.mean_smallest(distance, 0.1),
            ))  # fmt: skip
    assert results[0] == results[1] == results[2]


@given(samples=st.integers(1, 50), min_samples=st.integers(1, 5), seed=st.integers(0, 999))
def test_permuting_samples_permutes_clusters(samples, min_samples, seed):
    rng = np.random.default_rng(seed)
    distance = random_pairs(samples, 0.1, rng)
    order = rng.permutation(samples)
    labels = ops.dbscan(distance, 0.5, min_samples)[order]
    permuted = ops.dbscan(np.ascontiguousarray(distance[order][:, order]), 0.5, min_samples)
    np.testing.assert_array_equal(labels < 0, permuted < 0)
    core = ((distance <= 0.5).sum(1) >= min_samples)[order]  # a border sample may change sides
    same = labels[:, None] == labels
    same_permuted = permuted[:, None] == permuted
    np.testing.assert_array_equal(same[core][:, core], same_permuted[core][:, core])


def test_entries_outside_the_graph(library):
    matrix = edges(4, [(0, 1), (1, 2)])
    graph = to_graph(library, matrix)
    graph.indices = library(np.where(matrix.indices == 3, 9, matrix.indices), "int64")
    if library.floor == "cpu":
        with pytest.raises(ValueError) as error:
            ops.dbscan(graph, 0.5, 2)
        assert str(error.value) == (
            f"dbscan: indices must lie in [0, 4), got 9 at position {matrix.nnz - 1}"
        )
        graph = to_graph(library, matrix)
        graph.indptr = library(np.array([0, 2, 1, 4, 8]))
        with pytest.raises(ValueError) as error:
            ops.dbscan(graph, 0.5, 2)
        assert str(error.value) == (
            f"dbscan: indptr must ascend from 0 to the {matrix.nnz} entries, got 1 at position 2"
        )
    else:
        np.testing.assert_array_equal(library.back(ops.dbscan(graph, 0.5, 2)), [0, 0, 0, -1])
        graph.indptr = library(np.array([-5, 2, 1, 400, 3]))
        assert ops.dbscan(graph, 0.5, 2).shape == (4,)
        assert ops.mean_smallest(graph, 1.0) > 0


def test_wrong_arguments(library):
    graph = to_graph(library, edges(4, [(0, 1)]))
    dense = library(np.zeros((4, 4), np.float32))

    def changed(**attributes):
        return SimpleNamespace(**{**vars(graph), **attributes})

    ids = library(np.zeros(3, np.int64))
    cases = [
        ((dense, -0.1), "eps must be finite and at least 0, got -0.1"),
        ((dense, float("nan")), "eps must be finite and at least 0, got nan"),
        ((dense, [0.5, float("inf")]), "eps must be finite and at least 0, got inf"),
        ((dense, []), "eps must hold 1 to 64 values, got 0"),
        ((dense, [0.5] * 65), "eps must hold 1 to 64 values, got 65"),
        ((dense, 0.5, 0), "min_samples must be at least 1, got 0"),
        (([[0.0]], 0.5), "graph must be CSR or an array of distances, got list"),
        (
            (library(np.zeros((3, 4), np.float32)), 0.5),
            "distance must have shape (3, 3), got (3, 4)",
        ),
        (
            (library(np.zeros(9, np.float32)), 0.5),
            "distance must have shape (any, any), got (9,)",
        ),
        ((library(np.float32(1)), 0.5), "distance must have shape (any, any), got ()"),
        ((library(np.zeros((4, 4)), "float16"), 0.5), "distance must be float32, got float16"),
        ((changed(shape=(4, 5)), 0.5), "graph must have shape (4, 4), got (4, 5)"),
        ((changed(indices=ids), 0.5), "indices must have shape (6,), got (3,)"),
        ((changed(indptr=graph.distances), 0.5), "graph must have shape (5, 5), got (4, 4)"),
        ((changed(indices=graph.distances), 0.5), "indices must be int64 or int32, got float32"),
        ((edges(4, []).tocsc(), 0.5), "graph must be a CSR matrix (graph.tocsr()), got csc"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as error:
            ops.dbscan(*arguments)
        assert str(error.value) == f"dbscan: {message}"


# --- overlap --------------------------------------------------------------------------------------


def random_labels(samples, clusters, rng):
    return rng.integers(-1, clusters, samples) if clusters else np.full(samples, -1)


@pytest.mark.parametrize("samples, clusters", [(0, 3), (1, 1), (40, 0), (300, 1), (1000, 90)])
def test_overlap_matches_reference(library, samples, clusters):
    rng = np.random.default_rng(samples)
    a, b = random_labels(samples, clusters, rng), random_labels(samples, 2 * clusters, rng)
    for dtype in ("int64", "int32"):
        overlap = ops.cluster_overlap(library(a, dtype), library(b, dtype))
        expected = reference.cluster_overlap(a, b)
        for found, wanted in zip(overlap, expected, strict=True):
            np.testing.assert_array_equal(library.back(found), wanted)
            assert library.back(found).dtype == np.int64


def test_overlap_of_wide_labels(library):
    rng = np.random.default_rng(0)
    names = rng.integers(0, 2**62, 30)
    names[:4] = [0, 2**63 - 1, 2**32, 2**40]
    a, b = (names[rng.integers(0, 30, 500)] for _ in range(2))
    overlap = ops.cluster_overlap(library(a), library(b))
    for found, wanted in zip(overlap, reference.cluster_overlap(a, b), strict=True):
        np.testing.assert_array_equal(library.back(found), wanted)


def test_reliability_of_self_paced_contrastive_learning(library):
    """SpCL makes outliers clusters of one, then divides N x N tables of shared members."""
    rng = np.random.default_rng(0)
    samples = 400
    normal, tight = random_labels(samples, 30, rng), random_labels(samples, 50, rng)

    def singles(labels):
        labels = labels.copy()
        labels[labels < 0] = labels.max() + 1 + np.arange((labels < 0).sum())
        return labels

    same_a, same_b = (x[:, None] == x for x in (singles(normal), singles(tight)))
    dense = 1 - (same_a & same_b).sum(1) / (same_a | same_b).sum(1)
    for a, b in [(normal, tight), (singles(normal), singles(tight))]:
        shared, size_a, size_b = map(library.back, ops.cluster_overlap(library(a), library(b)))
        np.testing.assert_allclose(1 - shared / (size_a + size_b - shared), dense, rtol=1e-12)


def test_wrong_labels(library):
    ids = library(np.zeros(3, np.int64))
    cases = [
        ((ids, library(np.zeros(4, np.int64))), "b must have shape (3,), got (4,)"),
        ((library(np.zeros(3, np.float32)), ids), "a must be int64 or int32, got float32"),
        (([0, 1, 2], ids), "a must be an array of torch, CuPy or NumPy, got list"),
        ((library(np.zeros((3, 1), np.int64)), ids), "a must have shape (any,), got (3, 1)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as error:
            ops.cluster_overlap(*arguments)
        assert str(error.value) == f"cluster_overlap: {message}"


# --- eps ------------------------------------------------------------------------------------------


def test_mean_smallest_matches_reference(library):
    for seed, (samples, kept) in enumerate(
        [(2, 1.0), (9, 1.0), (60, 0.1), (300, 0.02), (700, 0.5)]
    ):
        rng = np.random.default_rng(seed)
        kept_pairs = random_pairs(samples, kept, rng, steps=int(rng.choice([8, 2**20])))
        kept_pairs[0, 1] = kept_pairs[1, 0] = 0  # a pair of duplicates: it does not count
        kept_pairs[0, -1] = kept_pairs[-1, 0] = 0.5
        matrix, dense = csr(kept_pairs), np.minimum(kept_pairs, 1)
        for fraction in (0.05, 0.3, 0.9, 1.0):
            if np.round(fraction * np.count_nonzero(np.triu(dense, 1))) == 0:
                continue
            expected = reference.mean_smallest(dense, fraction)
            for form in (to_graph(library, matrix), library(dense)):
                found = ops.mean_smallest(form, fraction)
                assert isinstance(found, float)
                np.testing.assert_allclose(found, expected, rtol=1e-6)
                assert found == ops.mean_smallest(form, fraction)


@given(
    samples=st.integers(2, 40),
    fraction=st.floats(0.05, 1),
    scale=st.sampled_from([1e-30, 1.0, 3.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_mean_smallest_of_any_distances(samples, fraction, scale, seed):
    rng = np.random.default_rng(seed)
    kept = random_pairs(samples, 0.4, rng, symmetric=False, steps=512) * np.float32(scale)
    dense = np.where(np.isfinite(kept), kept, 1).astype(np.float32)
    if np.round(fraction * np.count_nonzero(np.triu(dense, 1))) < 1:
        return
    expected = reference.mean_smallest(dense, fraction)
    np.testing.assert_allclose(ops.mean_smallest(csr(kept), fraction), expected, rtol=1e-6)
    np.testing.assert_allclose(ops.mean_smallest(dense, fraction), expected, rtol=1e-6)


def test_mean_smallest_beyond_what_is_stored(library):
    matrix = edges(20, [(i, i + 1) for i in range(19)], 0.25)
    graph = to_graph(library, matrix)
    assert ops.mean_smallest(graph, 0.1) == 0.25
    np.testing.assert_allclose(ops.mean_smallest(graph, 0.2), (19 * 0.25 + 19) / 38)
    assert ops.mean_smallest(to_graph(library, matrix, max_distance=1.0), 0.2) > 0.25
    cut = to_graph(library, matrix, max_distance=0.5)
    assert ops.mean_smallest(cut, 0.1) == 0.25
    with pytest.raises(ValueError) as error:
        ops.mean_smallest(cut, 0.2)
    assert str(error.value) == (
        "mean_smallest: graph must hold the 38 smallest distances, got 19 up to its max_distance 0.5"
    )


def test_eps_beyond_where_a_graph_was_cut(library):
    matrix = edges(20, [(i, i + 1) for i in range(19)], 0.25)
    cut = to_graph(library, matrix, max_distance=0.6)
    for eps in (0.6, np.float32(0.6), [0.3, 0.6]):
        np.testing.assert_array_equal(
            library.back(ops.dbscan(cut, eps, 2)),
            library.back(ops.dbscan(to_graph(library, matrix), eps, 2)),
        )
    for eps, got in ((0.61, 0.61), ([0.5, 0.7], 0.7)):
        with pytest.raises(ValueError) as error:
            ops.dbscan(cut, eps)
        message = f"dbscan: eps must be at most 0.6, the graph's max_distance, got {got}"
        assert str(error.value) == message
    for most in (None, 1.0):  # nothing was cut
        assert (
            library.back(ops.dbscan(to_graph(library, matrix, max_distance=most), 2.0, 2)).max()
            == 0
        )


def test_a_graph_knows_where_it_was_cut():
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    whole, cut = ops.jaccard_graph(x, 6, 3), ops.jaccard_graph(x, 6, 3, max_distance=0.5)
    assert whole._fields == ("indptr", "indices", "distances", "shape", "max_distance")
    assert (whole.max_distance, cut.max_distance) == (None, 0.5)
    ops.dbscan(cut, 0.5)
    with pytest.raises(ValueError, match=r"eps must be at most 0\.5"):
        ops.dbscan(cut, 0.6)
    with pytest.raises(ValueError, match=r"up to its max_distance 0\.5"):
        ops.mean_smallest(cut, 0.5)
    assert ops.mean_smallest(whole, 0.5) > 0.5


def test_mean_smallest_wrong_arguments(library):
    dense = library(np.ones((4, 4), np.float32))
    cases = [
        ((dense, 0.0), "fraction must lie in (0, 1], got 0.0"),
        ((dense, 1.5), "fraction must lie in (0, 1], got 1.5"),
        (
            (dense, 0.01),
            "fraction must take at least one of the 6 non-zero distances, got 0.01",
        ),
        (
            (library(np.zeros((4, 4), np.float32)), 0.5),
            "fraction must take at least one of the 0 non-zero distances, got 0.5",
        ),
        ((library(np.ones((4, 4)), "float64"), 0.5), "distance must be float32, got float64"),
        ((library(np.zeros((0, 0), np.float32)), 0.5),
         "fraction must take at least one of the 0 non-zero distances, got 0.5"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(ValueError) as error:
            ops.mean_smallest(*arguments)
        assert str(error.value) == f"mean_smallest: {message}"


# --- torch ----------------------------------------------------------------------------------------


class Csr(NamedTuple):  # what old torch.compile can build inside a graph
    indptr: Any
    indices: Any
    distances: Any
    shape: tuple[int, int]


def test_compiles_without_a_graph_break(torch_library):
    graph = to_graph(torch_library, edges(30, [(i, i + 1) for i in range(20)]))

    def reliability(indptr, indices, distances):
        of = Csr(indptr, indices, distances, (30, 30))
        tight, loose = ops.dbscan(of, [0.4, 0.6], 2)
        shared, size_a, size_b = ops.cluster_overlap(tight, loose)
        return shared / (size_a + size_b - shared), ops.dbscan(of, 0.5, 3)

    arguments = graph.indptr, graph.indices, graph.distances
    compiled = torch.compile(reliability, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), reliability(*arguments))


def test_operator_registration(torch_library):
    graph = to_graph(torch_library, edges(30, [(i, i + 1) for i in range(20)]))
    dense = torch_library(np.random.default_rng(0).random((30, 30)).astype(np.float32))
    for parts in ((graph.distances, graph.indptr, graph.indices), (dense, None, None)):
        torch.library.opcheck(torch.ops.pyreid.dbscan.default, (*parts, [0.3, 0.5], 3))
    labels = torch_library(np.arange(30) % 7)
    torch.library.opcheck(torch.ops.pyreid.cluster_overlap.default, (labels, labels % 3))


def test_two_floors_agree(emulator):
    rng = np.random.default_rng(0)
    matrix = csr(random_pairs(500, 0.02, rng, steps=2**20))
    kernel = ops.dbscan(matrix, [0.2, 0.6], 3), ops.mean_smallest(matrix, 0.01)
    before, _native._emulator = _native._emulator, None
    host = ops.dbscan(matrix, [0.2, 0.6], 3), ops.mean_smallest(matrix, 0.01)
    _native._emulator = before
    np.testing.assert_array_equal(kernel[0], host[0])
    np.testing.assert_allclose(kernel[1], host[1], rtol=1e-12)
