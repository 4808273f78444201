"""The half-precision filter of knn: whatever it leaves to be compared, the result keeps every bit."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyreid
from pyreid import _build, _native, ops

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
    module.knn(features, None, k, scores, rows, None, 0)
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
