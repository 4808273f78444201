import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

import pyreid
from pyreid import ops, reference
from pyreid.ops import _panels, ranking


def problem(queries, size, dim=8, *, persons=5, cameras=3, grid=None, seed=0):
    """Features and ids, junk among both. `grid`: coordinates from that many values, so that scores tie."""
    rng = np.random.default_rng(seed)

    def features(count):
        if grid:  # sums of a few powers of two: exact in float32, in any order
            return rng.integers(0, grid, (count, dim)).astype(np.float32) / 4
        return rng.standard_normal((count, dim)).astype(np.float32)

    ids = {
        "query_ids": rng.integers(-1, persons, queries),
        "gallery_ids": rng.integers(-1, persons, size),
        "query_cameras": rng.integers(0, cameras, queries),
        "gallery_cameras": rng.integers(0, cameras, size),
    }
    return features(queries), features(size), ids


def check(library, queries, gallery, ids, *, distance=None, dtype=None, max_rank=10):
    """The op, twice, against the reference; returns the op's."""
    arrays = {name: library(values) for name, values in ids.items()}
    if distance is None:
        queries, gallery = library(queries, dtype), library(gallery, dtype)
        features = library.back(queries), library.back(gallery)
    else:
        features, arrays["distance"] = (None, None), library(distance)
    runs = [ops.evaluate_ranking(queries, gallery, **arrays, max_rank=max_rank) for _ in range(2)]
    for one, other in zip(*runs, strict=True):
        assert np.asarray(library.back(one) if hasattr(one, "shape") else one).tobytes() == (
            np.asarray(library.back(other) if hasattr(other, "shape") else other).tobytes()
        )
    found = runs[0]
    expected = reference.evaluate_ranking(*features, **ids, distance=distance, max_rank=max_rank)
    cmc, mean_ap, mean_inp, ap, valid = expected
    np.testing.assert_array_equal(library.back(found.cmc), cmc.astype(np.float32))
    np.testing.assert_array_equal(library.back(found.valid), valid)
    np.testing.assert_allclose(library.back(found.ap), ap, rtol=0, atol=1e-6)
    np.testing.assert_allclose([found.mAP, found.mINP], [mean_ap, mean_inp], rtol=0, atol=1e-6)
    assert type(found.mAP) is type(found.mINP) is float
    assert type(found.cmc) is type(found.ap) is type(found.valid) is type(arrays["query_ids"])
    assert library.back(found.cmc).dtype == library.back(found.ap).dtype == np.float32
    assert library.back(found.valid).dtype == bool
    return found


@pytest.fixture
def small_blocks(monkeypatch):
    """Three queries at a time, and a gallery that is cut after 256 rows."""
    for module in (_panels, ranking):
        monkeypatch.setattr(module, "_CPU_SCORES", 1)
        monkeypatch.setattr(module, "_CUDA_SCORES", 1)
    monkeypatch.setattr(ranking, "_FEWEST", 3)


def test_by_hand(library):
    #                    junk  match same view  match  other  other
    gallery_ids = np.array([-1, 7, 7, 7, 3, 4])
    gallery_cameras = np.array([0, 1, 0, 2, 0, 1])
    scores = np.array(
        [
            [0.95, 0.7, 1.0, 0.5, 0.8, 0.6],  # of 7: other, match, other, match
            [0.95, 0.7, 1.0, 0.5, 0.8, 0.6],  # of 3, at the only camera that saw it
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],  # of 4: the only match, and first
        ],
        np.float32,
    )
    found = ops.evaluate_ranking(
        None,
        None,
        distance=library(1 - scores),
        query_ids=library(np.array([7, 3, 4])),
        query_cameras=library(np.array([0, 0, 0])),
        gallery_ids=library(gallery_ids),
        gallery_cameras=library(gallery_cameras),
        max_rank=4,
    )
    np.testing.assert_array_equal(library.back(found.valid), [True, False, True])
    np.testing.assert_array_equal(library.back(found.cmc), [0.5, 1, 1, 1])
    np.testing.assert_allclose(library.back(found.ap), [(1 / 2 + 2 / 4) / 2, 0, 1])
    assert found.mAP == 0.75
    assert found.mINP == (2 / 4 + 1) / 2


