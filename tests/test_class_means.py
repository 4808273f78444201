import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreid import ops, reference

HUGE = 10**12


def problem(size, dim, classes, *, cameras=3, seed=0):
    """Features that are not centred, labels from -1 on, cameras."""
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((size, dim)) + 0.5).astype(np.float32)
    return features, rng.integers(-1, classes, size), rng.integers(0, cameras, size)


def check(library, features, labels, cameras=None, *, normalize=False, dtype=None, atol=2e-6):
    """Op against reference; two runs, equal bits; returns the means as NumPy."""
    inputs = library(features, dtype)
    ids = [None if x is None else library(x) for x in (labels, cameras)]
    expected = reference.class_means(library.back(inputs), labels, cameras, normalize=normalize)
    runs = [ops.class_means(inputs, *ids, normalize=normalize) for _ in range(2)]
    for result in runs:
        assert isinstance(result, ops.Means)
        assert (result.cameras is None) == (cameras is None)
    first, second = ([library.back(x) for x in result if x is not None] for result in runs)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    expected = [x for x in expected if x is not None]
    for ours, theirs in zip(first[1:], expected[1:], strict=True):
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs)
    assert first[0].dtype == np.float32
    np.testing.assert_allclose(first[0], expected[0], rtol=0, atol=atol)
    return first[0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "size, dim, classes",
    [
        (0, 8, 3),  # nothing to do
        (1, 1, 1),
        (50, 1, 7),
        (50, 64, 4),
        (33, 2048, 2),
        (9, 8193, 3),  # a tail beyond the last tile
        (3000, 3, 700),  # ids of more than one byte, more rows than a tile
        (1100, 40, 1),  # one class takes many runs of rows
        (600, 5, 10**9),  # all distinct
        (7, 0, 3),  # no columns
    ],
)
def test_matches_reference(library, size, dim, classes, normalize):
    features, labels, cameras = problem(size, dim, classes)
    check(library, features, labels, normalize=normalize)
    check(library, features, labels, cameras, normalize=normalize)


def test_market_sized():
    features, labels, cameras = problem(12936, 256, 700, cameras=6)
    for ids in ((labels,), (labels, cameras)):
        result = ops.class_means(features, *ids, normalize=True)
        expected = reference.class_means(features, *ids, normalize=True)
        np.testing.assert_allclose(result.means, expected[0], rtol=0, atol=1e-6)


def test_rows_left_out(library):
    features, labels, cameras = problem(40, 16, 3)
    labels[:] = -1
    labels[7] = -HUGE
    for ids in ((labels, None), (labels, cameras)):
        assert check(library, features, *ids, normalize=True).shape == (0, 16)


def test_sparse_and_huge_ids(library):
    features, labels, cameras = problem(300, 20, 9, cameras=4)
    ids = np.array([HUGE + 1, 0, 2**63 - 1, 5, HUGE, 255, 256, 2**32, 2**31])
    labels = np.where(labels < 0, labels * HUGE, ids[labels])
    cameras = np.array([2**63 - 1, -(2**63), -1, 0])[cameras]
    check(library, features, labels)
    check(library, features, labels, cameras)


def test_32_bit_ids(library):
    features, labels, cameras = problem(80, 12, 6)
    check(library, features, labels.astype(np.int32))
    check(library, features, labels.astype(np.int32), cameras)
    check(library, features, labels, cameras.astype(np.int32))


def test_half_precision(library):
    for dtype in library.half_precisions:
        for dim in (64, 33, 4104):
            features, labels, cameras = problem(70, dim, 2)
            check(library, features, labels, cameras, dtype=dtype)


def test_mean_of_zero_is_not_divided(library):
    features = np.concatenate([np.ones((4, 8)), -np.ones((4, 8))]).astype(np.float32)
    labels = np.zeros(8, np.int64)
    assert not check(library, features, labels, normalize=True).any()


def test_tiles_of_either_width_give_the_same_bits(emulator):
    # Few classes are summed by all warps of a block in turn, many by one thread a column: a class's
    # mean must not depend on how many others there are.
    features, labels, _ = problem(700, 12, 1)
    labels[:] = 0
    others = np.arange(1, 601)
    few = ops.class_means(features, labels, normalize=False)
    many = ops.class_means(
        np.concatenate([features, np.ones((600, 12), np.float32)]),
        np.concatenate([labels, others]),
        normalize=False,
    )
    np.testing.assert_array_equal(few.means[0], many.means[0])


def test_sums_run_in_the_promised_order(library):
    # 32 rows at a time, and those sums with compensation: the same bits on every floor.
    features, labels, _ = problem(900, 7, 4)
    result = ops.class_means(library(features), library(labels), normalize=False)
    for label, mean in zip(*(library.back(x) for x in (result.labels, result.means)), strict=True):
        rows = features[labels == label]
        total, lost = np.zeros((2, 7), np.float32)
        for first in range(0, len(rows), 32):
            run = np.zeros(7, np.float32)
            for row in rows[first : first + 32]:
                run += row
            term = run - lost
            lost = (total + term - total) - term
            total = total + term
        np.testing.assert_array_equal(mean, total / np.float32(len(rows)))


@pytest.mark.parametrize("kind", ["constant", "positive", "growing"])
def test_a_large_class_loses_no_digits(kind):
    rng = np.random.default_rng(0)
    features = {
        "constant": np.full((100_000, 16), 0.1),
        "positive": rng.random((100_000, 16)),
        "growing": np.linspace(0, 1, 1_600_000).reshape(100_000, 16),
    }[kind].astype(np.float32)
    result = ops.class_means(features, np.zeros(100_000, np.int64), normalize=False)
    exact = features.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(result.means[0], exact, rtol=1e-6)


