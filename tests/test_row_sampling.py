import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyreid import debug, get_num_threads, ops, reference, set_num_threads
from pyreid.reference.row_sampling import philox, random_order

HUGE = 10**12


def problem(size, groups, batch, *, seed=0):
    """Groups of bank rows (-1: none), and samples that are rows of the bank."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, groups, size)
    rows = rng.integers(0, max(size, 1), batch)
    return ids, ids[rows] if size else rng.integers(0, groups, batch), rows


def check(library, groups, targets, rows=None, *, positives=3, negatives=9, seed=7):
    """Op against reference, exactly; returns the rows drawn."""
    arrays = [library(groups), library(targets)]
    exclude = None if rows is None else library(rows)
    options = {"positives": positives, "negatives": negatives, "seed": seed}
    drawn = ops.sample_rows(*arrays, **options, exclude_self=exclude)
    expected = reference.sample_rows(groups, targets, **options, exclude_self=rows)
    result = [library.back(x) for x in drawn]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs)
    return result


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize(
    "size, groups, batch, positives, negatives",
    [
        (1, 1, 1, 1, 1),
        (50, 7, 0, 2, 3),  # no samples
        (50, 7, 5, 0, 0),  # nothing to draw
        (50, 7, 5, 2, 0),
        (50, 7, 5, 0, 3),
        (50, 7, 5, 20, 120),  # more than there are
        (50, 1, 6, 60, 20),
        (3000, 700, 3, 2, 1500),
        (1100, 2, 2, 600, 700),
    ],
)
def test_matches_reference(library, size, groups, batch, positives, negatives, excluding):
    ids, targets, rows = problem(size, groups, batch)
    rows = rows if excluding else None
    check(library, ids, targets, rows, positives=positives, negatives=negatives)


def test_empty_bank(library):
    none = np.zeros(0, np.int64)
    for drawn in check(library, none, np.array([0, -1])):
        assert (drawn == -1).all()


def test_sparse_huge_and_32_bit_ids(library):
    ids, targets, rows = problem(200, 6, 8)
    huge = np.array([HUGE, 0, 2**63 - 1, 256, 2**32, HUGE + 1, -(2**63)])
    check(library, huge[ids], huge[targets], rows)
    small = (x.astype(np.int32) for x in (ids, targets, rows))
    check(library, *small)
    check(library, ids, targets.astype(np.int32), rows)


def test_targets_without_rows(library):
    groups = np.array([3, 3, -1, 8, -1, -5])
    positives, negatives = check(library, groups, np.array([4, -1, -5, 9]), negatives=6)
    assert (positives == -1).all()
    np.testing.assert_array_equal(np.sort(negatives), np.tile(np.arange(6), (4, 1)))


def test_edges_of_exclusion(library):
    groups = np.array([5, 7, 7, -1])
    targets = np.array([5, 7, 7, 7, -1, 7, 5])
    rows = np.array([0, 1, 2, 0, 3, 3, 2])  # alone; one other; ...; of another group; of none
    positives, negatives = check(library, groups, targets, rows, positives=4, negatives=5)
    allowed = [{0}, {2}, {1}, {1, 2}, {-1}, {1, 2}, {0}]
    others = [{1, 2, 3}, {0, 3}, {0, 3}, {3}, {0, 1, 2}, {0}, {1, 3}]
    assert [set(row) for row in positives] == allowed
    assert [set(row) for row in negatives] == others


def test_nothing_to_draw_but_the_excluded_row(library):
    groups = np.array([2, 2, 4])
    _, negatives = check(library, groups, np.array([2]), np.array([2]))
    assert (negatives == -1).all()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_seeds(library, seed):
    check(library, *problem(60, 4, 3), seed=seed)


def test_market_sized():
    groups, targets, rows = problem(12936, 700, 16)
    positives, negatives = ops.sample_rows(
        groups, targets, positives=2, negatives=8192, seed=3, exclude_self=rows
    )
    expected = reference.sample_rows(
        groups, targets, positives=2, negatives=8192, seed=3, exclude_self=rows
    )
    np.testing.assert_array_equal(positives, expected[0])
    np.testing.assert_array_equal(negatives, expected[1])
    assert all(len(set(row)) == 8192 for row in negatives.tolist())


def test_threads_do_not_matter():
    groups, targets, rows = problem(5000, 50, 32)
    before, results = get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            set_num_threads(threads)
            results.append(
                ops.sample_rows(
                    groups, targets, positives=4, negatives=900, seed=1, exclude_self=rows
                )
            )
    finally:
        set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(x, y)


@given(
    size=st.integers(1, 80),
    groups=st.integers(1, 9),
    batch=st.integers(1, 6),
    positives=st.integers(0, 12),
    negatives=st.integers(0, 100),
    excluding=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_what_is_drawn(size, groups, batch, positives, negatives, excluding, seed):
    ids, targets, rows = problem(size, groups, batch, seed=seed % 1000)
    drawn = ops.sample_rows(
        ids,
        targets,
        positives=positives,
        negatives=negatives,
        seed=seed,
        exclude_self=rows if excluding else None,
    )
    for i, target in enumerate(targets):
        own = {r for r in range(size) if target >= 0 and ids[r] == target}
        others = set(range(size)) - own
        if excluding:
            others -= {rows[i]}
            own = own - {rows[i]} or own
        for row, allowed in ((drawn[0][i], own), (drawn[1][i], others)):
            allowed = sorted(allowed) or [-1]
            assert set(row) <= set(allowed)
            counts = np.bincount(row + 1, minlength=size + 1)[np.array(allowed, int) + 1]
            assert len(row) == 0 or counts.max() - counts.min() <= 1  # all, before any repeats


# --- the generator --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # the known answers of Random123
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_philox(counter, key, expected):
    # The floors are held to this generator by test_matches_reference.
    words, keys, answers = ([int(w, 16) for w in text.split()] for text in (counter, key, expected))
    assert philox(keys[0] | keys[1] << 32, words) == tuple(answers)


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 5000])
def test_random_order_is_a_permutation(size):
    np.testing.assert_array_equal(np.sort(random_order(9, 1, 0, size, size)), np.arange(size))


# --- the distribution -----------------------------------------------------------------------------

GROUPS = np.array([4, 2, 4, -1, 2, 4, 9, 4, -1, 2, 4])


def draws(*, positives=0, negatives=0, runs, target=4, row=2):
    """Rows drawn for one sample: by as many seeds as samples of one call, to tell both apart."""
    half = runs // 100
    targets, rows = np.full(half, target), np.full(half, row)
    parts = [
        ops.sample_rows(
            GROUPS, targets, positives=positives, negatives=negatives, seed=seed, exclude_self=rows
        )
        for seed in range(100)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def uniform(outcomes, possible):
    """Chi-square test that each of `possible` outcomes is as likely as any other."""
    values, counts = np.unique(outcomes, axis=0, return_counts=True)
    assert len(values) == possible
    assert stats.chisquare(counts).pvalue > 1e-3


def test_every_positive_is_as_likely():
    positives, _ = draws(positives=2, runs=20_000)
    uniform(positives[:, 0], 4)
    uniform(positives[:, 1], 4)
    uniform(positives, 4 * 3)  # ordered pairs


def test_every_negative_is_as_likely():
    _, negatives = draws(negatives=3, runs=30_000)
    for place in range(3):
        uniform(negatives[:, place], 6)
    uniform(negatives, 6 * 5 * 4)  # ordered triples


def test_every_order_is_as_likely():
    positives, _ = draws(positives=4, runs=20_000)
    uniform(positives, 24)


def test_every_set_is_as_likely():
    _, negatives = draws(negatives=4, runs=20_000, target=2, row=1)
    uniform(np.sort(negatives), 70)  # 8 choose 4


@pytest.mark.parametrize("size", [256, 1000])
def test_larger_orders(size):
    groups, targets = np.full(size, -1), np.full(2000, -1)
    _, negatives = ops.sample_rows(groups, targets, positives=0, negatives=100, seed=11)
    uniform(negatives.ravel(), size)
    uniform(negatives[:, 0] * 10 // size * 10 + negatives[:, 1] * 10 // size, 100)
    steps = np.diff(negatives, axis=1) % size  # neighbours in an order are strangers
    uniform(steps.ravel(), size - 1)


def test_positives_and_negatives_are_independent():
    positives, negatives = draws(positives=1, negatives=1, runs=24_000)
    uniform(np.concatenate([positives, negatives], axis=1), 4 * 6)


def test_same_distribution_as_gcl():
    # GCL's memory: positives by randint over the cluster, negatives by randperm over the rest,
    # outliers included. How often each row is drawn must not tell the two apart.
    generator = torch.Generator().manual_seed(0)
    groups = torch.from_numpy(GROUPS)
    own, others = (groups == 4).nonzero()[:, 0], (groups != 4).nonzero()[:, 0]
    counts = np.zeros((2, 2, len(GROUPS)), int)
    for _ in range(4000):
        chosen = own[torch.randint(0, len(own), (1,), generator=generator)]
        counts[0, 0, chosen] += 1
        counts[1, 0, others[torch.randperm(len(others), generator=generator)[:3]]] += 1
    drawn = ops.sample_rows(GROUPS, np.full(4000, 4), positives=1, negatives=3, seed=5)
    for i, rows in enumerate(drawn):
        counts[i, 1] = np.bincount(rows.ravel(), minlength=len(GROUPS))
        table = counts[i][:, counts[i].sum(axis=0) > 0]
        assert table.shape[1] == (5, 6)[i]
        assert stats.chi2_contingency(table).pvalue > 1e-3


# --- arguments ------------------------------------------------------------------------------------


def call(library, **changes):
    groups, targets, rows = problem(20, 4, 3)
    arguments = {
        "groups": library(groups),
        "targets": library(targets),
        "exclude_self": library(rows),
    }
    with pytest.raises(ValueError) as error:
        ops.sample_rows(**arguments | {"positives": 2, "negatives": 4, "seed": 0} | changes)
    return str(error.value)


def test_wrong_arguments(library):
    def ids(*values):
        return library(np.array(values))

    floats = library(np.zeros(3, np.float32))
    cases = [
        ({"groups": floats}, "groups must be int64 or int32, got float32"),
        ({"groups": [1, 2]}, "groups must be an array of torch, CuPy or NumPy, got list"),
        (
            {"groups": library(np.zeros((2, 2), np.int64))},
            "groups must have shape (any,), got (2, 2)",
        ),
        ({"targets": floats}, "targets must be int64 or int32, got float32"),
        (
            {"targets": ids(1, 2, 3, 4, 5, 6)[::2]},
            "targets must be C-contiguous, got a strided view of shape (3,)",
        ),
        ({"exclude_self": ids(0, 1)}, "exclude_self must have shape (3,), got (2,)"),
        ({"exclude_self": floats}, "exclude_self must be int64 or int32, got float32"),
        ({"positives": -1}, "positives must be an integer in [0, 2**31), got -1"),
        ({"positives": 1.0}, "positives must be an integer in [0, 2**31), got 1.0"),
        ({"negatives": 2**31}, "negatives must be an integer in [0, 2**31), got 2147483648"),
        ({"negatives": None}, "negatives must be an integer in [0, 2**31), got None"),
        ({"seed": -1}, "seed must be an integer in [0, 2**64), got -1"),
        ({"seed": 2**64}, f"seed must be an integer in [0, 2**64), got {2**64}"),
        ({"seed": 0.5}, "seed must be an integer in [0, 2**64), got 0.5"),
    ]
    for changes, message in cases:
        assert call(library, **changes) == f"sample_rows: {message}"


def test_excluded_row_out_of_range(library):
    groups, targets, rows = problem(20, 4, 3)
    for bad in (20, -1, 2**40):
        rows[1] = bad
        if library.floor == "cpu":
            message = f"exclude_self must lie in [0, 20), got {bad} at position 1"
            assert call(library, exclude_self=library(rows)) == f"sample_rows: {message}"
        else:  # nothing is excluded
            drawn = ops.sample_rows(
                library(groups),
                library(targets),
                positives=3,
                negatives=20,
                seed=7,
                exclude_self=library(rows),
            )
            expected = reference.sample_rows(groups, targets, positives=3, negatives=20, seed=7)
            for ours, theirs in zip(drawn, expected, strict=True):
                np.testing.assert_array_equal(library.back(ours)[1], theirs[1])
        if library.floor == "cuda":
            with debug():
                message = f"sample_rows: exclude_self must lie in [0, 20), got {bad}"
                assert call(library, exclude_self=library(rows)) == message


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_compiles_without_a_graph_break(torch_library, seed):
    groups, targets, rows = (torch_library(x) for x in problem(60, 4, 5))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(groups, targets, rows):
        positives, negatives = ops.sample_rows(
            groups, targets * 1, positives=2, negatives=9, seed=seed, exclude_self=rows
        )
        return positives + 1, negatives

    positives, negatives = step(groups, targets, rows)
    expected = ops.sample_rows(
        groups, targets, positives=2, negatives=9, seed=seed, exclude_self=rows
    )
    torch.testing.assert_close(positives, expected[0] + 1)
    torch.testing.assert_close(negatives, expected[1])


def test_operator_registration(torch_library):
    groups, targets, rows = (torch_library(x) for x in problem(60, 4, 5))
    for exclude in (None, rows):
        torch.library.opcheck(
            torch.ops.pyreid.sample_rows.default, (groups, targets, exclude, 2, 9, 1, 2**32 - 1)
        )


def test_graph_capture(cuda):
    groups, targets, rows = (torch.from_numpy(x).to(cuda) for x in problem(3000, 40, 16))
    options = {"positives": 2, "negatives": 500, "seed": 3, "exclude_self": rows}
    expected = ops.sample_rows(groups, targets, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.sample_rows(groups, targets, **options)
    graph.replay()
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