@pytest.mark.parametrize("queries, size, dim, persons, grid", [
    (1, 1, 1, 1, None),
    (7, 300, 8, 40, 3),  # few matches, ties
    (5, 600, 2, 3, 2),  # many matches, and almost everything ties
    (4, 1500, 4, 2, 3),  # more than shared memory holds
    (9, 40, 64, 30, None),  # queries without a match
    (2, 2500, 16, 700, None),
])  # fmt: skip
def test_matches_reference(library, small_blocks, queries, size, dim, persons, grid):
    q, g, ids = problem(queries, size, dim, persons=persons, grid=grid)
    for max_rank in (1, 50, size + 5):
        check(library, q, g, ids, max_rank=max_rank)
    check(library, None, None, ids, distance=-(q @ g.T))


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize("persons", [1, 20])
def test_all_scores_tie(library, value, persons):
    _, _, ids = problem(4, 700, persons=persons)
    check(library, None, None, ids, distance=np.full((4, 700), value, np.float32))


@pytest.mark.parametrize("persons", [2, 20])
def test_zeros_tie_and_nan_comes_last(library, persons):
    rng = np.random.default_rng(0)
    _, _, ids = problem(6, 400, persons=persons)
    values = np.array([-1, -0.0, 0, 1, np.inf, -np.inf, np.nan], np.float32)
    distance = rng.choice(values, (6, 400))
    # NaN is behind everything finite, and equal to infinity: rows decide.
    last = np.where(np.isnan(distance), np.float32(np.inf), distance)
    arrays = {name: library(values) for name, values in ids.items()}
    found = ops.evaluate_ranking(None, None, distance=library(distance), **arrays)
    expected = check(library, None, None, ids, distance=last)
    np.testing.assert_array_equal(library.back(found.ap), library.back(expected.ap))


def test_scikit_learn_agrees_without_ties(library):
    q, g, ids = problem(20, 500, 16, persons=12)
    found = check(library, q, g, ids)
    assert library.back(found.valid).sum() > 10
    for i, ap in enumerate(library.back(found.ap)):
        same = ids["gallery_ids"] == ids["query_ids"][i]
        kept = (ids["gallery_ids"] >= 0) & ~(
            same & (ids["gallery_cameras"] == ids["query_cameras"][i])
        )
        if library.back(found.valid)[i]:
            assert ap == pytest.approx(
                average_precision_score(same[kept], (g @ q[i])[kept]), abs=1e-6
            )


def test_scikit_learn_groups_ties():
    """Two rows tie, the match above: here it is first; there, both have the precision after both."""
    ids = {"query_ids": np.array([1]), "query_cameras": np.array([0])}
    ids |= {"gallery_ids": np.array([1, 2]), "gallery_cameras": np.array([1, 1])}
    found = ops.evaluate_ranking(None, None, distance=np.zeros((1, 2), "f"), **ids)
    assert found.mAP == 1
    assert average_precision_score([1, 0], [0, 0]) == 0.5


def test_no_query_has_a_match(library):
    q, g, ids = problem(5, 60, persons=4)
    other = ids | {"query_ids": np.array([-1, 100, 101, -1, -7])}
    one_camera = ids | {
        "query_cameras": ids["query_cameras"] * 0,
        "gallery_cameras": np.zeros(60, int),
    }
    for some in (other, one_camera):
        found = check(library, q, g, some)
        assert np.isnan(library.back(found.cmc)).all()
        assert np.isnan([found.mAP, found.mINP]).all()
        assert not library.back(found.ap).any()


@pytest.mark.parametrize("queries, size", [(0, 20), (5, 0), (0, 0)])
def test_nothing_there(library, queries, size):
    q, g, ids = problem(queries, size)
    assert np.isnan(check(library, q, g, ids, max_rank=3).mAP)
    check(library, None, None, ids, distance=np.zeros((queries, size), "f"))


def test_junk_does_not_count(library):
    q, g, ids = problem(6, 200, grid=3)
    kept = ids["gallery_ids"] >= 0
    assert not kept.all()
    without = {n: v[kept] if n.startswith("gallery") else v for n, v in ids.items()}
    found, expected = check(library, q, g, ids), check(library, q, g[kept], without)
    np.testing.assert_array_equal(library.back(found.ap), library.back(expected.ap))


def test_half_precision(library, small_blocks):
    q, g, ids = problem(7, 400, 16, grid=4)
    for dtype in library.half_precisions:
        check(library, q, g, ids, dtype=dtype)


def test_32_bit_ids(library):
    q, g, ids = problem(7, 400, 16, grid=4)
    check(library, q, g, {name: values.astype(np.int32) for name, values in ids.items()})
    ids["gallery_ids"] = ids["gallery_ids"].astype(np.int32)
    check(library, q, g, ids)


def test_large_ids(library):
    q, g, ids = problem(7, 400, 16, grid=4)
    for name in ("query_ids", "gallery_ids"):
        ids[name] = np.where(ids[name] < 0, -1, ids[name] + 2**40)
    assert check(library, q, g, ids).mAP > 0


