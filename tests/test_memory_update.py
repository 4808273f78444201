import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreid import _native, debug, ops, reference

REPEATS = ["sequential", "last", "hardest", "mean"]


def problem(size, dim, events, *, distinct=None, seed=0):
    """Bank and features of unit rows; ids among the first `distinct` rows."""
    rng = np.random.default_rng(seed)

    def unit(count):
        x = rng.standard_normal((count, dim)).astype(np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return unit(size), unit(events), rng.integers(0, distinct or size, events)


def check(library, bank, features, rows, *, momentum=0.2, atol=1e-6, dtype=None, **options):
    """Op against reference; two runs, equal bits; returns the new bank as NumPy."""
    start = library.back(library(bank, dtype))  # as rounded to the dtype
    inputs = library.back(library(features, dtype))
    expected = reference.memory_update(start, inputs, rows, momentum=momentum, **options)
    runs = []
    for _ in range(2):
        result = library(bank, dtype)
        given_momentum = momentum if isinstance(momentum, float) else library(momentum)
        returned = ops.memory_update_(
            result, library(features, dtype), library(rows), momentum=given_momentum, **options
        )
        assert returned is result
        runs.append(library.back(result))
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_allclose(runs[0], expected, rtol=0, atol=atol)
    return runs[0]


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize(
    "size, dim, events, distinct",
    [
        (4, 8, 0, 4),  # nothing to do
        (1, 1, 1, 1),
        (7, 1, 5, 7),
        (16, 31, 40, 5),
        (3, 257, 33, 1),  # a batch of one id
        (50, 64, 300, 9),
        (9, 2048, 12, 4),
        (3, 4100, 5, 2),  # more than 8 values per thread
        (2, 8193, 4, 2),  # too long for registers
    ],
)
def test_matches_reference(library, repeats, size, dim, events, distinct):
    bank, features, rows = problem(size, dim, events, distinct=distinct)
    result = check(library, bank, features, rows, repeats=repeats)
    untouched = np.setdiff1d(np.arange(size), rows)
    np.testing.assert_array_equal(result[untouched], bank[untouched])


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize(
    "dim, parts",
    [
        (64, 4),
        (64, (1, 2, 61)),
        (40, (7, 33)),
        (80, 80),
        (4096, (2048, *[256] * 8)),
        (80, [1] * 80),
    ],
)
def test_parts(library, repeats, dim, parts):
    bank, features, rows = problem(6, dim, 11, distinct=3)
    check(library, bank, features, rows, repeats=repeats, parts=parts)


@pytest.mark.parametrize("repeats", REPEATS)
def test_momentum_per_event(library, repeats):
    bank, features, rows = problem(8, 33, 20, distinct=3)
    momentum = np.random.default_rng(1).random(20).astype(np.float32)
    check(library, bank, features, rows, momentum=momentum, repeats=repeats)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.999])
def test_extreme_momentum(library, repeats, momentum):
    bank, features, rows = problem(5, 24, 12, distinct=2)
    check(library, bank, features, rows, momentum=momentum, repeats=repeats, normalize=False)


def test_32_bit_ids(library):
    bank, features, rows = problem(12, 40, 20, distinct=6)
    check(library, bank, features, rows.astype(np.int32))


@pytest.mark.parametrize("repeats", REPEATS)
def test_half_precision(library, repeats):
    for dtype, atol in zip(library.half_precisions, (1.2e-3, 9e-3), strict=False):
        for dim in (64, 33, 8200):
            bank, features, rows = problem(6, dim, 9, distinct=3)
            check(library, bank, features, rows, repeats=repeats, dtype=dtype, atol=atol)


def test_bank_and_features_of_two_dtypes(library):
    bank, features, rows = problem(6, 40, 9, distinct=3)
    for half in library.half_precisions:
        for bank_dtype, feature_dtype in [("float32", half), (half, "float32")]:
            result = library(bank, bank_dtype)
            expected = reference.memory_update(
                library.back(result),
                library.back(library(features, feature_dtype)),
                rows,
                momentum=0.3,
            )
            ops.memory_update_(
                result, library(features, feature_dtype), library(rows), momentum=0.3
            )
            atol = 1e-6 if bank_dtype == "float32" else 4e-3
            np.testing.assert_allclose(library.back(result), expected, rtol=0, atol=atol)


