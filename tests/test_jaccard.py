import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyreid
from pyreid import _native, ops, reference
from pyreid.ops import _panels
from pyreid.ops import jaccard as jaccard_room

WITHOUT_CAMERAS = ["spcl", "openunreid", "zhong", "mmt", "jvtc", "strong-baseline"]
VARIANTS = [*WITHOUT_CAMERAS, "ca-jaccard"]
RERANKING = ["zhong", "openunreid", "jvtc", "strong-baseline"]
HALF = ("jvtc", "strong-baseline")


def people(size, dim=16, ids=None, *, unit=True, noise=0.7, seed=0):
    """Features that gather around the centres of `ids` people."""
    rng = np.random.default_rng(seed)
    ids = ids or max(size // 8, 1)
    x = rng.standard_normal((ids, dim))[np.arange(size) % ids]
    x = x + noise * rng.standard_normal((size, dim))
    length = np.linalg.norm(x, axis=1, keepdims=True) if size else 1
    return (x / length * (1 if unit else rng.uniform(0.5, 2, (size, 1)))).astype(np.float32)


def on_a_grid(size, dim=6, seed=0):
    """Features whose products are exact, and tie."""
    return np.random.default_rng(seed).integers(0, 3, (size, dim)).astype(np.float32) / 2


def dense(graph, back=np.asarray):
    """A graph as a matrix, its structure checked."""
    indptr, indices, distances = (back(x) for x in graph[:3])
    assert (indptr.dtype, indices.dtype, distances.dtype) == (np.int64, np.int32, np.float32)
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(indptr))
    order = rows * graph.shape[1] + indices
    assert (np.diff(order) > 0).all(), "columns ascend within rows"
    matrix = np.ones(graph.shape, np.float32)
    matrix[rows, indices] = distances
    return matrix


def tolerance(variant):
    return 4e-3 if variant in HALF else 1e-5


@pytest.fixture
def small_panels(monkeypatch):
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)
    monkeypatch.setattr(_panels, "_CUDA_SCORES", 1)
    monkeypatch.setattr(jaccard_room, "_QUERIES", 100)


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size, dim, k", [
    (0, 4, 3),
    (1, 1, 1),
    (40, 8, 50),  # k > N
    (700, 6, 9),
])  # fmt: skip
@pytest.mark.parametrize("batch", [None, 0, 1, 7])
def test_neighbours(library, small_panels, size, dim, k, batch):
    features = on_a_grid(size, dim)
    queries = None if batch is None else on_a_grid(batch, dim, seed=1)
    if size > 100 and batch is None and library.floor == "emulated":
        features = features[:300]
    given = {} if batch is None else {"queries": library(queries)}
    found = ops.knn(library(features), k, **given)
    scores, rows = library.back(found.scores), library.back(found.rows)
    expected_scores, expected_rows = reference.knn(features, k, queries=queries)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores.astype(np.float32))
    assert rows.dtype == np.int64


@pytest.mark.parametrize("size, dim, k", [(1, 3, 2), (100, 600, 7), (1700, 5, 30), (800, 3, 800)])
def test_search_of_a_set_in_itself_is_the_plain_search(size, dim, k):
    for features in (people(size, dim), on_a_grid(size, dim)):
        for dtype in ("float32", "float16", "bfloat16"):
            x = torch.tensor(features).to(getattr(torch, dtype))
            both_ways, one_way = ops.knn(x, k), ops.knn(x, k, queries=x)
            torch.testing.assert_close(both_ways, one_way, rtol=0, atol=0)


def test_neighbours_in_half_precision(library):
    features = on_a_grid(90)
    for dtype in library.half_precisions:
        rows = library.back(ops.knn(library(features, dtype), 9).rows)
        np.testing.assert_array_equal(rows, reference.knn(features, 9)[1])


def test_minus_zero_ties_with_zero_among_neighbours():
    features = np.array([[0.0], [-0.0], [1.0], [-0.0]], np.float32)
    np.testing.assert_array_equal(ops.knn(features, 4).rows[2], [2, 0, 1, 3])


# --- sets and distances ---------------------------------------------------------------------------


