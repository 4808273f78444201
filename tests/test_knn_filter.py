"""The half-precision filters of knn: whatever they leave to be compared, the result keeps every bit."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyreid
from pyreid import _build, _native, ops
from pyreid.ops import _panels
from pyreid.ops import jaccard as jaccard_room
from pyreid.ops._work import Work

NEVER, WHERE_IT_PAYS, ALWAYS = 0, 1, 2


def usable_variants():
    level = importlib.import_module("pyreid._cpu").get("instruction_level")
    return [name for name in _build.CPU_VARIANTS if int(name.partition("_v")[2] or 0) <= level]


@pytest.fixture(params=usable_variants())
def variant(request):
    module = importlib.import_module(f"pyreid.{request.param}")
    yield module
    module.set("knn_filter", WHERE_IT_PAYS)


def search(module, features, k, mode):
    """Scores, rows, and how many rows the filter has served, and has had to compare with all others."""
    size = len(features)
    scores = np.full((size, k), np.nan, np.float32)
    rows = np.full((size, k), -9)
    module.set("knn_filter", mode)
    module.knn(features, None, k, scores, rows, None, None, 0)
    return scores, rows, (module.get("knn_filtered"), module.get("knn_repeated"))


def agree(module, features, k):
    """Checks that the filter changes nothing; returns how many rows it served, and repeated."""
    scores, rows, counts = search(module, features, k, NEVER)
    assert counts == (0, 0)
    found, found_rows, counts = search(module, features, k, ALWAYS)
    np.testing.assert_array_equal(found_rows, rows)
    np.testing.assert_array_equal(found.view(np.int32), scores.view(np.int32))
    assert sum(counts) == len(features)
    return counts


def normal(size, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((size, dim)).astype(np.float32)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def gathered(size, dim, noise, centres=40, seed=0):
    """Unit rows around centres: the smaller the noise, the more of them are alike."""
    rows = normal(centres, dim, seed)[np.arange(size) % centres]
    return unit(rows + noise * normal(size, dim, seed + 1))


@pytest.mark.parametrize("size, dim, k", [
    (1, 1, 1),
    (7, 3, 9),  # k > N
    (50, 1, 4),
    (300, 17, 300),
    (900, 1030, 6),  # more columns than are packed at a time
    (1700, 33, 30),
])  # fmt: skip
def test_unit_rows(variant, size, dim, k):
    assert agree(variant, unit(normal(size, dim)), k)[1] <= size * (dim < 3)


@pytest.mark.parametrize("noise", [0.7, 0.1])
def test_rows_around_centres(variant, noise):
    assert agree(variant, gathered(1500, 64, noise), 20) == (1500, 0)


def test_rows_closer_than_sixteen_bits_tell(variant):
    """Nearest by less than the filter sees: what it keeps decides, and it must keep them all."""
    rows = gathered(1600, 96, 1e-4, centres=80)  # 20 rows each, at 1e-8 from one another
    assert agree(variant, rows, 8) == (1600, 0)


def test_more_near_rows_than_are_kept(variant):
    crowd = gathered(400, 96, 1e-4, centres=1)
    rows = np.concatenate([unit(normal(3400, 96, seed=5)), crowd])
    np.random.default_rng(1).shuffle(rows)
    served, repeated = agree(variant, rows, 8)
    assert served > 3300
    assert repeated >= 400


def test_nothing_but_near_rows(variant):
    assert agree(variant, gathered(1500, 32, 1e-4, centres=2), 8) == (0, 1500)


def test_equal_rows_and_ties(variant):
    rows = np.random.default_rng(0).integers(0, 3, (900, 5)).astype(np.float32) / 2
    agree(variant, rows, 9)
    twice = np.tile(unit(normal(500, 40)), (3, 1))
    assert agree(variant, twice, 7) == (1500, 0)
    found = search(variant, twice, 2, ALWAYS)[1]
    np.testing.assert_array_equal(found[:, 0], np.arange(1500) % 500)
    np.testing.assert_array_equal(found[:, 1], np.arange(1500) % 500 + 500)


@pytest.mark.parametrize("spread", [2.0, 1e3, 1e12])
def test_rows_of_different_lengths(variant, spread):
    length = spread ** np.random.default_rng(2).uniform(-1, 1, (700, 1))
    served, _ = agree(variant, (normal(700, 24) * length).astype(np.float32), 6)
    assert (served > 0) == (spread < 10)


def test_one_row_that_dwarfs_the_others(variant):
    rows = unit(normal(600, 24))
    rows[77] *= 1e6
    assert agree(variant, rows, 6) == (0, 600)


def test_rows_with_one_large_value(variant):
    rows = 1e-3 * normal(700, 300)
    rows[np.arange(700), np.arange(700) % 300] = 1
    agree(variant, rows, 6)


def test_rows_of_zeros(variant):
    rows = unit(normal(800, 12))
    rows[::9] = 0
    rows[5] = -0.0
    agree(variant, rows, 6)
    assert agree(variant, np.zeros((100, 12), np.float32), 6) == (0, 100)
    assert agree(variant, np.zeros((0, 12), np.float32), 6) == (0, 0)


@pytest.mark.parametrize("scale", [1e-40, 1e-22, 1e-7, 1e7, 1e18])
def test_rows_of_any_scale(variant, scale):
    with np.errstate(under="ignore"):
        rows = (normal(500, 16) * scale).astype(np.float32)
    counts = agree(variant, rows, 6)
    assert counts == ((500, 0) if 1e-8 < scale < 1e8 else (0, 500))


def test_unit_rows_with_denormal_values(variant):
    rows = unit(normal(500, 16))
    rows[:, ::3] = 1e-41
    agree(variant, rows, 6)


def test_half_precision_rows():
    module = _native.cpu()
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(gathered(1200, 70, 0.4)).to(dtype)
        found = []
        for mode in (NEVER, ALWAYS):
            module.set("knn_filter", mode)
            found.append(ops.knn(x, 12))
            assert module.get("knn_filtered") == (1200 if mode == ALWAYS else 0)
        module.set("knn_filter", WHERE_IT_PAYS)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
        wide = ops.knn(x.float(), 12)
        torch.testing.assert_close(found[0], wide, rtol=0, atol=0)


def test_same_bits_for_every_number_of_threads(variant):
    rows = np.concatenate([gathered(300, 48, 1e-4, centres=1, seed=9), gathered(2900, 48, 0.5)])
    threads, found = pyreid.get_num_threads(), []
    expected = search(variant, rows, 10, NEVER)
    for count in (1, 2, 8, 8):
        variant.set("threads", count)
        found.append(search(variant, rows, 10, ALWAYS))
    variant.set("threads", threads)
    for scores, near, counts in found:
        np.testing.assert_array_equal(scores, expected[0])
        np.testing.assert_array_equal(near, expected[1])
        assert counts[0] > 2000
        assert counts[1] >= 300


@given(
    size=st.integers(1, 400),
    dim=st.integers(1, 70),
    k=st.integers(1, 12),
    noise=st.sampled_from([1.0, 1e-2, 1e-4, 1e-6, 0.0]),
    spread=st.sampled_from([1.0, 3.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_the_filter_changes_nothing(size, dim, k, noise, spread, seed):
    rows = gathered(size, dim, noise, centres=5, seed=seed)
    rows *= spread ** np.random.default_rng(seed).uniform(0, 1, (size, 1)).astype(np.float32)
    module = _native.cpu()
    agree(module, rows, k)
    module.set("knn_filter", WHERE_IT_PAYS)


def test_modes():
    module = _native.cpu()
    assert module.get("knn_filter") == WHERE_IT_PAYS
    ops.knn(unit(normal(500, 16)), 4)
    assert (module.get("knn_filtered"), module.get("knn_repeated")) == (0, 0)
    for name in ("knn_filtered", "knn_repeated"):
        with pytest.raises(KeyError, match="read-only"):
            module.set(name, 1)


# --- in panels: the CUDA floor ----------------------------------------------------------------------


@pytest.fixture
def small_panels(monkeypatch):
    if not importlib.util.find_spec("pyreid._emulated"):
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)  # panels of 256 rows
    monkeypatch.setattr(jaccard_room, "_QUERIES", 130)
    monkeypatch.setattr(jaccard_room, "_SPARE", 40)


@pytest.fixture(params=_native.SCHEDULES)
def schedule(request, small_panels):
    with _native.emulated(request.param, seed=2):
        yield request.param


def dots(queries, rows):
    """Float32 products as a warp adds them up: 32 sums, then of these by halves."""
    steps = -(-rows.shape[1] // 32)
    q, r = (np.pad(x, ((0, 0), (0, 32 * steps - x.shape[1]))) for x in (queries, rows))
    sums = np.zeros((len(q), len(r), 32), np.float32)
    for step in range(steps):
        lanes = slice(32 * step, 32 * step + 32)
        sums += q[:, None, lanes] * r[None, :, lanes]
    for half in (16, 8, 4, 2, 1):
        sums = sums + sums[..., np.arange(32) ^ half]
    return sums[..., 0]


def search_by_halves(rows, k, queries=None, dtype=None):
    """Checks every bit; returns how many queries had to be compared with all rows."""
    x = rows if dtype is None else torch.from_numpy(rows).to(dtype)
    wide = rows if dtype is None else x.float().numpy()
    q = x if queries is None else queries
    scores = _native.empty(x, (len(q), k), "float32")
    near = _native.empty(x, (len(q), k), "int64")
    failed = jaccard_room._search_by_halves(x, q, range(len(q)), k, scores, near, Work(len(x)))
    products = dots(wide if queries is None else queries, wide) + np.float32(0)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(products, order, 1)
    np.testing.assert_array_equal(np.asarray(near)[:, : order.shape[1]], order)
    np.testing.assert_array_equal(np.asarray(scores)[:, : order.shape[1]], expected)
    assert (np.asarray(near)[:, order.shape[1] :] == -1).all()
    assert (np.asarray(scores)[:, order.shape[1] :] == -np.inf).all()
    return int(np.asarray(failed).sum())


def test_panels_of_unit_rows(schedule):
    rows = unit(normal(270, 35))  # two panels
    assert search_by_halves(rows[:140], 6, queries=rows * np.float32(7)) == 0
    assert search_by_halves(rows, 6, queries=rows[:20]) == 0
    assert search_by_halves(rows[:140], 6) == 0


def test_panels_of_rows_closer_than_half_precision_tells(schedule):
    assert search_by_halves(gathered(200, 40, 1e-4, centres=10), 8) == 0


def test_panels_with_more_near_rows_than_are_listed(schedule):
    crowd = gathered(70, 40, 1e-4, centres=1)
    rows = np.concatenate([unit(normal(150, 40, seed=5)), crowd])
    np.random.default_rng(1).shuffle(rows)
    assert 70 <= search_by_halves(rows, 5) < 110


def test_panels_of_fewer_rows_than_are_listed(schedule):
    assert search_by_halves(unit(normal(30, 20)), 6) == 0
    assert search_by_halves(unit(normal(5, 3)), 9) == 0  # k > N


def test_panels_of_ties_and_zeros(schedule):
    rows = np.random.default_rng(0).integers(0, 3, (120, 5)).astype(np.float32) / 2
    rows[7:20] = 0
    search_by_halves(rows, 9)
    assert search_by_halves(np.zeros((70, 4), np.float32), 3) == 70


@pytest.mark.parametrize("scale", [1e-40, 1e-7, 1e7, 1e18])
def test_panels_of_any_scale(schedule, scale):
    with np.errstate(under="ignore", over="ignore"):
        rows = (unit(normal(80, 33)) * scale).astype(np.float32)
        assert search_by_halves(rows, 4) == (0 if 1e-8 < scale < 1e8 else 80)


def test_panels_of_rows_of_different_lengths(schedule):
    length = np.float32(1e3) ** np.random.default_rng(2).uniform(-1, 1, (90, 1))
    assert search_by_halves((normal(90, 24) * length).astype(np.float32), 6) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_panels_of_half_precision_rows(schedule, dtype):
    assert search_by_halves(gathered(120, 40, 0.5), 5, dtype=dtype) == 0


def test_rows_that_are_not_finite(schedule):
    """No error on this floor: a product that is NaN does not qualify."""
    rows = unit(normal(100, 20))
    rows[3, 4] = np.nan
    scores, near = np.empty((100, 6), np.float32), np.empty((100, 6), np.int64)
    with np.errstate(invalid="ignore"):
        failed = jaccard_room._search_by_halves(
            rows, rows, range(len(rows)), 6, scores, near, Work(len(rows))
        )
    assert failed.all()
    assert (near[3] == -1).all()
    others = np.delete(np.arange(100), 3)
    products = dots(rows[others], rows[others])
    expected = others[np.argsort(-products, axis=1, kind="stable")[:, :6]]
    np.testing.assert_array_equal(near[others], expected)


def test_where_panels_are_filtered(emulator, small_panels, monkeypatch):
    searches = []
    by_halves = jaccard_room._search_by_halves
    monkeypatch.setattr(
        jaccard_room, "_search_by_halves", lambda *given: searches.append(1) or by_halves(*given)
    )
    rows = unit(normal(200, 20))
    plain = ops.knn(rows, 4)
    assert searches == []
    for name, least in (("_FILTER_ROWS", 200), ("_FILTER_COLUMNS", 20), ("_FILTER_QUERIES", 100)):
        monkeypatch.setattr(jaccard_room, name, least)
    filtered = ops.knn(rows, 4)
    assert searches == [1]
    np.testing.assert_array_equal(filtered.rows, plain.rows)
    np.testing.assert_allclose(filtered.scores, plain.scores, rtol=1e-5, atol=1e-6)
    ops.knn(rows, 4, precision="fast")
    ops.knn(rows, 7)  # more than a list of 200 rows is worth
    ops.knn(rows, 4, queries=rows[:50])
    ops.jaccard_graph(rows, 4, 2, variant="zhong")  # by distance
    assert searches == [1]
    ops.knn(rows, 4, queries=rows[:100])
    ops.jaccard_graph(rows, 4, 2)
    assert searches == [1, 1, 1]