def test_row_of_half_precision_is_rounded_once(library):
    # 100 moves of 1 % towards the other value: rounding each would stall far from it.
    bank = np.full((1, 8), 1.0, np.float16)
    features = np.full((100, 8), 1.01, np.float16)
    result = library(bank)
    rows = library(np.zeros(100, np.int64))
    ops.memory_update_(result, library(features), rows, momentum=0.99, normalize=False)
    expected = 1.0 + (float(features[0, 0]) - 1.0) * (1 - 0.99**100)
    assert abs(float(library.back(result)[0, 0]) - expected) < 1e-3


def test_many_events_are_sorted(library):
    # More than the kernel scans; ids of more than one byte; repeats far apart.
    bank, features, rows = problem(1000, 3, 5000, distinct=700)
    for repeats in REPEATS:
        check(library, bank, features, rows, repeats=repeats)


def test_one_id_many_times(library):
    bank, features, _ = problem(3, 5, 4500)
    check(library, bank, features, np.full(4500, 2))


def test_a_hundred_thousand_events():
    bank, features, rows = problem(30000, 4, 100_000)
    expected = reference.memory_update(bank, features, rows, momentum=0.2)
    ops.memory_update_(bank, features, rows, momentum=0.2)
    np.testing.assert_allclose(bank, expected, rtol=0, atol=1e-6)


def test_hundred_thousand_events_by_the_sorting_kernels(emulator):
    bank, features, rows = problem(70_000, 1, 100_000)
    expected = reference.memory_update(bank, features, rows, momentum=0.2, normalize=False)
    ops.memory_update_(bank, features, rows, momentum=0.2, normalize=False)
    np.testing.assert_allclose(bank, expected, rtol=0, atol=1e-6)