@pytest.mark.parametrize("k1", [1, 2, 5, 6, 7, 33])
@pytest.mark.parametrize("variant", ["spcl", "zhong"])
def test_sets_are_those_of_the_source(library, k1, variant):
    features = on_a_grid(70)
    ranks = reference.knn(features, 70)[1].astype(np.int32)
    columns = k1 + (variant == "zhong")
    rule = (columns, columns, round(k1 / 2) + 1)
    lists = library(np.ascontiguousarray(ranks[:, :columns]))
    space = (None, None, None)
    work = jaccard_room.Work(70)
    arguments = (library(features), lists, rule, space, False, work)
    starts, ids, _ = jaccard_room._weights("op", *arguments)
    expected = reference.reciprocal_sets(ranks[:, :columns], k1, variant)
    np.testing.assert_array_equal(library.back(ids), np.concatenate(expected))
    np.testing.assert_array_equal(np.diff(library.back(starts)), [len(s) for s in expected])


def test_sets_too_large_for_shared_memory(library):
    features = people(60, ids=2)
    matrix = library.back(ops.jaccard_distance(library(features), 50, 3))
    expected = reference.jaccard_distance(features, 50, 3)
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k1, k2", [(6, 3), (9, 1), (5, 40)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_distances_match_reference(library, small_panels, variant, k1, k2):
    size = 48
    features = people(size, unit=variant in ("spcl", "ca-jaccard"))
    given, host = {}, {}
    if variant == "ca-jaccard":
        cameras = np.random.default_rng(0).integers(3, 6, size)
        cameras[:2] = 9  # a camera of fewer images than neighbours wanted
        host = {"cameras": cameras, "intra_k": (3, 2), "inter_k": (k1, k2)}
        given = host | {"cameras": library(cameras)}
    else:
        near = reference.distances(features, variant)
        ranks = np.argsort(near, axis=1, kind="stable")
        given, host = {"ranks": library(ranks)}, {"ranks": ranks}
    expected = reference.jaccard_distance(features, k1, k2, variant=variant, **host)
    x = library(features)
    matrix = library.back(ops.jaccard_distance(x, k1, k2, variant=variant, **given))
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=tolerance(variant))
    np.testing.assert_array_equal(matrix, matrix.T)
    given.pop("ranks", None)
    searched = library.back(ops.jaccard_distance(x, k1, k2, variant=variant, **given))
    np.testing.assert_allclose(searched, expected, rtol=0, atol=tolerance(variant))
    for most in (0.5,) if library.floor == "emulated" else (None, 0.5, 0.0):
        graph = ops.jaccard_graph(x, k1, k2, max_distance=most, variant=variant, **given)
        near = searched <= (1 if most is None else most)
        np.testing.assert_array_equal(dense(graph, library.back), np.where(near, searched, 1))
        assert graph.indptr[-1] == (near & (searched < 1)).sum()


def test_more_rows_than_accumulators(library):
    features = people(200)
    graph = ops.jaccard_graph(library(features), 8, 3, max_distance=0.7)
    expected = reference.jaccard_distance(features, 8, 3)
    matrix = library.back(ops.jaccard_distance(library(features), 8, 3))
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-5)
    near = np.where(matrix <= 0.7, matrix, 1)
    np.testing.assert_array_equal(dense(graph, library.back), near)


def test_rows_that_are_kept_between_the_two_passes(library, monkeypatch):
    features = people(60)
    graphs = []
    for slots in (0, 7, 64):  # none, some and all rows fit
        monkeypatch.setattr(jaccard_room, "_SLOTS", slots)
        graphs.append(ops.jaccard_graph(library(features), 8, 3, max_distance=0.7))
    assert 0 < (np.diff(library.back(graphs[0].indptr)) > 7).mean() < 1
    for graph in graphs[1:]:
        for part, first in zip(graph[:3], graphs[0][:3], strict=True):
            np.testing.assert_array_equal(library.back(part), library.back(first))


