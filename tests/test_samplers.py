"""Which images make a batch: what ICE, SpCL and Cluster Contrast promise of theirs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreid.data import camera_spread, multiple_gallery, shuffled

SAMPLERS = [camera_spread, multiple_gallery]


def rng(seed=0):
    return np.random.default_rng(seed)


def take(batches, count):
    return list(itertools.islice(batches, count))


@st.composite
def problems(draw):
    """Labels with outliers and gaps, cameras, and a batch that they suffice for."""
    count = draw(st.integers(1, 40))
    labels = np.array(draw(st.lists(st.integers(-1, 8), min_size=count, max_size=count)))
    labels[draw(st.integers(0, count - 1))] = 3
    cameras = np.array(draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    clusters = len(np.unique(labels[labels >= 0]))
    instances = draw(st.integers(1, 5))
    per_batch = draw(st.integers(1, clusters))
    return labels, cameras, per_batch * instances, instances, draw(st.integers(0, 99))


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(problem=problems())
def test_batches_are_of_distinct_clusters(sampler, problem):
    labels, cameras, batch_size, instances, seed = problem
    clusters = len(np.unique(labels[labels >= 0]))
    per_pass = clusters // (batch_size // instances)
    batches = take(
        sampler(labels, cameras, batch_size=batch_size, instances=instances, rng=rng(seed)),
        2 * per_pass,
    )
    seen = []
    for batch in batches:
        assert (batch.dtype, batch.shape) == (np.int64, (batch_size,))
        of_cluster = labels[batch].reshape(-1, instances)
        assert (of_cluster >= 0).all()
        assert (of_cluster == of_cluster[:, :1]).all()
        assert len(np.unique(of_cluster)) == batch_size // instances
        seen.append(of_cluster[:, 0])
    for one_pass in (seen[:per_pass], seen[per_pass:]):
        assert len(np.unique(one_pass)) == np.size(one_pass)  # each cluster at most once
    again = sampler(labels, cameras, batch_size=batch_size, instances=instances, rng=rng(seed))
    assert np.array_equal(take(again, 2 * per_pass), batches)


@given(problem=problems())
def test_camera_spread(problem):
    labels, cameras, batch_size, instances, seed = problem
    sampler = camera_spread(
        labels, cameras, batch_size=batch_size, instances=instances, rng=rng(seed)
    )
    for batch in take(sampler, 3):
        for drawn in batch.reshape(-1, instances):
            rows = np.flatnonzero(labels == labels[drawn[0]])
            there = len(np.unique(cameras[rows]))
            if len(rows) == there < instances:
                continue  # one image per camera and too few of them: drawn with repetition
            assert len(np.unique(cameras[drawn])) == min(there, instances)
            # Repeated only where there are too few images, and then none that its camera stands for.
            if len(rows) >= instances:
                assert len(np.unique(drawn)) == instances
            else:
                assert len(np.unique(drawn[:there])) == there
                assert not np.isin(drawn[there:], drawn[:there]).any()


@given(problem=problems())
def test_multiple_gallery(problem):
    labels, cameras, batch_size, instances, seed = problem
    sampler = multiple_gallery(
        labels, cameras, batch_size=batch_size, instances=instances, rng=rng(seed)
    )
    for batch in take(sampler, 3):
        for first, *more in batch.reshape(-1, instances):
            rows = np.flatnonzero(labels == labels[first])
            others = rows[cameras[rows] != cameras[first]]
            if not len(others):
                others = rows[rows != first]
            if not len(others):
                others = rows
            assert np.isin(more, others).all()
            if len(others) >= instances:
                assert len(set(more)) == instances - 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_image_of_a_cluster_has_its_turn(sampler):
    labels = np.array([0, 0, 0, 0, 0, 0, -1, 1, 1])
    cameras = np.array([0, 0, 0, 1, 1, 2, 0, 0, 1])
    batches = take(sampler(labels, cameras, batch_size=4, instances=2, rng=rng()), 300)
    counts = np.bincount(np.concatenate(batches), minlength=9)
    assert counts[6] == 0
    assert (np.delete(counts, 6) > 60).all()
    assert counts[:6].sum() == counts[7:].sum() == 600


def test_cameras_are_drawn_evenly():
    """ICE takes one image per camera, however many a camera has."""
    cameras = np.array([0] * 50 + [1])
    batches = take(
        camera_spread(np.zeros(51, int), cameras, batch_size=1, instances=1, rng=rng()), 1000
    )
    assert 430 < np.sum(np.concatenate(batches) == 50) < 570


def test_a_pass_drops_what_does_not_fill_a_batch():
    labels = np.arange(5)
    batches = take(camera_spread(labels, labels, batch_size=2, instances=1, rng=rng()), 400)
    for first in range(0, 400, 2):
        assert len(np.unique(batches[first : first + 2])) == 4
    assert (np.bincount(np.concatenate(batches)) > 120).all()  # not always the same one is dropped


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tensors_and_lists(sampler):
    options = {"batch_size": 4, "instances": 2}
    labels, cameras = [0, 0, 1, 1, -1], [0, 1, 0, 1, 0]
    expected = next(sampler(labels, cameras, **options, rng=rng()))
    tensors = torch.tensor(labels), torch.tensor(cameras)
    assert np.array_equal(next(sampler(*tensors, **options, rng=rng())), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "labels, cameras, batch_size, instances, message",
    [
        (
            [0, 1, 1, -1],
            [0, 0, 0, 0],
            12,
            4,
            "labels must hold at least 3 clusters (batch_size 12, instances 4), got 2",
        ),
        ([], [], 4, 4, "labels must hold at least 1 clusters (batch_size 4, instances 4), got 0"),
        ([0], [0], 6, 4, "batch_size must be a multiple of instances, got 6 and 4"),
        ([0], [0], 0, 4, "batch_size must be a multiple of instances, got 0 and 4"),
        ([0], [0], 4, 0, "batch_size must be a multiple of instances, got 4 and 0"),
        ([0, 1], [0], 2, 1, "labels and cameras must have one shape (N,), got (2,) and (1,)"),
    ],
)
def test_errors_come_at_once(sampler, labels, cameras, batch_size, instances, message):
    with pytest.raises(ValueError) as error:
        sampler(labels, cameras, batch_size=batch_size, instances=instances, rng=rng())
    assert str(error.value) == f"{sampler.__name__}: {message}"


@given(st.integers(1, 30), st.data())
def test_shuffled(count, data):
    batch_size = data.draw(st.integers(1, count))
    rows = np.arange(count) * 3
    per_pass = count // batch_size
    batches = take(shuffled(rows, batch_size=batch_size, rng=rng(count)), 2 * per_pass)
    for one_pass in (batches[:per_pass], batches[per_pass:]):
        drawn = np.concatenate(one_pass)
        assert len(np.unique(drawn)) == per_pass * batch_size
        assert np.isin(drawn, rows).all()
    again = take(shuffled(rows, batch_size=batch_size, rng=rng(count)), 2 * per_pass)
    assert np.array_equal(again, batches)


@pytest.mark.parametrize("batch_size", [0, 4])
def test_shuffled_refuses(batch_size):
    with pytest.raises(ValueError) as error:
        shuffled([0, 1, 2], batch_size=batch_size, rng=rng())
    assert str(error.value) == (
        f"shuffled: batch_size must be at least 1 and at most the 3 rows, got {batch_size}"
    )