def test_camera_proxies_of_ice(library):
    features, labels, cameras = problem(200, 24, 5, cameras=4)
    proxies, proxy_labels, proxy_cameras = [], [], []
    for camera in range(4):
        for label in sorted(set(labels[cameras == camera].tolist()) - {-1}):
            mean = features[(cameras == camera) & (labels == label)].mean(axis=0)
            proxies.append(mean / np.linalg.norm(mean))
            proxy_labels.append(label)
            proxy_cameras.append(camera)
    result = ops.class_means(library(features), library(labels), library(cameras), normalize=True)
    np.testing.assert_allclose(library.back(result.means), proxies, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(library.back(result.labels), proxy_labels)
    np.testing.assert_array_equal(library.back(result.cameras), proxy_cameras)


@given(
    size=st.integers(0, 60),
    dim=st.integers(1, 40),
    classes=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_order_of_rows_does_not_matter(size, dim, classes, seed):
    features, labels, cameras = problem(size, dim, classes, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(size)
    ours = ops.class_means(features, labels, cameras, normalize=False)
    other = ops.class_means(
        features[shuffled], labels[shuffled], cameras[shuffled], normalize=False
    )
    np.testing.assert_allclose(ours.means, other.means, rtol=0, atol=1e-5)
    for x, y in zip(ours[1:], other[1:], strict=True):
        np.testing.assert_array_equal(x, y)
    assert ours.counts.sum() == (labels >= 0).sum()


@given(size=st.integers(1, 60), seed=st.integers(0, 999))
def test_weighted_mean_of_proxies_is_the_centroid(size, seed):
    features, labels, cameras = problem(size, 5, 3, seed=seed)
    centroids = ops.class_means(features, labels, normalize=False)
    proxies = ops.class_means(features, labels, cameras, normalize=False)
    for label, centroid in zip(centroids.labels, centroids.means, strict=True):
        of = proxies.labels == label
        mean = np.average(proxies.means[of], axis=0, weights=proxies.counts[of])
        np.testing.assert_allclose(mean, centroid, rtol=0, atol=1e-5)


# --- arguments ------------------------------------------------------------------------------------


def test_wrong_arguments(library):
    features, labels, cameras = (library(x) for x in problem(6, 8, 3))

    def zeros(*shape):
        return library(np.zeros(shape, np.float32))

    cases = [
        ({"features": zeros(6)}, "features must have shape (any, any), got (6,)"),
        (
            {"features": library(np.zeros((6, 8)))},
            "features must be float32, float16 or bfloat16, got float64",
        ),
        (
            {"features": zeros(6, 16)[:, ::2]},
            "features must be C-contiguous, got a strided view of shape (6, 8)",
        ),
        (
            {"features": [[0.0] * 8] * 6},
            "features must be an array of torch, CuPy or NumPy, got list",
        ),
        ({"labels": labels[:5]}, "labels must have shape (6,), got (5,)"),
        ({"labels": zeros(6)}, "labels must be int64 or int32, got float32"),
        ({"cameras": cameras[:5]}, "cameras must have shape (6,), got (5,)"),
        ({"cameras": zeros(6)}, "cameras must be int64 or int32, got float32"),
        ({"normalize": 1}, "normalize must be True or False, got 1"),
        ({"normalize": "l2"}, "normalize must be True or False, got 'l2'"),
    ]
    for changes, message in cases:
        arguments = {"features": features, "labels": labels, "cameras": cameras, "normalize": True}
        with pytest.raises(ValueError) as error:
            ops.class_means(**arguments | changes)
        assert str(error.value) == f"class_means: {message}"


def test_two_libraries_in_one_call():
    features, labels, _ = problem(6, 8, 3)
    with pytest.raises(ValueError, match="labels must be of one library and on one device"):
        ops.class_means(features, torch.from_numpy(labels), normalize=True)


# --- torch ----------------------------------------------------------------------------------------


def test_no_gradient_flows(torch_library):
    features, labels, _ = (torch_library(x) for x in problem(6, 8, 3))
    means = ops.class_means(features.requires_grad_(), labels, normalize=True).means
    assert not means.requires_grad


@pytest.mark.parametrize("with_cameras", [False, True])
def test_compiles_without_a_graph_break(torch_library, with_cameras):
    features, labels, cameras = (torch_library(x) for x in problem(60, 8, 3))
    ids = (labels, cameras) if with_cameras else (labels,)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(features, *ids):
        found = ops.class_means(features * 2, *ids, normalize=False)
        return found.means + 1, found.labels, found.counts

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        means, mean_labels, counts = step(features.requires_grad_(), *ids)
    expected = ops.class_means(features.detach() * 2, *ids, normalize=False)
    torch.testing.assert_close(means, expected.means + 1)
    torch.testing.assert_close(mean_labels, expected.labels)
    torch.testing.assert_close(counts, expected.counts)


def test_operator_registration(torch_library):
    features, labels, cameras = (torch_library(x) for x in problem(20, 8, 3))
    for arguments in [(features, labels, None, True), (features.half(), labels, cameras, False)]:
        torch.library.opcheck(torch.ops.pyreid.class_means.default, arguments)


def test_side_stream(cuda):
    features, labels, cameras = (torch.from_numpy(x).to(cuda) for x in problem(3000, 256, 64))
    expected = ops.class_means(features, labels, cameras, normalize=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # were it not on this stream, the op would come first
        late = features * 1.0
        result = ops.class_means(late, labels * 1, cameras, normalize=True)
    torch.cuda.current_stream().wait_stream(side)
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