def test_half_precision_features(library):
    features = people(60)
    for dtype in library.half_precisions:
        x = library(features, dtype)
        wide = library(library.back(x).astype(np.float32))
        for variant in ("spcl", "zhong"):
            narrow = library.back(ops.jaccard_distance(x, 8, 3, variant=variant))
            expected = library.back(ops.jaccard_distance(wide, 8, 3, variant=variant))
            np.testing.assert_allclose(narrow, expected, rtol=0, atol=1e-6)


def test_as_scipy(library):
    graph = ops.jaccard_graph(library(people(50)), 8, 3, max_distance=0.6)
    matrix = graph.to_scipy()
    assert matrix.shape == (50, 50)
    np.testing.assert_array_equal(matrix.indptr, library.back(graph.indptr))
    stored = np.where(matrix.toarray() > 0, matrix.toarray(), dense(graph, library.back))
    np.testing.assert_array_equal(stored, dense(graph, library.back))


# --- what tells variants apart --------------------------------------------------------------------


def test_k1_counts_the_row_itself_in_some_variants():
    features = people(80)
    with_self = ops.jaccard_distance(features, 6, 3, variant="openunreid")
    np.testing.assert_allclose(with_self, ops.jaccard_distance(features, 6, 3), atol=1e-5)
    besides = ops.jaccard_distance(features, 6, 3, variant="mmt")
    assert abs(with_self - besides).max() > 0.05


def test_length_of_rows_matters_where_distances_are_euclidean():
    features = people(80, unit=False)
    euclidean = ops.jaccard_distance(features, 6, 3, variant="openunreid")
    assert abs(ops.jaccard_distance(features, 6, 3) - euclidean).max() > 0.05


def test_division_by_the_column_maximum():
    features = 3 * people(80, unit=False)
    ranks = ops.knn(features, 20).rows
    # By 7 neighbours and without division, against 6 and the row itself with it.
    plain = ops.jaccard_distance(features, 7, 3, variant="openunreid", ranks=ranks)
    divided = ops.jaccard_distance(features, 6, 3, variant="mmt", ranks=ranks)
    assert abs(plain - divided).max() > 0.05


@pytest.mark.parametrize("clipped, kept", [("mmt", "zhong"), ("jvtc", "strong-baseline")])
def test_distances_below_zero(clipped, kept):
    features = people(300)
    above = ops.jaccard_distance(features, 6, 3, variant=clipped)
    below = ops.jaccard_distance(features, 6, 3, variant=kept)
    assert above.min() == 0
    assert below.min() < 0
    np.testing.assert_allclose(np.maximum(below, 0), above, atol=tolerance(clipped))


def test_half_precision_arithmetic():
    features = people(200)
    single = ops.jaccard_distance(features, 6, 3, variant="zhong")
    half = ops.jaccard_distance(features, 6, 3, variant="strong-baseline")
    np.testing.assert_array_equal(half, half.astype(np.float16))
    assert 1e-5 < abs(single - half).max() < 4e-3


def test_cameras_matter():
    features = people(80)
    sizes = {"intra_k": (3, 2), "inter_k": (6, 3), "variant": "ca-jaccard"}
    one = ops.jaccard_distance(features, cameras=np.arange(80) % 2, **sizes)
    other = ops.jaccard_distance(features, cameras=np.arange(80) % 3, **sizes)
    renamed = ops.jaccard_distance(features, cameras=np.arange(80) % 2 * -7, **sizes)
    assert abs(one - other).max() > 0.05
    np.testing.assert_array_equal(one, renamed)


# --- promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["spcl", "zhong", "strong-baseline"])
def test_same_bits_for_every_number_of_threads(variant):
    features = people(1700, 24, unit=variant == "spcl")
    threads, graphs = pyreid.get_num_threads(), []
    for count in (1, 2, 8, 8):
        pyreid.set_num_threads(count)
        graphs.append(ops.jaccard_graph(features, 20, 6, variant=variant))
    pyreid.set_num_threads(threads)
    for graph in graphs[1:]:
        for part, first in zip(graph[:3], graphs[0][:3], strict=True):
            np.testing.assert_array_equal(part, first)