def test_hardest_is_the_first_on_ties(library):
    bank = np.array([[1, 0, 0, 0]], np.float32)
    features = np.array(
        [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32
    )  # all at a right angle
    result = library(bank)
    ops.memory_update_(
        result, library(features), library(np.zeros(3, np.int64)), momentum=0.0, repeats="hardest"
    )
    np.testing.assert_array_equal(library.back(result), features[:1])


def test_zero_row_gives_zeros_not_nan(library):
    result = library(np.zeros((1, 6), np.float32))
    zeros = library(np.zeros((2, 6), np.float32))
    ops.memory_update_(result, zeros, library(np.zeros(2, np.int64)), momentum=0.5)
    np.testing.assert_array_equal(library.back(result), np.zeros((1, 6)))


def test_selective_contrast_event_order(library):
    # SCL's mixture bank: neighbours' rows overwritten by the anchor's feature, both branches in turn.
    bank, features, _ = problem(10, 16, 4)
    events = [(row, source) for source in (0, 1, 2, 3) for row in (5, 3, 5, 1)]
    rows = np.array([row for row, _ in events])
    check(library, bank, features[[source for _, source in events]], rows, momentum=0.5)


@given(
    size=st.integers(1, 9),
    dim=st.integers(1, 40),
    events=st.integers(0, 30),
    repeats=st.sampled_from(REPEATS),
    seed=st.integers(0, 999),
)
def test_events_of_different_rows_commute(size, dim, events, repeats, seed):
    bank, features, rows = problem(size, dim, events, seed=seed)
    by_row = np.argsort(rows, kind="stable")
    other = bank.copy()
    ops.memory_update_(bank, features, rows, momentum=0.4, repeats=repeats)
    ops.memory_update_(other, features[by_row], rows[by_row], momentum=0.4, repeats=repeats)
    np.testing.assert_array_equal(bank, other)


@given(
    dim=st.integers(1, 70),
    events=st.integers(1, 20),
    repeats=st.sampled_from(REPEATS),
    seed=st.integers(0, 999),
)
def test_touched_rows_have_unit_parts(dim, events, repeats, seed):
    bank, features, rows = problem(6, 2 * dim, events, seed=seed)
    ops.memory_update_(bank, features, rows, momentum=0.3, repeats=repeats, parts=2)
    norms = np.linalg.norm(bank[rows].reshape(events, 2, dim), axis=2)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_kernels_agree_with_each_other_under_every_schedule(emulator):
    bank, features, rows = problem(20, 70, 60, distinct=7)
    results = []
    for schedule in _native.SCHEDULES:
        for seed in range(3):
            with _native.emulated(schedule, seed):
                result = bank.copy()
                ops.memory_update_(result, features, rows, momentum=0.2, parts=7)
                results.append(result)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("events, launches", [(256, 1), (4096, 1), (4097, 5)])
def test_a_training_batch_is_one_launch(emulator, events, launches):
    bank, features, rows = problem(40, 4, events)
    before = emulator.get("launches")
    ops.memory_update_(bank, features, rows, momentum=0.2)
    assert emulator.get("launches") - before == launches


# --- arguments ------------------------------------------------------------------------------------


def call(library, **changes):
    bank, features, rows = problem(6, 8, 4)
    arguments = {"bank": library(bank), "features": library(features), "rows": library(rows)}
    arguments |= {"momentum": 0.2} | changes
    untouched = library.back(arguments["bank"]).copy()
    with pytest.raises(ValueError) as error:
        ops.memory_update_(**arguments)
    np.testing.assert_array_equal(library.back(arguments["bank"]), untouched)
    return str(error.value)


def test_wrong_arguments(library):
    def f32(*shape):
        return library(np.zeros(shape, np.float32))

    def ids(*values):
        return library(np.array(values))

    cases = [
        ({"features": f32(4, 7)}, "features must have shape (any, 8), got (4, 7)"),
        ({"features": f32(4)}, "features must have shape (any, 8), got (4,)"),
        ({"bank": f32(6)}, "bank must have shape (any, any), got (6,)"),
        ({"rows": ids(0, 1, 2)}, "rows must have shape (4,), got (3,)"),
        (
            {"features": library(np.zeros((4, 8)))},
            "features must be float32, float16 or bfloat16, got float64",
        ),
        (
            {"rows": library(np.zeros(4, np.float32))},
            "rows must be int64 or int32, got float32",
        ),
        ({"momentum": 1.5}, "momentum must lie in [0, 1], got 1.5"),
        ({"momentum": -0.1}, "momentum must lie in [0, 1], got -0.1"),
        ({"momentum": float("nan")}, "momentum must lie in [0, 1], got nan"),
        (
            {"momentum": "0.2"},
            "momentum must be a number or a float32 array of one per event, got '0.2'",
        ),
        ({"momentum": f32(3)}, "momentum must have shape (4,), got (3,)"),
        (
            {"repeats": "first"},
            "repeats must be 'sequential', 'last', 'hardest' or 'mean', got 'first'",
        ),
        (
            {"parts": 3},
            "parts must be a count that divides the 8 columns, or their sizes, got 3",
        ),
        (
            {"parts": 0},
            "parts must be a count that divides the 8 columns, or their sizes, got 0",
        ),
        ({"parts": (4, 5)}, "parts must sum to the 8 columns, got (4, 5) = 9"),
        ({"parts": (8, 0)}, "parts must hold positive sizes, got (8, 0)"),
        (
            {"parts": (1,) * 64 + (2,)},
            "parts must hold at most 64 unequal sizes, got 65",
        ),
        ({"parts": "all"}, "parts must be a count or a tuple of sizes, got 'all'"),
        (
            {"features": [[0.0] * 8] * 4},
            "features must be an array of torch, CuPy or NumPy, got list",
        ),
        (
            {"features": f32(4, 16)[:, ::2]},
            "features must be C-contiguous, got a strided view of shape (4, 8)",
        ),
        (
            {"bank": f32(8, 6).T},
            "bank must be C-contiguous, got a strided view of shape (6, 8)",
        ),
    ]
    for changes, message in cases:
        assert call(library, **changes) == f"memory_update_: {message}"


def test_row_out_of_range(library):
    bank, features, rows = problem(6, 8, 4)
    for bad in (6, -1, 2**40):
        rows[2] = bad
        if library.floor == "cpu":
            assert (
                call(library, rows=library(rows))
                == f"memory_update_: rows must lie in [0, 6), got {bad} at position 2"
            )
        else:  # the event is left out, whichever way events are found
            for copies in (1, 1500):
                many = library(np.tile(features, (copies, 1)))
                result = library(bank)
                ops.memory_update_(result, many, library(np.tile(rows, copies)), momentum=0.2)
                keep = np.tile(rows != bad, copies)
                expected = reference.memory_update(
                    bank,
                    np.tile(features, (copies, 1))[keep],
                    np.tile(rows, copies)[keep],
                    momentum=0.2,
                )
                np.testing.assert_allclose(library.back(result), expected, rtol=0, atol=1e-6)
        if library.floor == "cuda":
            with debug():
                message = f"memory_update_: rows must lie in [0, 6), got {bad}"
                assert call(library, rows=library(rows)) == message


def test_momentum_of_an_event_out_of_range():
    momentum = np.array([0.1, 0.2, 1.5, 0.3], np.float32)
    bank, features, rows = problem(6, 8, 4)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5.* at position 2"):
        ops.memory_update_(bank, features, rows, momentum=momentum)


def test_read_only_arrays():
    bank, features, rows = problem(6, 8, 4)
    features.flags.writeable = rows.flags.writeable = False
    ops.memory_update_(bank, features, rows, momentum=0.2)  # inputs may be read-only
    bank.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"^memory_update_: bank must be writable, got a read-only array"
    ):
        ops.memory_update_(bank, features, rows, momentum=0.2)


