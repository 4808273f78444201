import importlib
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyreid
from pyreid import _native, ops, reference
from pyreid.ops import _panels

room = importlib.import_module("pyreid.ops.joint_distance")  # the op has its name
SMALL = {"bin": 10, "bins": 40, "sigma": 2.0}


def sightings(size, *, cameras=3, ids=None, dim=12, span=300, seed=0):
    """Features, labels with some -1, cameras and frames, some of them not known."""
    rng = np.random.default_rng(seed)
    ids = ids or max(size // 6, 1)
    features = rng.standard_normal((size, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True) if size else 1
    labels = rng.integers(-1, ids, size)
    frames = rng.integers(0, span, size)
    frames[rng.random(size) < 0.1] = -1
    return features, labels, rng.integers(0, cameras, size), frames


@pytest.fixture
def small_panels(monkeypatch):
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)
    monkeypatch.setattr(_panels, "_CUDA_SCORES", 1)
    monkeypatch.setattr(room, "_QUERIES", 100)


# --- the histogram --------------------------------------------------------------------------------


@pytest.mark.parametrize("size, cameras", [(0, 1), (1, 1), (2, 2), (120, 3), (260, 7)])
@pytest.mark.parametrize(
    "options", [SMALL, {**SMALL, "sigma": 0.0}, {**SMALL, "bins": 7, "cut": 9}]
)
def test_histogram_matches_reference(library, size, cameras, options):
    _, labels, seen_by, frames = sightings(size, cameras=cameras)
    arrays = labels, seen_by, frames
    found = library.back(ops.time_histogram(*map(library, arrays), **options))
    expected = reference.time_histogram(*arrays, **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    again = library.back(ops.time_histogram(*map(library, arrays), **options))
    np.testing.assert_array_equal(found, again)
    sums = found.sum(axis=2)
    assert ((abs(sums - 1) < 1e-5) | (sums == 0)).all()


def test_histogram_of_a_few_by_hand(library):
    """Two people go from camera 0 to camera 1 in 30 frames, one comes back in 55; one stays."""
    rows = [  # label, camera, frame
        (0, 0, 10), (0, 0, 20), (0, 1, 45),
        (7, 0, 100), (7, 1, 130),
        (3, 1, 200), (3, 0, 255),
        (5, 2, 40), (5, 2, 45), (5, 2, 61),
        (-1, 0, 5), (9, 0, -1), (9, 1, 30),
    ]  # fmt: skip
    arrays = [library(np.array(column)) for column in zip(*rows, strict=True)]
    found = library.back(ops.time_histogram(*arrays, bin=10, bins=9, sigma=0))
    expected = np.zeros((3, 3, 9))
    expected[1, 0, 3] = 1
    expected[0, 1, 5] = 1
    # Of cluster 0: two images at 0 and 10 from its first, each counted twice; clusters 7 and 3: one at 0.
    expected[0, 0, :2] = np.array([2 + 1 + 1, 2]) / 6
    expected[1, 1, 0] = 1
    expected[2, 2, [0, 2]] = np.array([6, 3]) / 9
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cameras_that_nobody_was_seen_in(library):
    _, *arrays = sightings(60, cameras=2)
    found = library.back(ops.time_histogram(*map(library, arrays), **SMALL, num_cameras=4))
    assert found.shape == (4, 4, 40)
    assert not found[2:].any()
    assert not found[:, 2:].any()
    few = library.back(ops.time_histogram(*map(library, arrays), **SMALL))
    np.testing.assert_array_equal(found[:2, :2], few)


def test_labels_of_any_values_and_width(library):
    _, labels, cameras, frames = sightings(90)
    expected = library.back(ops.time_histogram(*map(library, (labels, cameras, frames)), **SMALL))
    others = np.where(labels < 0, -(10**15), labels * 10**12 + 5)
    found = ops.time_histogram(library(others), library(cameras), library(frames), **SMALL)
    np.testing.assert_array_equal(library.back(found), expected)
    narrow = (library(array.astype(np.int32)) for array in (labels, cameras, frames))
    np.testing.assert_array_equal(library.back(ops.time_histogram(*narrow, **SMALL)), expected)


def test_released_size():
    _, *arrays = sightings(2000, cameras=6, ids=300, span=200_000)
    found = ops.time_histogram(*arrays)
    assert found.shape == (6, 6, 3000)
    np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-4)
    assert (found[1, 0, :300] > 0).all()


# --- the distance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size, queries", [
    (0, None), (1, None), (50, None), (300, None), (0, 3), (40, 0), (300, 7), (1030, 120)
])  # fmt: skip
def test_distance_matches_reference(library, small_panels, size, queries):
    if library.floor == "emulated" and size > 300:
        pytest.skip("slow in the emulator")
    features, labels, cameras, frames = sightings(size)
    histogram = reference.time_histogram(labels, cameras, frames, **SMALL, num_cameras=3)
    arrays = features, cameras, frames, histogram
    options = {"bin": 10, "gamma": 4.0, "lambdas": (0.8, 1.7)}
    beside = {}
    if queries is not None:
        q, _, where, when = sightings(queries, seed=1)
        beside = {"queries": q, "query_cameras": where, "query_frames": when}
    given = {name: library(array) for name, array in beside.items()}
    found = library.back(ops.joint_distance(*map(library, arrays), **options, **given))
    expected = reference.joint_distance(*arrays, **options, **beside)
    assert found.dtype == np.float32
    assert found.shape == (size if queries is None else queries, size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_half_precision(library):
    features, labels, cameras, frames = sightings(40)
    histogram = library(reference.time_histogram(labels, cameras, frames, **SMALL))
    beside = (library(cameras), library(frames), histogram)
    for dtype in library.half_precisions:
        rows = library(features, dtype)
        wide = library(library.back(rows).astype(np.float32))
        np.testing.assert_allclose(
            library.back(ops.joint_distance(rows, *beside, bin=10)),
            library.back(ops.joint_distance(wide, *beside, bin=10)),
            atol=1e-6,
        )


def test_what_is_not_known_is_as_if_nobody_took_so_long(library):
    features, _, cameras, frames = sightings(30)
    frames[:] = 7
    frames[4], frames[9] = -1, 10**9
    histogram = np.full((3, 3, 5), 0.2, np.float32)
    found = ops.joint_distance(*map(library, (features, cameras, frames, histogram)), bin=100)
    none = ops.joint_distance(*map(library, (features, cameras, frames, 0 * histogram)), bin=100)
    found, none = library.back(found), library.back(none)
    same = np.isclose(found, none)
    known = np.ones(30, bool)
    known[[4, 9]] = False
    assert not same[np.ix_(known, known)].any()
    assert same[4].all()
    assert same[:, 4].all()
    assert same[9, known].all()
    assert not same[9, 9]  # two images of one moment
    assert (found <= none).all()


def test_products_beyond_what_powers_hold(library):
    features = np.array([[100.0], [-100.0], [0.1]], np.float32)
    ids = np.zeros(3, np.int64)
    histogram = np.zeros((1, 1, 1), np.float32)
    found = library.back(ops.joint_distance(*map(library, (features, ids, ids, histogram))))
    expected = 1 - np.array([[1, 0], [0, 1]]) / 3
    np.testing.assert_allclose(found[:2, :2], expected, atol=1e-6)


@given(size=st.integers(1, 40), cameras=st.integers(1, 5), seed=st.integers(0, 99))
def test_distances_are_symmetric_and_follow_their_rows(size, cameras, seed):
    features, labels, seen_by, frames = sightings(size, cameras=cameras, span=40, seed=seed)
    histogram = ops.time_histogram(labels, seen_by, frames, **SMALL)
    found = ops.joint_distance(features, seen_by, frames, histogram, bin=10)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    order = np.random.default_rng(seed).permutation(size)
    moved = (np.ascontiguousarray(x[order]) for x in (features, seen_by, frames))
    permuted = ops.joint_distance(*moved, histogram, bin=10)
    np.testing.assert_allclose(permuted, found[np.ix_(order, order)], atol=1e-6)
    moved = (np.ascontiguousarray(x[order]) for x in (labels, seen_by, frames))
    np.testing.assert_array_equal(ops.time_histogram(*moved, **SMALL), histogram)


# --- promises, arguments --------------------------------------------------------------------------


def test_same_bits_for_every_number_of_threads():
    features, *arrays = sightings(1500, cameras=4)
    threads, found = pyreid.get_num_threads(), []
    for count in (1, 2, 5):
        pyreid.set_num_threads(count)
        histogram = ops.time_histogram(*arrays, **SMALL)
        found.append((histogram, ops.joint_distance(features, *arrays[1:], histogram, bin=10)))
    pyreid.set_num_threads(threads)
    for histogram, distances in found[1:]:
        np.testing.assert_array_equal(histogram, found[0][0])
        np.testing.assert_array_equal(distances, found[0][1])


def test_same_bits_in_every_schedule():
    if not importlib.util.find_spec("pyreid._emulated"):
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    features, *arrays = sightings(300)
    found = []
    for schedule in _native.SCHEDULES:
        with _native.emulated(schedule, seed=3):
            histogram = ops.time_histogram(*arrays, **SMALL)
            found.append((histogram, ops.joint_distance(features, *arrays[1:], histogram, bin=10)))
    for histogram, distances in found[1:]:
        np.testing.assert_array_equal(histogram, found[0][0])
        np.testing.assert_array_equal(distances, found[0][1])


def test_wrong_arguments(library):
    features, labels, cameras, frames = map(library, sightings(20))
    short = library(np.zeros(19, np.int64))
    histogram = library(np.zeros((3, 3, 5), np.float32))
    uneven = library(np.zeros((3, 2, 5), np.float32))
    times = [
        ({"labels": features}, "labels must be int64 or int32, got float32"),
        ({"cameras": short}, "cameras must have shape (20,), got (19,)"),
        ({"frames": short}, "frames must have shape (20,), got (19,)"),
        ({"bin": 0}, "bin must be at least 1 and less than 2**31, got 0"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"sigma": -1.0}, "sigma must be at least 0, got -1.000000"),
        ({"cut": -1.0}, "cut must be at least 0, got -1.000000"),
        ({"num_cameras": -1}, "num_cameras must not be negative, got -1"),
    ]
    for changes, message in times:
        with pytest.raises(ValueError) as error:
            ops.time_histogram(
                **({"labels": labels, "cameras": cameras, "frames": frames} | changes)
            )
        assert str(error.value) == f"time_histogram: {message}"
    whole = {"features": features, "cameras": cameras, "frames": frames, "histogram": histogram}
    distances = [
        ({"features": labels}, "features must be float32, float16 or bfloat16, got int64"),
        ({"cameras": short}, "cameras must have shape (20,), got (19,)"),
        ({"histogram": uneven}, "histogram must be as long as it is wide, got 3 x 2"),
        ({"queries": features}, "query_cameras must be given with the other two, got None"),
        ({"query_frames": frames}, "queries must be given with the other two, got None"),
        ({"bin": 0}, "bin must be at least 1 and less than 2**31, got 0"),
        ({"gamma": float("nan")}, "gamma must be finite, got nan"),
        ({"lambdas": (1.0, -2.0)}, "lambdas must be at least 0, got -2.000000"),
    ]  # fmt: skip
    for changes, message in distances:
        with pytest.raises(ValueError) as error:
            ops.joint_distance(**(whole | changes))
        assert str(error.value) == f"joint_distance: {message}"