def test_same_bits_in_every_schedule():
    if not importlib.util.find_spec("pyreid._emulated"):
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    features, graphs = people(90), []
    for schedule in _native.SCHEDULES:
        with _native.emulated(schedule, seed=3):
            graphs.append(ops.jaccard_graph(features, 8, 3))
    for graph in graphs[1:]:
        np.testing.assert_array_equal(graph.distances, graphs[0].distances)
        np.testing.assert_array_equal(graph.indices, graphs[0].indices)


@given(
    size=st.integers(1, 50), k1=st.integers(1, 12), k2=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_permuting_rows_permutes_distances(size, k1, k2, seed):
    features = people(size, seed=seed)
    order = np.random.default_rng(seed).permutation(size)
    for variant in ("spcl", "zhong"):
        matrix = ops.jaccard_distance(features, k1, k2, variant=variant)
        permuted = ops.jaccard_distance(features[order], k1, k2, variant=variant)
        np.testing.assert_allclose(permuted, matrix[np.ix_(order, order)], rtol=0, atol=1e-5)


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [0, 1, 2, 5])
def test_fewer_rows_than_neighbours(library, variant, size):
    features = people(size, ids=2)
    host = {"cameras": np.arange(size) % 2} if variant == "ca-jaccard" else {}
    given = {name: library(value) for name, value in host.items()}
    matrix = library.back(ops.jaccard_distance(library(features), variant=variant, **given))
    graph = ops.jaccard_graph(library(features), variant=variant, **given)
    assert graph.shape == matrix.shape == (size, size)
    np.testing.assert_array_equal(dense(graph, library.back), matrix)
    if size:
        expected = reference.jaccard_distance(features, variant=variant, **host)
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=tolerance(variant))


def test_more_equal_rows_than_neighbours(library):
    """All name the lowest ones; the others are in nobody's list, and their rows are empty."""
    features = np.concatenate([np.tile(people(1), (9, 1)), people(20, seed=5)])
    k1 = 4
    alone = library.back(ops.jaccard_distance(library(features), k1, 1))
    np.testing.assert_array_equal(alone[k1:9], 1)
    assert np.diagonal(alone)[:k1].max() < 1e-5
    graph = ops.jaccard_graph(library(features), k1, 1)
    assert (np.diff(library.back(graph.indptr))[k1:9] == 0).all()
    # Averaged over k2 = 2 neighbours, rows 0 and 1, they come back, and are equal.
    averaged = library.back(ops.jaccard_distance(library(features), k1, 2))
    assert averaged[:9, :9].max() < 1e-5


def test_a_row_apart_keeps_to_itself(library):
    features = np.zeros((11, 12), np.float32)
    features[:10, :10] = people(10, 10, ids=1, noise=0.2)
    features[10, 11] = 1
    ranks = reference.knn(features, 4)[1]
    graph = ops.jaccard_graph(library(features), 4, 1, ranks=library(ranks))
    indptr, indices = library.back(graph.indptr), library.back(graph.indices)
    np.testing.assert_array_equal(indices[indptr[10] :], [10])
    assert library.back(graph.distances)[-1] < 1e-5


def test_lists_with_gaps(library):
    features = people(30)
    ranks = reference.knn(features, 8)[1]
    ranks[::3, 5:] = -1
    ranks[4] = -1
    for variant in ("spcl", "mmt"):
        given = {"k1": 7, "k2": 3, "variant": variant}
        matrix = ops.jaccard_distance(library(features), ranks=library(ranks), **given)
        expected = reference.jaccard_distance(features, ranks=ranks, **given)
        np.testing.assert_allclose(library.back(matrix), expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(library.back(matrix)[4], 1)


# --- re-ranking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", RERANKING)
@pytest.mark.parametrize("queries, gallery", [(7, 50), (0, 4), (3, 0), (1, 1), (110, 30)])
def test_rerank_matches_reference(library, small_panels, variant, queries, gallery):
    if library.floor == "emulated" and queries + gallery > 100:
        pytest.skip("slow in the emulator")
    features = people(queries + gallery, unit=False)
    q, g = features[:queries], features[queries:]
    for weight in (0.0, 0.3, 1.0):
        mixed = ops.rerank(library(q), library(g), 6, 3, weight, variant=variant)
        mixed = library.back(mixed)
        assert mixed.shape == (queries, gallery)
        assert mixed.dtype == np.float32
        expected = reference.rerank(q, g, 6, 3, weight, variant=variant)
        np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=tolerance(variant))