def test_features_that_are_the_bank():
    bank, _, rows = problem(6, 8, 6)
    with pytest.raises(ValueError, match="features must not share memory with bank"):
        ops.memory_update_(bank, bank, rows, momentum=0.2)


def test_two_libraries_in_one_call():
    bank, features, rows = problem(6, 8, 4)
    with pytest.raises(ValueError) as error:
        ops.memory_update_(bank, torch.from_numpy(features), rows, momentum=0.2)
    assert str(error.value) == (
        "memory_update_: features must be of one library and on one device with bank (numpy on cpu), "
        "got torch on cpu"
    )


def test_two_devices_in_one_call(cuda):
    bank, features, rows = (torch.from_numpy(x) for x in problem(6, 8, 4))
    with pytest.raises(
        ValueError, match="features must be of one library and on one device with bank"
    ):
        ops.memory_update_(bank.to(cuda), features, rows, momentum=0.2)


# --- torch ----------------------------------------------------------------------------------------


def tensors(library, *shape, **options):
    return [library(x) for x in problem(*shape, **options)]


def test_autograd_notices_the_write(torch_library):
    bank, features, rows = tensors(torch_library, 6, 8, 4)
    queries = torch.ones(2, 8, device=bank.device, requires_grad=True)
    loss = (queries @ bank.T).sum()
    ops.memory_update_(bank, features, rows, momentum=0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bank_that_requires_gradients(torch_library):
    bank, features, rows = tensors(torch_library, 6, 8, 4)
    bank = torch.nn.Parameter(bank)
    with pytest.raises(ValueError, match="bank must not require gradients, got requires_grad=True"):
        ops.memory_update_(bank, features, rows, momentum=0.2)
    with torch.no_grad():
        ops.memory_update_(bank, features.requires_grad_(), rows, momentum=0.2)
    with torch.inference_mode():
        ops.memory_update_(bank.clone(), features, rows, momentum=0.2)


@pytest.mark.parametrize("options", [{}, {"parts": (3, 5)}, {"parts": 2}, {"repeats": "mean"}])
def test_compiles_without_a_graph_break(torch_library, options):
    bank, features, rows = tensors(torch_library, 6, 8, 4)
    expected = bank.clone()
    ops.memory_update_(expected, features * 2, rows, momentum=0.2, **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(bank, features, rows):
        ops.memory_update_(bank, features * 2, rows, momentum=0.2, **options)
        return bank.sum()

    total = step(bank, features, rows)
    torch.testing.assert_close(bank, expected)
    torch.testing.assert_close(total, expected.sum())


def test_operator_registration(torch_library):
    bank, features, rows = tensors(torch_library, 6, 8, 4)
    momenta = torch.rand(4, device=bank.device)
    for arguments in [
        (bank, features, rows, None, 0.2, "sequential", [8], True),
        (bank, features, rows, momenta, 0.0, "last", [3, 5], False),
    ]:
        torch.library.opcheck(torch.ops.pyreid.memory_update_.default, arguments)


def test_streams_and_graphs(cuda):
    bank, features, rows = (torch.from_numpy(x).to(cuda) for x in problem(500, 256, 64))
    expected = bank.clone()
    ops.memory_update_(expected, features, rows, momentum=0.2)
    expected_twice = expected.clone()
    ops.memory_update_(expected_twice, features, rows, momentum=0.2)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = bank.clone()
        torch.cuda._sleep(10_000_000)  # were it not on this stream, the update would come first
        late = features * 1.0
        ops.memory_update_(result, late, rows, momentum=0.2)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)

    graph = torch.cuda.CUDAGraph()
    result = bank.clone()
    with torch.cuda.graph(graph):
        ops.memory_update_(result, features, rows, momentum=0.2)
    graph.replay()
    graph.replay()
    torch.testing.assert_close(result, expected_twice, rtol=0, atol=0)


def test_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    bank, features, rows = (torch.from_numpy(x).to("cuda:1") for x in problem(50, 64, 16))
    expected = bank.cpu()
    ops.memory_update_(expected, features.cpu(), rows.cpu(), momentum=0.2)
    ops.memory_update_(bank, features, rows, momentum=0.2)
    torch.testing.assert_close(bank.cpu(), expected, rtol=0, atol=1e-6)
    assert torch.cuda.current_device() == 0