def test_cameras_out_of_range(library):
    features, labels, cameras, frames = sightings(20)
    cameras[3] = 5
    histogram = np.zeros((3, 3, 5), np.float32)
    calls = {
        "time_histogram": lambda: ops.time_histogram(
            *map(library, (labels, cameras, frames)), num_cameras=3
        ),
        "joint_distance": lambda: ops.joint_distance(
            *map(library, (features, cameras, frames, histogram))
        ),
    }
    for op, call in calls.items():
        with pyreid.debug(), pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"{op}: cameras must lie in [0, 3), got 5"
        if library.floor != "cpu":
            assert np.isfinite(library.back(call())).all()


def test_torch(torch_library):
    features, labels, cameras, frames = map(torch_library, sightings(40))
    histogram = ops.time_histogram(labels, cameras, frames, **SMALL)
    q, _, where, when = map(torch_library, sightings(9, seed=1))
    rest = (10, 5.0, 1.0, 2.0)
    op = torch.ops.pyreid.joint_distance.default
    for beside in ((None, None, None), (q, where, when)):
        torch.library.opcheck(op, (features, cameras, frames, histogram, *rest, *beside))

    def distance(x):
        return ops.joint_distance(x * 2, cameras, frames, histogram, bin=10) + 1

    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), distance(features))
    assert not distance(features.requires_grad_() * 1).requires_grad
