import importlib
import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pyreid import _build, _native, debug, ops, reference
from pyreid.ops import _panels

REDUCE = ["row", "cluster_mean", "label_uniform"]


def unit(rng, count, dim):
    x = rng.standard_normal((count, dim)).astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def problem(batch, size, dim, reduce="row", *, distinct=7, unlabelled=0.2, seed=0):
    """Unit queries and rows; targets; options: reduce, labels if it takes any, some -1."""
    rng = np.random.default_rng(seed)
    queries, bank = unit(rng, batch, dim), unit(rng, size, dim)
    if reduce == "row":
        return queries, bank, rng.integers(0, size, batch), {"reduce": reduce}
    labels = rng.integers(0, distinct, size)
    labels[rng.random(size) < unlabelled] = -1
    labels[0] = 0
    targets = rng.choice(labels[labels >= 0], batch)
    return queries, bank, targets, {"reduce": reduce, "labels": labels}


def as_given(library, options):
    return {
        name: library(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }


def check(library, queries, bank, targets, options, *, atol=1e-5, dtypes=(None, None)):
    """Values, and for torch gradients, against the reference; two runs, equal bits; returns the losses."""
    queries, bank = library(queries, dtypes[0]), library(bank, dtypes[1])
    options = {"scale": 20.0} | options
    weights = np.random.default_rng(1).random(len(targets)).astype(np.float32)
    expected, expected_gradient = reference.bank_cross_entropy(
        library.back(queries), library.back(bank), targets, gradients=weights, **options
    )
    runs = []
    for _ in range(2):
        if library.name.startswith("torch"):
            queries = queries.detach().requires_grad_()
        losses = ops.bank_cross_entropy(
            queries, bank, library(targets), **as_given(library, options)
        )
        runs.append([library.back(losses)])
        if library.name.startswith("torch"):
            (gradient,) = torch.autograd.grad(losses, queries, library(weights))
            assert gradient.dtype == queries.dtype
            runs[-1].append(library.back(gradient))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    assert runs[0][0].dtype == np.float32
    np.testing.assert_allclose(runs[0][0], expected, rtol=1e-5, atol=atol)
    if len(runs[0]) == 2 and len(targets):
        rtol = 1e-4 if dtypes[0] in (None, "float32") else 8e-3
        largest = np.abs(expected_gradient).max()
        np.testing.assert_allclose(
            runs[0][1], expected_gradient, rtol=0, atol=rtol * largest + 1e-6
        )
    return runs[0][0]


@pytest.fixture
def small_panels(monkeypatch):
    """256 rows a panel, 300 means at a time."""
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)
    monkeypatch.setattr(_panels, "_CUDA_SCORES", 1)
    monkeypatch.setattr(sys.modules["pyreid.ops.bank_cross_entropy"], "_MEANS", 300 * 9)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize(
    "batch, size, dim",
    [(0, 5, 8), (1, 1, 1), (7, 50, 64), (7, 50, 1), (3, 33, 2048), (64, 50, 5), (2, 700, 6)],
)
def test_matches_reference(library, reduce, batch, size, dim):
    *arrays, options = problem(batch, size, dim, reduce)
    check(library, *arrays, options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("batch, size, dim", [(7, 3000, 64), (64, 3000, 2048)])
def test_matches_reference_at_larger_sizes(reduce, batch, size, dim, smoothing, torch_cpu):
    *arrays, options = problem(batch, size, dim, reduce, distinct=300)
    check(torch_cpu, *arrays, options | {"label_smoothing": smoothing})


@pytest.mark.parametrize("reduce", REDUCE)
def test_panels_make_no_difference(torch_library, reduce, small_panels):
    for size in (256, 701):  # 300 means at a time, so that they are kept or made anew
        *arrays, options = problem(5, size, 9, reduce, distinct=400, unlabelled=0.05)
        check(torch_library, *arrays, options | {"label_smoothing": 0.2})


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(library, reduce, smoothing):
    *arrays, options = problem(7, 50, 16, reduce)
    check(library, *arrays, options | {"label_smoothing": smoothing})


@pytest.mark.parametrize("reduce", REDUCE)
def test_scale_of_100(library, reduce):
    queries, bank, targets, options = problem(7, 60, 32, reduce)
    queries[:3] = bank[5]  # logits of 100 and losses of nearly nothing or 100
    losses = check(library, queries, bank, targets, options | {"scale": 100.0}, atol=1e-4)
    assert np.isfinite(losses).all()
    check(library, 3 * queries, bank, targets, options | {"scale": 100.0}, atol=1e-4)


@pytest.mark.parametrize("reduce", REDUCE[1:])
def test_labels_of_every_kind(library, reduce):
    queries, bank, _, _ = problem(4, 50, 8)
    sparse = np.random.default_rng(0).choice([0, 7, 1_000_000, 2**31 - 2, -1, -5], 50)
    sparse[:4] = [7, 0, 2**31 - 2, 1_000_000]
    many = np.array([3] * 45 + [4, -1, 5, -1, 3])  # more rows than are added up at a time
    for labels, targets in [
        (sparse, sparse[:4]),
        (many, [3, 4, 5, 3]),
        (np.full(50, 9), [9] * 4),  # one label
        (np.arange(50)[::-1].copy(), [0, 49, 3, 20]),  # each its own
    ]:
        for dtype in (np.int64, np.int32):
            options = {"reduce": reduce, "labels": labels.astype(dtype)}
            check(library, queries, bank, np.array(targets, dtype), options)


def test_thousands_of_rows_of_one_label(torch_cpu):
    queries, bank, _, _ = problem(3, 12936, 16)
    labels = np.zeros(12936, np.int64)
    labels[5] = 1
    check(
        torch_cpu,
        queries,
        bank + 1,
        np.array([0, 1, 0]),
        {"reduce": "cluster_mean", "labels": labels},
    )


def test_duplicate_rows(library):
    queries, bank, targets, _ = problem(6, 40, 12)
    bank[20:] = bank[:20]
    check(library, queries, bank, targets, {})


@pytest.mark.parametrize("reduce", REDUCE)
def test_half_precision(library, reduce):
    queries, bank, targets, options = problem(5, 40, 24, reduce)
    for half in library.half_precisions:
        for dtypes in [(None, half), (half, None), (half, half)]:
            check(library, queries, bank, targets, options, dtypes=dtypes)
    check(
        library, queries[:, :23].copy(), bank[:, :23].copy(), targets, options, dtypes=(None, half)
    )


def test_kernels_agree_with_each_other_under_every_schedule(emulator):
    for reduce in REDUCE:
        queries, bank, targets, options = problem(3, 300, 6, reduce)
        results = []
        for schedule in _native.SCHEDULES:
            for seed in range(2):
                with _native.emulated(schedule, seed):
                    results.append(
                        ops.bank_cross_entropy(queries, bank, targets, scale=9.0, **options)
                    )
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("reduce", REDUCE)
def test_every_instruction_level(torch_cpu, reduce, monkeypatch):
    level = importlib.import_module("pyreid._cpu").get("instruction_level")
    for name in _build.CPU_VARIANTS:
        if not name.endswith(tuple(f"_v{above}" for above in range(level + 1, 9))):
            variant = importlib.import_module(f"pyreid.{name}")
            monkeypatch.setattr(_native, "cpu", lambda variant=variant: variant)
            for size in (16, 50, 3000):
                *arrays, options = problem(9, size, 33, reduce)
                check(torch_cpu, *arrays, options | {"label_smoothing": 0.1})


@pytest.fixture
def torch_cpu():
    from conftest import _make

    return _make("torch-cpu")


# --- properties -----------------------------------------------------------------------------------

SIZES = {"size": st.integers(1, 40), "dim": st.integers(1, 20), "seed": st.integers(0, 999)}


@given(reduce=st.sampled_from(REDUCE), smoothing=st.sampled_from([0.0, 0.3]), **SIZES)
def test_order_of_rows_makes_no_difference(reduce, smoothing, size, dim, seed):
    queries, bank, targets, options = problem(5, size, dim, reduce, seed=seed)
    losses = ops.bank_cross_entropy(
        queries, bank, targets, scale=20.0, label_smoothing=smoothing, **options
    )
    order = np.random.default_rng(seed).permutation(size)
    if reduce == "row":
        targets = np.argsort(order)[targets]
    else:
        options["labels"] = options["labels"][order]
    others = ops.bank_cross_entropy(
        queries, bank[order], targets, scale=20.0, label_smoothing=smoothing, **options
    )
    np.testing.assert_allclose(losses, others, rtol=0, atol=1e-5)


@given(reduce=st.sampled_from(REDUCE), scale=st.floats(0.1, 100), **SIZES)
def test_losses_are_not_negative(reduce, scale, size, dim, seed):
    queries, bank, targets, options = problem(5, size, dim, reduce, seed=seed)
    losses = ops.bank_cross_entropy(queries, bank, targets, scale=scale, **options)
    assert (losses >= (-1e-5 if reduce == "label_uniform" else 0)).all()


@given(**SIZES)
def test_a_label_per_row_is_a_row(size, dim, seed):
    queries, bank, targets, _ = problem(4, size, dim, seed=seed)
    by_row = ops.bank_cross_entropy(queries, bank, targets, scale=10.0)
    for reduce in REDUCE[1:]:
        by_label = ops.bank_cross_entropy(
            queries, bank, targets, scale=10.0, labels=np.arange(size), reduce=reduce
        )
        np.testing.assert_allclose(by_label, by_row, rtol=0, atol=1e-5)


def test_exponential_against_numpy():
    """A loss over two rows is log(1 + exp(-distance)): accurate over the whole range of exp."""
    distance = np.linspace(0, 100, 20_001, dtype=np.float32)
    queries = distance[:, None]
    bank = np.array([[1.0], [0.0]], np.float32)
    losses = ops.bank_cross_entropy(queries, bank, np.ones(len(queries), np.int64), scale=1.0)
    np.testing.assert_allclose(losses, np.logaddexp(0, np.float64(distance)), rtol=3e-7)
    losses = torch.tensor(queries, requires_grad=True)
    ops.bank_cross_entropy(
        losses, torch.tensor(bank), torch.zeros(len(queries), dtype=torch.int64), scale=1.0
    ).sum().backward()
    # The gradient is the softmax less the target: exp(-distance) / (1 + exp(-distance)), of row 1 alone.
    expected = -1 / (1 + np.exp(np.float64(distance)))
    np.testing.assert_allclose(losses.grad[:, 0], expected, rtol=0, atol=1.3e-7)


# --- losses of published systems ------------------------------------------------------------------


def against_formula(library, queries, loss, formula, *, tolerance=1e-5):
    """Value to `tolerance`, gradient to 1e-4 of its largest."""
    results = []
    for call in (loss, formula):
        leaf = library(queries).requires_grad_()
        value = call(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        results.append((value.detach(), gradient))
    (value, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    atol = max(1e-4, tolerance) * expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=atol)


def test_cluster_contrast(torch_library):
    queries, bank, targets, _ = (
        torch_library(x) if isinstance(x, np.ndarray) else x for x in problem(16, 30, 64)
    )

    def loss(inputs):
        normalized = functional.normalize(inputs)
        return ops.bank_cross_entropy(normalized, bank, targets, scale=1 / 0.05).mean()

    def formula(inputs):
        return functional.cross_entropy(functional.normalize(inputs) @ bank.T / 0.05, targets)

    against_formula(torch_library, torch_library.back(3 * queries), loss, formula)


def test_ice_camera_agnostic(torch_library):
    raw, centroids, targets, _ = problem(8, 30, 64)
    centroids, targets = torch_library(centroids), torch_library(targets)

    def loss(inputs):
        return ops.bank_cross_entropy(
            inputs, centroids, targets, scale=2.0, label_smoothing=0.1
        ).mean()

    def formula(inputs):  # CrossEntropyLabelSmooth
        log_probabilities = functional.log_softmax(inputs @ centroids.T / 0.5, dim=1)
        smooth = torch.zeros_like(log_probabilities).scatter_(1, targets[:, None], 1)
        smooth = 0.9 * smooth + 0.1 / centroids.shape[0]
        return (-smooth * log_probabilities).mean(0).sum()

    def of_torch(inputs):
        return functional.cross_entropy(inputs @ centroids.T / 0.5, targets, label_smoothing=0.1)

    against_formula(torch_library, 5 * raw, loss, formula)
    against_formula(torch_library, 5 * raw, loss, of_torch)


def spcl_formula(inputs, features, labels, targets, *, epsilon=1e-6):
    """HybridMemory.forward: masked softmax of the mean similarity per label, as released."""
    logits = (inputs @ features.T / 0.05).T  # (N, B)
    sums = torch.zeros(int(labels.max()) + 1, logits.shape[1], device=logits.device)
    sums.index_add_(0, labels, logits)
    counts = torch.zeros(len(sums), 1, device=logits.device)
    counts.index_add_(0, labels, torch.ones(len(labels), 1, device=logits.device))
    mask = (counts > 0).float()
    exponentials = torch.exp(sums / (mask * counts + (1 - mask))) * mask
    probabilities = exponentials / (exponentials.sum(dim=0, keepdim=True) + epsilon)
    return functional.nll_loss(torch.log(probabilities + epsilon).T, targets)


def test_spcl(torch_library):
    queries, bank, targets, options = problem(8, 60, 32, "cluster_mean", distinct=12, unlabelled=0)
    labels = options["labels"]
    labels[labels == 5] = 6  # a label that no row has
    targets[targets == 5] = 6
    bank, labels, targets = (torch_library(x) for x in (bank, labels, targets))

    def loss(inputs):
        return ops.bank_cross_entropy(
            inputs, bank, targets, scale=1 / 0.05, labels=labels, reduce="cluster_mean"
        ).mean()

    def released(inputs):
        return spcl_formula(inputs, bank, labels, targets)

    def exact(inputs):
        return spcl_formula(inputs, bank, labels, targets, epsilon=1e-30)

    against_formula(torch_library, queries, loss, exact)
    against_formula(torch_library, queries, loss, released, tolerance=1e-2)


def test_jvtc_global(torch_library):
    queries, bank, targets, options = problem(8, 60, 32, "label_uniform")
    bank, labels, targets = (torch_library(x) for x in (bank, options["labels"], targets))

    def loss(inputs):
        return ops.bank_cross_entropy(
            inputs, bank, targets, scale=1 / 0.05, labels=labels, reduce="label_uniform"
        ).mean()

    def formula(inputs):
        log_probabilities = functional.log_softmax(inputs @ bank.T / 0.05, dim=1)
        multi = (targets[:, None] == labels).float()
        return -(multi / multi.sum(dim=1, keepdim=True) * log_probabilities).sum(dim=1).mean()

    against_formula(torch_library, queries, loss, formula)


@pytest.mark.parametrize("reduce", REDUCE)
def test_gradient_of_the_reference(reduce):
    queries, bank, targets, options = problem(3, 12, 5, reduce)
    options |= {"scale": 5.0, "label_smoothing": 0.1}
    _, gradient = reference.bank_cross_entropy(
        queries, bank, targets, gradients=np.ones(3), **options
    )
    step = 1e-5
    for i, d in np.ndindex(queries.shape):
        moved = np.float64(queries)
        moved[i, d] += step
        above = reference.bank_cross_entropy(moved, bank, targets, **options).sum()
        moved[i, d] -= 2 * step
        below = reference.bank_cross_entropy(moved, bank, targets, **options).sum()
        assert abs((above - below) / (2 * step) - gradient[i, d]) < 1e-7


# --- arguments ------------------------------------------------------------------------------------


def call(library, kind="row", **changes):
    queries, bank, targets, options = problem(4, 6, 8, kind)
    arguments = {"queries": library(queries), "bank": library(bank), "targets": library(targets)}
    arguments |= {"scale": 10.0} | as_given(library, options) | changes
    with pytest.raises(ValueError) as error:
        ops.bank_cross_entropy(**arguments)
    return str(error.value)


def test_wrong_arguments(library):
    def f32(*shape):
        return library(np.zeros(shape, np.float32))

    ids = library(np.zeros(6, np.int64))
    cases = [
        ({"queries": f32(4)}, "queries must have shape (any, any), got (4,)"),
        (
            {"queries": [[0.0] * 8] * 4},
            "queries must be an array of torch, CuPy or NumPy, got list",
        ),
        ({"bank": f32(6, 7)}, "bank must have shape (any, 8), got (6, 7)"),
        (
            {"bank": f32(0, 8)},
            "bank must have 1 to 2**30 rows and fewer than 2**31 columns, got 0 x 8",
        ),
        (
            {"bank": library(np.zeros((6, 8)))},
            "bank must be float32, float16 or bfloat16, got float64",
        ),
        ({"bank": f32(8, 6).T}, "bank must be C-contiguous, got a strided view of shape (6, 8)"),
        ({"targets": ids}, "targets must have shape (4,), got (6,)"),
        ({"targets": f32(4)}, "targets must be int64 or int32, got float32"),
        ({"scale": "1"}, "scale must be a positive, finite number, got '1'"),
        ({"scale": 0}, "scale must be a positive, finite number, got 0"),
        ({"scale": float("inf")}, "scale must be a positive, finite number, got inf"),
        ({"scale": float("nan")}, "scale must be a positive, finite number, got nan"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie in [0, 1], got 1.5"),
        ({"label_smoothing": None}, "label_smoothing must be a number, got None"),
        ({"labels": ids}, "labels must be None where reduce is 'row', got labels"),
        ({"reduce": "x"}, "reduce must be 'row', 'cluster_mean' or 'label_uniform', got 'x'"),
        (
            {"reduce": "cluster_mean"},
            "labels must be given where reduce is 'cluster_mean', got None",
        ),
        (
            {"reduce": "label_uniform", "labels": library(np.zeros(4, np.int64))},
            "labels must have shape (6,), got (4,)",
        ),
    ]
    for changes, message in cases:
        assert call(library, **changes) == f"bank_cross_entropy: {message}"


@pytest.mark.parametrize("reduce", REDUCE)
def test_target_that_is_not_there(library, reduce):
    queries, bank, targets, options = problem(4, 6, 8, reduce)
    rule = "lie in [0, 6)" if reduce == "row" else "be labels that a row of the bank has"
    for bad in (6, -1, 2**40):
        wrong = targets.copy()
        wrong[2] = bad
        message = f"bank_cross_entropy: targets must {rule}, got {bad}"
        if library.floor == "cpu":
            assert call(library, reduce, targets=library(wrong)) == f"{message} at position 2"
            continue
        losses = library.back(
            ops.bank_cross_entropy(
                library(queries),
                library(bank),
                library(wrong),
                scale=10.0,
                **as_given(library, options),
            )
        )
        expected = reference.bank_cross_entropy(queries, bank, targets, scale=10.0, **options)
        expected[2] = 0
        np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
        if library.floor == "cuda":
            with debug():
                assert call(library, reduce, targets=library(wrong)).startswith(message)


def test_no_label_at_all(library):
    labels, targets = library(np.full(6, -1)), library(np.zeros(4, np.int64))
    for reduce in REDUCE[1:]:
        if library.floor == "cpu":
            assert call(library, reduce, labels=labels, targets=targets) == (
                "bank_cross_entropy: targets must be labels that a row of the bank has, got 0 at position 0"
            )
        else:
            queries, bank, _, _ = problem(4, 6, 8)
            losses = ops.bank_cross_entropy(
                library(queries), library(bank), targets, scale=2.0, labels=labels, reduce=reduce
            )
            np.testing.assert_array_equal(library.back(losses), np.zeros(4))


def test_label_too_large():
    for bad in (2**31 - 1, 2**40):
        labels = np.array([0, 0, bad, 0, 0, 0])
        with pytest.raises(
            ValueError, match=rf"labels must be less than .*, got {bad} at position 2"
        ):
            ops.bank_cross_entropy(
                np.ones((1, 8), np.float32),
                np.ones((6, 8), np.float32),
                np.zeros(1, np.int64),
                scale=1.0,
                labels=labels,
                reduce="cluster_mean",
            )


def test_missing_target_has_no_gradient():
    if importlib.util.find_spec("pyreid._emulated") is None:
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    with _native.emulated():
        for reduce in REDUCE:
            queries, bank, targets, options = problem(4, 6, 8, reduce)
            targets[2] = 77
            leaf = torch.tensor(queries, requires_grad=True)
            options = {k: torch.tensor(v) if k == "labels" else v for k, v in options.items()}
            ops.bank_cross_entropy(
                leaf,
                torch.tensor(bank),
                torch.tensor(targets),
                scale=9.0,
                label_smoothing=0.1,
                **options,
            ).sum().backward()
            assert not leaf.grad[2].any()
            assert leaf.grad[[0, 1, 3]].any(dim=1).all()


def test_two_libraries_in_one_call():
    queries, bank, targets, _ = problem(4, 6, 8)
    with pytest.raises(
        ValueError, match="bank must be of one library and on one device with queries"
    ):
        ops.bank_cross_entropy(queries, torch.from_numpy(bank), targets, scale=1.0)


# --- torch ----------------------------------------------------------------------------------------


def tensors(library, reduce, *, batch=5, size=40, dim=8):
    *arrays, options = problem(batch, size, dim, reduce)
    return *(library(x) for x in arrays), as_given(library, options)


def test_bank_that_requires_gradients(torch_library):
    queries, bank, targets, _ = tensors(torch_library, "row")
    bank.requires_grad_()
    with pytest.raises(ValueError, match="bank must not require gradients, got requires_grad=True"):
        ops.bank_cross_entropy(queries, bank, targets, scale=1.0)
    with torch.no_grad():
        ops.bank_cross_entropy(queries, bank, targets, scale=1.0)


@pytest.mark.parametrize("reduce", REDUCE)
def test_bank_that_changes_before_backward(torch_library, reduce):
    queries, bank, targets, options = tensors(torch_library, reduce)
    leaf = queries.requires_grad_()
    losses = [ops.bank_cross_entropy(leaf, bank, targets, scale=1.0, **options) for _ in range(2)]
    (expected,) = torch.autograd.grad(losses[0].sum(), leaf)
    bank.fill_(7.0)
    (gradient,) = torch.autograd.grad(losses[1].sum(), leaf)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("reduce", REDUCE)
def test_compiles_without_a_graph_break(torch_library, reduce):
    queries, bank, targets, options = tensors(torch_library, reduce)

    def step(queries, bank, targets):
        losses = ops.bank_cross_entropy(
            2 * queries, bank, targets, scale=8.0, label_smoothing=0.1, **options
        )
        return (losses * losses).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = queries.clone().requires_grad_()
        value = function(leaf, bank, targets)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("reduce", REDUCE)
def test_operator_registration(torch_library, reduce):
    queries, bank, targets, options = tensors(torch_library, reduce)
    for wanted in (True, False):
        leaf = queries.clone().requires_grad_(wanted)
        arguments = (leaf, bank, targets, options.get("labels"), 4.0, reduce, 0.1, wanted)
        torch.library.opcheck(torch.ops.pyreid.bank_cross_entropy.default, arguments)


@pytest.mark.parametrize("half_bank", [False, True])
def test_autocast(torch_library, half_bank):
    queries, bank, targets, options = tensors(torch_library, "cluster_mean")
    weight = torch.eye(8, device=bank.device, requires_grad=True)
    bank = bank.bfloat16() if half_bank else bank
    results = []
    for enabled in (True, False):
        with torch.autocast(bank.device.type, torch.bfloat16, enabled=enabled):
            features = queries @ weight
            assert features.dtype == (torch.bfloat16 if enabled else torch.float32)
            features = features.bfloat16().float() if not enabled else features
            losses = ops.bank_cross_entropy(features, bank, targets, scale=20.0, **options)
        assert losses.dtype == torch.float32
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), weight)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1].float(), results[1][1], rtol=0.02, atol=0.05)


def test_products_are_exact_whatever_torch_is_set_to(torch_library):
    queries, bank, targets, options = tensors(torch_library, "row")
    expected = ops.bank_cross_entropy(queries, bank, targets, scale=20.0, **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = ops.bank_cross_entropy(queries, bank, targets, scale=20.0, **options)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(result, expected)


def test_captured_by_a_cuda_graph(cuda):
    from conftest import _make

    library = _make("torch-cuda")
    for reduce in REDUCE:
        queries, bank, targets, options = tensors(library, reduce)
        leaf = queries.clone().requires_grad_()

        def step(leaf=leaf, bank=bank, targets=targets, options=options):
            losses = ops.bank_cross_entropy(leaf, bank, targets, scale=5.0, **options)
            return losses, *torch.autograd.grad(losses.sum(), leaf)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = [x.clone() for x in step()]
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        torch.testing.assert_close(captured, tuple(expected), rtol=0, atol=0)