@pytest.mark.parametrize("variant", RERANKING)
def test_rerank_of_rows_among_themselves(library, small_panels, variant):
    features = people(60 if library.floor == "emulated" else 130, unit=False)
    mixed = library.back(ops.rerank(library(features), None, 6, 3, variant=variant))
    expected = reference.rerank(features, None, 6, 3, variant=variant)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=tolerance(variant))


def test_rerank_tells_how_far_it_is(library, monkeypatch):
    monkeypatch.setattr(jaccard_room, "_QUERIES", 8)
    q, g, told = library(people(20)), library(people(50, seed=1)), []
    mixed = ops.rerank(q, g, 6, 3, progress=lambda *some: told.append(some))
    np.testing.assert_array_equal(library.back(mixed), library.back(ops.rerank(q, g, 6, 3)))
    assert list(dict.fromkeys(stage for stage, *_ in told)) == [
        "neighbours",
        "jaccard",
        "distances",
    ]
    assert [some[1:] for some in told if some[0] == "distances"] == [
        (0, 70), (28, 70), (56, 70), (70, 70)
    ]  # fmt: skip


# --- re-ranking of distances that are there -------------------------------------------------------

DISTANCES = ["zhong", "mmt", "jvtc", "strong-baseline"]


def matrices(queries, gallery, *, ties=False, dtype=np.float32, seed=0):
    """Distances of a union of rows in three blocks; on a grid, many of them tie."""
    make = on_a_grid if ties else people
    features = make(queries + gallery, seed=seed).astype(np.float64)
    squared = ((features[:, None] - features) ** 2).sum(axis=2)
    every = (squared if ties else np.sqrt(squared)).astype(dtype)
    blocks = every[:queries, queries:], every[:queries, :queries], every[queries:, queries:]
    return tuple(np.ascontiguousarray(block) for block in blocks)


@pytest.mark.parametrize("variant", DISTANCES)
@pytest.mark.parametrize("queries, gallery", [(7, 50), (0, 4), (3, 0), (0, 0), (1, 1), (110, 30)])
def test_rerank_distances_matches_reference(library, small_panels, variant, queries, gallery):
    if library.floor == "emulated" and queries + gallery > 100:
        pytest.skip("slow in the emulator")
    for ties in (False, True):
        blocks = matrices(queries, gallery, ties=ties)
        for weight in (0.0, 0.3, 1.0):
            mixed = ops.rerank_distances(*map(library, blocks), 6, 3, weight, variant=variant)
            mixed = library.back(mixed)
            assert mixed.shape == (queries, gallery)
            assert mixed.dtype == np.float32
            expected = reference.rerank_distances(*blocks, 6, 3, weight, variant=variant)
            np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=tolerance(variant))


@pytest.mark.parametrize("variant", DISTANCES)
@pytest.mark.parametrize("k1, k2", [(6, 3), (9, 1), (5, 70), (70, 6)])
def test_all_rows_to_all(library, variant, k1, k2):
    """Not symmetric, as similarities of other kinds may be: sources look at columns."""
    given = np.random.default_rng(0).random((60, 60)).astype(np.float32)
    mixed = library.back(ops.rerank_distances(library(given), None, None, k1, k2, variant=variant))
    expected = reference.rerank_distances(given, None, None, k1, k2, variant=variant)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=tolerance(variant))
    if k1 == 6:
        turned = ops.rerank_distances(np.ascontiguousarray(given.T), None, None, k1, k2)
        assert abs(reference.rerank_distances(given, None, None, k1, k2) - turned).max() > 0.05


def test_given_distances_and_features_agree():
    q, g = people(40, unit=False), people(150, seed=1, unit=False)
    union = np.concatenate([q, g]).astype(np.float64)
    squared = ((union[:, None] - union) ** 2).sum(axis=2)
    for variant in ("zhong", "jvtc", "strong-baseline"):
        given = (np.sqrt(squared) if variant == "zhong" else squared).astype(np.float32)
        blocks = given[:40, 40:], given[:40, :40], given[40:, 40:]
        blocks = map(np.ascontiguousarray, blocks)
        np.testing.assert_allclose(
            ops.rerank_distances(*blocks, 10, 4, variant=variant),
            ops.rerank(q, g, 10, 4, variant=variant),
            atol=tolerance(variant),
        )