def test_distance_is_what_ranks(library):
    q, g, ids = problem(7, 400, grid=3)
    arrays = {name: library(values) for name, values in ids.items()}
    by_features = ops.evaluate_ranking(library(q), library(g), **arrays)
    distance = library(-(q @ g.T))
    for features in ((None, None), (library(q), library(g * 0))):
        by_distance = ops.evaluate_ranking(*features, **arrays, distance=distance)
        for one, other in zip(by_features, by_distance, strict=True):
            np.testing.assert_array_equal(
                *(library.back(x) if hasattr(x, "shape") else x for x in (one, other))
            )


@given(
    queries=st.integers(1, 5),
    size=st.integers(1, 90),
    persons=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_permuting_the_gallery_changes_nothing(queries, size, persons, seed):
    _, _, ids = problem(queries, size, persons=persons, seed=seed)
    rng = np.random.default_rng(seed)
    distance = rng.permuted(np.tile(np.arange(size, dtype=np.float32), (queries, 1)), axis=1)
    order = rng.permutation(size)
    permuted = {n: v[order] if n.startswith("gallery") else v for n, v in ids.items()}
    found = ops.evaluate_ranking(None, None, distance=distance, **ids)
    again = ops.evaluate_ranking(
        None, None, distance=np.ascontiguousarray(distance[:, order]), **permuted
    )
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_any_number_of_threads():
    q, g, ids = problem(150, 3000, 32, persons=40)
    before, results = pyreid.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            pyreid.set_num_threads(threads)
            results.append(ops.evaluate_ranking(q, g, **ids))
    finally:
        pyreid.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(results[0], found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_two_floors_agree(emulator):
    from pyreid import _native

    q, g, ids = problem(8, 900, 32, persons=3, grid=4)
    kernel = ops.evaluate_ranking(q, g, **ids)
    before, _native._emulator = _native._emulator, None
    host = ops.evaluate_ranking(q, g, **ids)
    _native._emulator = before
    for name in ("cmc", "valid"):
        np.testing.assert_array_equal(getattr(kernel, name), getattr(host, name))
    np.testing.assert_allclose(kernel.ap, host.ap, rtol=2e-7)


def test_features_that_require_grad():
    q, g, ids = problem(5, 80)
    ids = {name: torch.tensor(values) for name, values in ids.items()}
    found = ops.evaluate_ranking(torch.tensor(q).requires_grad_(), torch.tensor(g), **ids)
    assert not found.cmc.requires_grad
    assert not found.ap.requires_grad


def test_wrong_arguments(library):
    q, g, ids = problem(4, 10)
    given = {name: library(values) for name, values in ids.items()}
    given |= {"queries": library(q), "gallery": library(g)}

    def f32(*shape):
        return library(np.zeros(shape, np.float32))

    def zeros(size):
        return library(np.zeros(size, np.int64))

    alone = {"queries": None, "gallery": None}
    cases = [
        ({"gallery_ids": zeros(9)}, "gallery_ids must have shape (10,), got (9,)"),
        ({"query_ids": zeros(5)}, "query_ids must have shape (4,), got (5,)"),
        ({"query_cameras": zeros(1)}, "query_cameras must have shape (4,), got (1,)"),
        ({"gallery_cameras": f32(10)}, "gallery_cameras must be int64 or int32, got float32"),
        ({"queries": f32(4, 7)}, "queries must have shape (any, 8), got (4, 7)"),
        ({"gallery": f32(10)}, "gallery must have shape (any, any), got (10,)"),
        (
            {"gallery": library(np.zeros((10, 8)))},
            "gallery must be float32, float16 or bfloat16, got float64",
        ),
        ({"queries": None}, "queries must be given where distance is not, got None"),
        ({"gallery": None}, "gallery must be given where distance is not, got None"),
        (alone, "queries must be given where distance is not, got None"),
        (alone | {"distance": f32(4)}, "distance must have shape (any, any), got (4,)"),
        (alone | {"distance": f32(3, 10)}, "query_ids must have shape (3,), got (4,)"),
        (alone | {"distance": f32(4, 9)}, "gallery_ids must have shape (9,), got (10,)"),
        (
            alone | {"distance": library(np.zeros((4, 10)))},
            "distance must be float32, got float64",
        ),
        (
            alone | {"distance": f32(4, 20)[:, ::2]},
            "distance must be C-contiguous, got a strided view of shape (4, 10)",
        ),
        ({"max_rank": 0}, "max_rank must be a count of at least 1, got 0"),
        ({"max_rank": 2.5}, "max_rank must be a count of at least 1, got 2.5"),
    ]  # fmt: skip
    for changes, message in cases:
        with pytest.raises(ValueError) as error:
            ops.evaluate_ranking(**(given | changes))
        assert str(error.value) == f"evaluate_ranking: {message}"