def test_only_zhong_squares():
    blocks = matrices(10, 60)
    squares = [block**2 for block in blocks]
    by_distance = ops.rerank_distances(*blocks, 6, 3)
    below = ops.rerank_distances(*squares, 6, 3, 0.0, variant="mmt")
    np.testing.assert_allclose(
        np.maximum(ops.rerank_distances(*blocks, 6, 3, 0.0), 0), below, atol=1e-6
    )
    assert abs(ops.rerank_distances(*squares, 6, 3) - by_distance).max() > 0.05


def test_rerank_distances_in_half_precision(library):
    blocks = [block.astype(np.float16) for block in matrices(9, 40)]
    expected = reference.rerank_distances(*blocks, 6, 3)
    mixed = ops.rerank_distances(*map(library, blocks), 6, 3)
    np.testing.assert_allclose(library.back(mixed), expected, rtol=1e-5, atol=1e-5)


def test_distances_are_left_as_they_are_and_bits_are_the_same():
    blocks = matrices(1100, 60)
    before, threads, results = [block.copy() for block in blocks], pyreid.get_num_threads(), []
    for count in (1, 2, 5):
        pyreid.set_num_threads(count)
        results.append(ops.rerank_distances(*blocks))
        results.append(ops.rerank_distances(*map(torch.from_numpy, blocks)).numpy())
    pyreid.set_num_threads(threads)
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-6)
    for library in (0, 1):
        for result in results[library + 2 :: 2]:
            np.testing.assert_array_equal(result, results[library])
    for block, kept in zip(blocks, before, strict=True):
        np.testing.assert_array_equal(block, kept)


@given(size=st.integers(1, 40), k1=st.integers(1, 9), k2=st.integers(1, 5), seed=st.integers(0, 99))
def test_permuting_rows_permutes_reranked_distances(size, k1, k2, seed):
    given_, order = matrices(0, size)[2], np.random.default_rng(seed).permutation(size)
    mixed = ops.rerank_distances(given_, None, None, k1, k2)
    permuted = np.ascontiguousarray(given_[np.ix_(order, order)])
    permuted = ops.rerank_distances(permuted, None, None, k1, k2)
    np.testing.assert_allclose(permuted, mixed[np.ix_(order, order)], rtol=0, atol=1e-5)


def test_wrong_distances(library):
    qg, qq, gg = map(library, matrices(4, 9))
    known = "'zhong', 'mmt', 'jvtc' or 'strong-baseline'"
    cases = [
        ((qg, qq), {}, "gallery_gallery must be given as the other is, got None"),
        ((qg, None, gg), {}, "query_query must be given as the other is, got None"),
        ((qg,), {}, "query_gallery must have shape (4, 4), got (4, 9)"),
        ((qg, gg, gg), {}, "query_query must have shape (4, 4), got (9, 9)"),
        ((qg, qq, qq), {}, "gallery_gallery must have shape (9, 9), got (4, 4)"),
        ((library(np.ones((4, 9), np.int64)), qq, gg), {},
         "query_gallery must be float32, float16 or bfloat16, got int64"),
        ((qg, qq, gg), {"k1": 0}, "k1 must be at least 1, got 0"),
        ((qg, qq, gg), {"k2": 0}, "k2 must be at least 1, got 0"),
        ((qg, qq, gg), {"lambda_value": -0.5}, "lambda_value must lie in [0, 1], got -0.5"),
        ((qg, qq, gg), {"variant": "spcl"}, f"variant must be {known}, got 'spcl'"),
    ]  # fmt: skip
    for arguments, options, message in cases:
        with pytest.raises(ValueError) as error:
            ops.rerank_distances(*arguments, **options)
        assert str(error.value) == f"rerank_distances: {message}"


def test_distances_that_are_not_finite():
    qg, qq, gg = matrices(4, 9)
    qg[2, 3] = np.nan
    with pytest.raises(ValueError) as error:
        ops.rerank_distances(qg, qq, gg)
    message = "query_gallery must have rows of finite norm, got nan in row 2"
    assert str(error.value) == f"rerank_distances: {message}"


# --- arguments ------------------------------------------------------------------------------------


def test_wrong_arguments(library):
    features = library(people(20, 8))
    ranks = library(np.zeros((20, 9), np.int64))
    cameras = library(np.zeros(20, np.int64))
    known = "'spcl', 'openunreid', 'zhong', 'mmt', 'jvtc', 'strong-baseline' or 'ca-jaccard'"
    cases = [
        ({"k1": 0}, "k1 must be at least 1, got 0"),
        ({"k1": 70000}, "k1 must be at most 65536, got 70000"),
        ({"k2": 0}, "k2 must be at least 1, got 0"),
        ({"max_distance": -0.5}, "max_distance must be at least 0 or None, got -0.5"),
        ({"variant": "peer"}, f"variant must be {known}, got 'peer'"),
        ({"features": ranks}, "features must be float32, float16 or bfloat16, got int64"),
        ({"ranks": features}, "ranks must be int64 or int32, got float32"),
        ({"ranks": cameras}, "ranks must have shape (20, any), got (20,)"),
        ({"ranks": ranks, "k1": 10}, "ranks must have at least 10 columns, got 9"),
        (
            {"ranks": ranks, "k1": 9, "variant": "mmt"},
            "ranks must have at least 10 columns, got 9",
        ),
        ({"cameras": cameras}, "cameras must be None for variant 'spcl', got an array"),
        ({"variant": "ca-jaccard"}, "cameras must be given for variant 'ca-jaccard', got None"),
        (
            {"variant": "ca-jaccard", "cameras": cameras, "ranks": ranks, "k1": 6},
            "ranks must be None for variant 'ca-jaccard', got an array",
        ),
        (
            {"variant": "ca-jaccard", "cameras": cameras, "intra_k": (0, 1)},
            "intra_k[0] must be at least 1, got 0",
        ),
        (
            {"variant": "ca-jaccard", "cameras": library(np.zeros(19, np.int64))},
            "cameras must have shape (20,), got (19,)",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError) as error:
            ops.jaccard_graph(**({"features": features} | changes))
        assert str(error.value) == f"jaccard_graph: {message}"


def test_wrong_arguments_of_knn_and_rerank(library):
    x = library(people(20, 8))
    narrow = library(people(20, 7))
    reranking = "'openunreid', 'zhong', 'jvtc' or 'strong-baseline'"
    cases = [
        (lambda: ops.knn(x, 0), "knn: k must be at least 1, got 0"),
        (
            lambda: ops.knn(x, 2, queries=narrow),
            "knn: queries must have shape (any, 8), got (20, 7)",
        ),
        (
            lambda: ops.knn(x, 2, precision="half"),
            "knn: precision must be 'exact' or 'fast', got 'half'",
        ),
        (lambda: ops.rerank(x, narrow), "rerank: gallery must have shape (any, 8), got (20, 7)"),
        (
            lambda: ops.rerank(x, x, lambda_value=1.5),
            "rerank: lambda_value must lie in [0, 1], got 1.5",
        ),
        (
            lambda: ops.rerank(x, x, variant="spcl"),
            f"rerank: variant must be {reranking}, got 'spcl'",
        ),
        (lambda: ops.jaccard_distance(x, 0), "jaccard_distance: k1 must be at least 1, got 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_features_that_are_not_finite(value):
    features = people(20, 8)
    features[3, 5] = float(value)
    for op in (ops.jaccard_graph, ops.jaccard_distance, lambda x: ops.knn(x, 4)):
        with pytest.raises(ValueError, match="features must have rows of finite norm") as error:
            op(features)
        assert str(error.value).endswith(f"got {value} in row 3")


def test_ranks_out_of_range():
    ranks = np.zeros((20, 9), np.int64)
    ranks[7, 3] = 20
    with pytest.raises(ValueError) as error:
        ops.jaccard_graph(people(20), 9, ranks=ranks)
    assert str(error.value) == "jaccard_graph: ranks must lie in [-1, 20), got 20"


def test_debug_looks_at_values(library):
    """What the CUDA floor passes over in silence, with its kernels emulated too."""
    features, ranks = people(20, 8), np.tile(np.arange(9), (20, 1))
    ranks[:, 3] = -1
    bad_ranks, bad = ranks.copy(), features.copy()
    bad_ranks[7, 4], bad[3, 5] = 20, np.nan
    with pyreid.debug():
        ops.jaccard_graph(library(features), 9, ranks=library(ranks))
        for call, message in [
            (lambda: ops.jaccard_graph(library(features), 9, ranks=library(bad_ranks)),
             "jaccard_graph: ranks must lie in [-1, 20), got 20"),
            (lambda: ops.jaccard_graph(library(bad), 9),
             "jaccard_graph: features must have rows of finite norm, got nan in row 3"),
            (lambda: ops.knn(library(features), 4, queries=library(bad)),
             "knn: queries must have rows of finite norm, got nan in row 3"),
        ]:  # fmt: skip
            with pytest.raises(ValueError) as error:
                call()
            assert str(error.value) == message
    if library.floor != "cpu":
        found = library.back(ops.knn(library(features), 4, queries=library(bad)).rows)
        assert (found[3] == -1).all()
        ops.jaccard_graph(library(features), 9, ranks=library(bad_ranks))


# --- torch ----------------------------------------------------------------------------------------


def test_compiled(torch_library):
    features = torch_library(people(40))
    gallery = torch_library(people(30, seed=1))

    def all_three(x, gallery):
        near = ops.knn(x * 2, 5).scores.sum()
        again = ops.rerank_distances(x @ x.T + 40, None, None, 6, 3)
        return near + ops.jaccard_distance(x, 6, 3), ops.rerank(x, gallery, 6, 3) + 1, again

    compiled = torch.compile(all_three, fullgraph=True, backend="aot_eager")
    for result, expected in zip(
        compiled(features, gallery), all_three(features, gallery), strict=True
    ):
        torch.testing.assert_close(result, expected)


def test_operator_registration(torch_library):
    x, gallery = torch_library(people(40)), torch_library(people(30))
    cameras = torch_library(np.arange(40) % 3)
    sizes = ([3, 2], [6, 3])
    for op, arguments in (
        (torch.ops.pyreid.knn, (x, 5, gallery, "exact")),
        (torch.ops.pyreid.jaccard_distance, (x, 6, 3, "zhong", None, None, *sizes)),
        (torch.ops.pyreid.jaccard_distance, (x, 6, 3, "ca-jaccard", None, cameras, *sizes)),
        (torch.ops.pyreid.rerank, (x, gallery, 6, 3, 0.3, "zhong")),
        (torch.ops.pyreid.rerank, (x, None, 6, 3, 0.3, "jvtc")),
        (torch.ops.pyreid.rerank_distances, (x @ x.T + 40, None, None, 6, 3, 0.3, "zhong")),
    ):
        torch.library.opcheck(op.default, arguments)


def test_features_that_require_gradients(torch_library):
    x = torch_library(people(40)).requires_grad_()
    gallery = torch_library(people(30)).requires_grad_()
    cameras = torch_library(np.arange(40) % 3)
    graph = ops.jaccard_graph(x, 6, 3, variant="ca-jaccard", cameras=cameras)
    for result in (ops.knn(x, 4).scores, graph.distances, ops.rerank(x, gallery, 6, 3)):
        assert not result.requires_grad


def test_products_are_rounded_like_short_sums():
    # Rows that are all alike, as networks give them: neighbours differ in the sixth digit.
    rng = np.random.default_rng(0)
    features = np.abs(rng.standard_normal((1, 2048))) + 0.3 * rng.standard_normal((300, 2048))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    exact = features.astype(np.float64) @ features.T.astype(np.float64)
    for queries in (features, features[:5]):  # many, and few, which are multiplied another way
        scores, rows = ops.knn(features, 300, queries=queries)
        error = np.abs(scores - np.take_along_axis(exact[: len(queries)], rows, axis=1))
        assert error.max() < 6e-7
        assert error.mean() < 1.2e-7
