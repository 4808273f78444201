import importlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreid import _native, debug, ops, reference

# The module, which its function hides: NumPy and CuPy arrays reach backward through it alone.
contrast = importlib.import_module("pyreid.ops.set_contrast")


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def problem(batch, positives, negatives, dim, *, size=40, sets=None, pads=0.2, seed=0):
    """Queries, bank of unit rows, and two lists of rows with repeats and pads."""
    rng = np.random.default_rng(seed)
    shape = (batch, dim) if sets is None else (sets, batch, dim)
    lists = [rng.integers(0, size, (batch, length)) for length in (positives, negatives)]
    for rows in lists:
        rows[rng.random(rows.shape) < pads] = -1
    return unit(rng, *shape), unit(rng, size, dim), *lists


def loss_and_gradient(library, queries, bank, positives, negatives, grad_loss, **options):
    """As NumPy: by autograd for torch, by the functions underneath for others."""
    if library.name.startswith("torch"):
        queries = queries.requires_grad_()
        loss = ops.set_contrast(queries, bank, positives, negatives, **options)
        loss.backward(grad_loss)
        return library.back(loss), library.back(queries.grad)
    options = {"weights": None, "denominator": "joint"} | options
    arguments = [options[name] for name in ("weights", "scale", "denominator")]
    loss, slopes = contrast._forward(queries, bank, positives, negatives, *arguments)
    grad = contrast._gradient(grad_loss, slopes, bank, positives, negatives)
    return library.back(loss), library.back(grad)


def check(
    library, queries, bank, positives, negatives=None, *, weights=None, scale=10.0, **options
):
    """Op against reference, in value and gradient; two runs, equal bits; returns the loss as NumPy."""
    given = {} if weights is None else {"weights": weights}
    expected = reference.set_contrast(
        queries, bank, positives, negatives, scale=scale, **given, **options
    )
    expected_grad = reference.set_contrast_gradient(
        queries, bank, positives, negatives, scale=scale, **given, **options
    )
    grad_loss = np.random.default_rng(9).standard_normal(expected.shape).astype(np.float32)
    runs = []
    for _ in range(2):
        arrays = [None if x is None else library(x) for x in (queries, bank, positives, negatives)]
        loose = {name: library(x) for name, x in given.items()}
        runs.append(
            loss_and_gradient(library, *arrays, library(grad_loss), scale=scale, **loose, **options)
        )
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)
    loss, grad = runs[0]
    # Scores of unit rows reach `scale`, and are rounded there.
    total = 1 if weights is None else max(1, np.abs(weights).sum())
    assert_close(loss, expected, 1e-5, total * max(1, scale / 10))
    assert_close(grad, grad_loss[..., None] * expected_grad, 1e-4, total * scale / 10)
    return loss


def assert_close(result, expected, tolerance, magnitude=1.0):
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * magnitude)


@pytest.mark.parametrize("denominator", ["joint", "own"])
@pytest.mark.parametrize(
    "batch, positives, negatives, dim, sets",
    [
        (0, 3, 5, 8, None),
        (0, 3, 5, 8, 2),
        (7, 0, 0, 8, None),
        (7, 0, 50, 8, None),
        (7, 8, 0, 64, 2),
        (1, 1, 1, 1, None),
        (7, 8, 50, 257, 3),
        (2, 1, 700, 64, None),
        (3, 8, 50, 2048, 2),
        (1, 2, 700, 257, 1),
        (5, 3, 4, 0, None),
        (7, 1, 50, 64, 0),
        (64, 8, 5, 16, None),
    ],
)
def test_matches_reference(library, denominator, batch, positives, negatives, dim, sets):
    arguments = problem(batch, positives, negatives, dim, sets=sets)
    loss = check(library, *arguments, denominator=denominator)
    lists = arguments[2]
    np.testing.assert_array_equal(loss[..., (lists < 0).all(axis=1)], 0)


@pytest.mark.parametrize("denominator", ["joint", "own"])
@pytest.mark.parametrize("batch, positives, negatives, dim", [(64, 8, 700, 2048), (64, 8, 50, 257)])
@pytest.mark.parametrize("sets", [None, 2])
def test_large_on_the_cpu(denominator, batch, positives, negatives, dim, sets):
    queries, bank, *lists = problem(batch, positives, negatives, dim, sets=sets, size=300)
    queries, bank = (torch.from_numpy(x) for x in (queries, bank))
    lists = [torch.from_numpy(x) for x in lists]
    queries.requires_grad_()
    loss = ops.set_contrast(queries, bank, *lists, scale=20.0, denominator=denominator)
    loss.sum().backward()
    exact = queries.detach().double().requires_grad_()
    expected = formula(exact, bank.double(), *lists, None, 20.0, denominator)
    expected.sum().backward()
    assert_close(loss.detach().numpy(), expected.detach().numpy(), 1e-5)
    assert_close(queries.grad.numpy(), exact.grad.numpy(), 1e-4)


def test_long_lists_are_split(library):
    # Enough candidates for several parts of the gradient, which a last kernel adds up.
    check(library, *problem(1, 2, 1600, 12), denominator="own")
    check(library, *problem(1, 2, 1300, 5, sets=2))


@pytest.mark.parametrize("denominator", ["joint", "own"])
@pytest.mark.parametrize("shape", [(3,), (6, 3)])
def test_weights(library, denominator, shape):
    weights = np.random.default_rng(3).random(shape).astype(np.float32)
    weights[..., 1] = 0
    check(library, *problem(6, 3, 9, 20, sets=2), weights=weights, denominator=denominator)


@pytest.mark.parametrize("denominator", ["joint", "own"])
def test_pads_and_repeats(library, denominator):
    queries, bank, positives, negatives = problem(5, 4, 6, 24, pads=0)
    positives[0] = negatives[0] = -1  # nothing at all
    positives[1] = -1  # negatives only
    negatives[2] = -1  # positives only
    positives[3], negatives[3] = 7, 7  # one row, everywhere
    positives[4] = (-1, 2, -1, 2)
    loss = check(library, queries, bank, positives, negatives, denominator=denominator)
    np.testing.assert_array_equal(loss[:2], 0)
    if denominator == "own":
        assert loss[2] == 0


def test_empty_bank(library):
    queries, bank, positives, negatives = problem(3, 2, 5, 24, pads=1.0)
    loss = check(library, queries, bank[:0], positives, negatives)
    np.testing.assert_array_equal(loss, 0)


@pytest.mark.parametrize("denominator", ["joint", "own"])
@pytest.mark.parametrize("scale", [0.01, 100.0, 1e4])
def test_scales(library, denominator, scale):
    queries, bank, positives, negatives = problem(6, 3, 30, 32)
    queries[0], positives[0, 0] = bank[5], 5
    queries[1], positives[1, 0], negatives[1, 0] = -bank[5], 5, 6
    check(library, queries, bank, positives, negatives, scale=scale, denominator=denominator)


def test_32_bit_ids(library):
    queries, bank, positives, negatives = problem(6, 3, 30, 32)
    check(library, queries, bank, positives.astype(np.int32), negatives)
    check(library, queries, bank, positives, negatives.astype(np.int32))


@pytest.mark.parametrize("dim", [64, 33])
def test_half_precision(library, dim):
    queries, bank, positives, negatives = problem(6, 3, 30, dim, sets=2)
    grad_loss = np.ones(queries.shape[:2], np.float32)
    for half in library.half_precisions:
        for query_dtype, bank_dtype in [("float32", half), (half, "float32"), (half, half)]:
            arrays = library(queries, query_dtype), library(bank, bank_dtype)
            rounded = [library.back(x).astype(np.float64) for x in arrays]
            lists = positives, negatives
            loss, grad = loss_and_gradient(
                library, *arrays, *(library(x) for x in lists), library(grad_loss), scale=10.0
            )
            assert_close(loss, reference.set_contrast(*rounded, *lists, scale=10.0), 1e-5)
            is_torch = library.name.startswith("torch")
            tolerance = 1e-4 if query_dtype == "float32" or not is_torch else 1e-2
            expected = reference.set_contrast_gradient(*rounded, *lists, scale=10.0)
            assert_close(grad, expected, tolerance, 5)


# --- the written formula, and the losses of the papers ----------------------------------------------


def formula(queries, bank, positives, negatives, weights, scale, denominator):
    """Dense, by torch, whatever is gathered held at once."""
    if negatives is None:
        negatives = positives[:, :0]

    def scores(rows):
        chosen = scale * torch.einsum("...bd,bkd->...bk", queries, bank[rows.clamp_min(0)])
        return chosen.masked_fill(rows < 0, -1e30)

    present = positives >= 0
    if weights is None:
        weights = 1 / present.sum(1, keepdim=True).clamp_min(1).to(queries.dtype)
    pos, neg = scores(positives), scores(negatives)
    if denominator == "joint":
        lse = torch.logsumexp(torch.cat([pos, neg], -1), -1, keepdim=True)
    else:
        lse = torch.logsumexp(
            torch.cat([pos[..., None], neg[..., None, :].expand(*pos.shape, -1)], -1), -1
        )
    return torch.where(present, weights * (lse - pos), 0).sum(-1)


class Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, arguments, options):
        ctx.grad = reference.set_contrast_gradient(queries.detach().numpy(), *arguments, **options)
        return torch.from_numpy(
            reference.set_contrast(queries.detach().numpy(), *arguments, **options)
        )

    @staticmethod
    def backward(ctx, grad_loss):
        return grad_loss[..., None] * torch.from_numpy(ctx.grad), None, None


@pytest.mark.parametrize("denominator", ["joint", "own"])
def test_reference_is_the_formula_and_its_derivative(denominator):
    queries, bank, positives, negatives = problem(5, 3, 6, 7, sets=2)
    weights = np.random.default_rng(1).random((5, 3))
    options = {"weights": weights, "scale": 5.0, "denominator": denominator}
    exact = torch.from_numpy(queries).double().requires_grad_()
    arguments = (bank, positives, negatives)
    assert torch.autograd.gradcheck(lambda q: Reference.apply(q, arguments, options), (exact,))
    tensors = [torch.from_numpy(x) for x in (bank.astype(np.float64), *arguments[1:], weights)]
    expected = formula(exact, *tensors, 5.0, denominator)
    np.testing.assert_allclose(
        expected.detach(), reference.set_contrast(queries, *arguments, **options), rtol=1e-10
    )


def compare(library, ours, theirs, *queries, atol=1e-5):
    """Two losses of the same queries, theirs in float64, equal in value and gradient."""
    given = [library(q).requires_grad_() for q in queries]
    loss = ours(*given)
    loss.backward()
    exact = [torch.from_numpy(q).double().requires_grad_() for q in queries]
    expected = theirs(*exact)
    expected.backward()
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-5, atol=atol)
    for a, b in zip(given, exact, strict=True):
        assert_close(library.back(a.grad), b.grad.numpy(), 1e-4, 0.1)


def test_selective_contrastive_loss(torch_library):
    # Tang and others, SCL: one cross-entropy for each of the anchor's own row (weight 0.5) and its seven
    # neighbours (1.75 * 0.5 / 7 each), all positives and negatives in the denominator; global and local
    # branch, whose norms are 1 and sqrt(8), over the same lists.
    self_weight, alpha, neighbours, local_weight, scale = 0.5, 1.75, 7, 0.3, 10.0
    rng = np.random.default_rng(0)
    bank, features, local = (
        unit(rng, 60, 64),
        unit(rng, 6, 64),
        unit(rng, 6, 64) * np.float32(8**0.5),
    )
    order = rng.permuted(np.tile(np.arange(60), (6, 1)), axis=1)
    positives, negatives = order[:, :8].copy(), order[:, 8:38].copy()
    weights = np.full(8, alpha * (1 - self_weight) / neighbours, np.float32)
    weights[0] = self_weight

    def ours(features, local):
        branches = ops.set_contrast(
            torch.stack([features, local]),
            torch_library(bank),
            torch_library(positives),
            torch_library(negatives),
            weights=torch_library(weights),
            scale=scale,
        )
        return branches[0].mean() + local_weight * branches[1].mean()

    def branch(queries):
        candidates = torch.from_numpy(bank).double()[np.hstack([positives, negatives])]
        logits = scale * torch.einsum("bd,bad->ba", queries, candidates)
        terms = [
            float(weight) * torch.nn.functional.cross_entropy(logits, torch.full((6,), j))
            for j, weight in enumerate(weights)
        ]
        return sum(terms)

    compare(torch_library, ours, lambda g, p: branch(g) + local_weight * branch(p), features, local)


def test_camera_proxy_loss(torch_library):
    # Chen and others, ICE: all proxies of a sample's label are positive, the 50 most similar others
    # negative; half the mean of each camera's samples, added up.
    rng = np.random.default_rng(0)
    proxies, features = unit(rng, 90, 32), unit(rng, 12, 32)
    proxy_labels = np.sort(rng.integers(0, 25, 90))
    labels, cameras = rng.choice(proxy_labels, 12), rng.integers(0, 3, 12)
    lists = []
    for feature, label in zip(features, labels, strict=True):
        similarity = np.where(proxy_labels == label, -np.inf, proxies @ feature)
        lists.append((np.flatnonzero(proxy_labels == label), np.argsort(-similarity)[:50]))
    positives = np.full((12, max(len(p) for p, _ in lists)), -1)
    for row, (chosen, _) in zip(positives, lists, strict=True):
        row[: len(chosen)] = chosen
    negatives = np.stack([hardest for _, hardest in lists])
    share = 0.5 / np.bincount(cameras)[cameras]

    def ours(features):
        loss = ops.set_contrast(
            features,
            torch_library(proxies),
            torch_library(positives),
            torch_library(negatives),
            scale=1 / 0.07,
        )
        return (torch_library(share.astype(np.float32)) * loss).sum()

    def theirs(features):
        bank, total = torch.from_numpy(proxies).double(), 0
        for camera in np.unique(cameras):
            of_camera = np.flatnonzero(cameras == camera)
            for i in of_camera:
                chosen, hardest = lists[i]
                scores = torch.cat([bank[chosen], bank[hardest]]) @ features[i] / 0.07
                target = torch.zeros(len(scores), dtype=torch.float64)
                target[: len(chosen)] = 1 / len(chosen)
                loss = -(torch.log_softmax(scores, 0) * target).sum()
                total = total + 0.5 * loss / len(of_camera)
        return total

    compare(torch_library, ours, theirs, features)


def test_generative_contrastive_loss(torch_library):
    # Chen and others, GCL: the generated view against its own row and one of its label, each with a
    # softmax of its own over the same negatives.
    rng = np.random.default_rng(0)
    bank, generated = unit(rng, 80, 32), unit(rng, 5, 32)
    own, same = rng.integers(0, 80, (2, 5))
    negatives = rng.permuted(np.tile(np.arange(80), (5, 1)), axis=1)[:, :40].copy()

    def ours(generated):
        return ops.set_contrast(
            generated,
            torch_library(bank),
            torch_library(np.stack([own, same], 1)),
            torch_library(negatives),
            weights=torch_library(np.ones(2, np.float32)),
            scale=1 / 0.04,
            denominator="own",
        ).mean()

    def theirs(generated):
        rows = torch.from_numpy(bank).double()
        others = torch.einsum("bd,bkd->bk", generated, rows[negatives])
        terms = []
        for positive in (own, same):
            score = (generated * rows[positive]).sum(1, keepdim=True)
            logits = torch.cat([score, others], 1) / 0.04
            terms.append(
                torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
            )
        return sum(terms)

    compare(torch_library, ours, theirs, generated)


# --- properties -------------------------------------------------------------------------------------

sizes = {
    "batch": st.integers(1, 6),
    "positives": st.integers(0, 5),
    "negatives": st.integers(0, 40),
    "dim": st.integers(1, 40),
    "seed": st.integers(0, 999),
}


@given(**sizes, denominator=st.sampled_from(["joint", "own"]))
def test_order_of_negatives_does_not_matter(batch, positives, negatives, dim, seed, denominator):
    queries, bank, chosen, others = problem(batch, positives, negatives, dim, seed=seed)
    shuffled = np.random.default_rng(seed).permuted(others, axis=1)
    losses = [
        ops.set_contrast(queries, bank, chosen, rows, scale=10.0, denominator=denominator)
        for rows in (others, shuffled)
    ]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


@given(**sizes, denominator=st.sampled_from(["joint", "own"]))
def test_pads_change_nothing(batch, positives, negatives, dim, seed, denominator):
    queries, bank, *lists = problem(batch, positives, negatives, dim, seed=seed)
    padded = [np.insert(rows, rows.shape[1] // 2, -1, axis=1) for rows in lists]
    losses = [
        ops.set_contrast(queries, bank, *rows, scale=10.0, denominator=denominator)
        for rows in (lists, padded)
    ]
    np.testing.assert_array_equal(*losses)


@given(**sizes)
def test_joint_is_not_below_own(batch, positives, negatives, dim, seed):
    arguments = problem(batch, positives, negatives, dim, seed=seed)
    joint = ops.set_contrast(*arguments, scale=10.0)
    own = ops.set_contrast(*arguments, scale=10.0, denominator="own")
    assert (joint >= own - 1e-5).all()
    assert (own >= 0).all()


def test_kernels_agree_with_each_other_under_every_schedule(emulator):
    arguments = problem(4, 3, 70, 40, sets=2)
    grad_loss = np.ones((2, 4), np.float32)
    results = []
    for schedule in _native.SCHEDULES:
        for seed in range(3):
            with _native.emulated(schedule, seed):
                loss, slopes = contrast._forward(*arguments, None, 10.0, "joint")
                grad = contrast._gradient(grad_loss, slopes, *arguments[1:])
                results.append((loss, slopes, grad))
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(first, other)


# --- arguments --------------------------------------------------------------------------------------


def call(library, **changes):
    queries, bank, positives, negatives = (library(x) for x in problem(4, 2, 3, 8, size=6))
    arguments = {"queries": queries, "bank": bank, "positives": positives, "negatives": negatives}
    arguments |= {"scale": 10.0} | changes
    with pytest.raises(ValueError) as error:
        ops.set_contrast(**arguments)
    return str(error.value)


def test_wrong_arguments(library):
    def f32(*shape):
        return library(np.zeros(shape, np.float32))

    def ids(*shape):
        return library(np.zeros(shape, np.int64))

    cases = [
        ({"queries": f32(8)}, "queries must have shape (any, any) or (any, any, any), got (8,)"),
        (
            {"queries": library(np.zeros((4, 8)))},
            "queries must be float32, float16 or bfloat16, got float64",
        ),
        (
            {"queries": [[0.0] * 8] * 4},
            "queries must be an array of torch, CuPy or NumPy, got list",
        ),
        (
            {"queries": f32(4, 16)[:, ::2]},
            "queries must be C-contiguous, got a strided view of shape (4, 8)",
        ),
        ({"bank": f32(6, 7)}, "bank must have shape (any, 8), got (6, 7)"),
        ({"bank": [[0.0] * 8] * 6}, "bank must be an array of torch, CuPy or NumPy, got list"),
        (
            {"bank": f32(8, 6).T},
            "bank must be C-contiguous, got a strided view of shape (6, 8)",
        ),
        ({"positives": ids(3, 2)}, "positives must have shape (4, any), got (3, 2)"),
        ({"positives": ids(4)}, "positives must have shape (4, any), got (4,)"),
        ({"positives": f32(4, 2)}, "positives must be int64 or int32, got float32"),
        ({"positives": None}, "positives must be an array of torch, CuPy or NumPy, got NoneType"),
        ({"negatives": ids(3, 2)}, "negatives must have shape (4, any), got (3, 2)"),
        ({"negatives": f32(4, 2)}, "negatives must be int64 or int32, got float32"),
        ({"weights": f32(3)}, "weights must have shape (2,) or (4, 2), got (3,)"),
        ({"weights": ids(2)}, "weights must be float32, got int64"),
        ({"weights": 0.5}, "weights must be an array of torch, CuPy or NumPy, got float"),
        ({"scale": 0.0}, "scale must be a positive, finite number, got 0.0"),
        ({"scale": float("inf")}, "scale must be a positive, finite number, got inf"),
        ({"scale": float("nan")}, "scale must be a positive, finite number, got nan"),
        ({"scale": "10"}, "scale must be a positive, finite number, got '10'"),
        ({"denominator": "all"}, "denominator must be 'joint' or 'own', got 'all'"),
    ]
    for changes, message in cases:
        assert call(library, **changes) == f"set_contrast: {message}"


@pytest.mark.parametrize("name", ["positives", "negatives"])
def test_row_out_of_range(library, name):
    queries, bank, *lists = problem(4, 2, 3, 8, size=6, pads=0)
    rows = dict(zip(("positives", "negatives"), lists, strict=True))
    for bad in (6, -2, 2**40):
        rows[name][2, 1] = bad
        given = {key: library(value) for key, value in rows.items()}
        if library.floor == "cpu":
            message = f"{name} must lie in [-1, 6), got {bad} at position (2, 1)"
            assert call(library, **given) == f"set_contrast: {message}"
            continue
        pads = rows | {name: np.where(rows[name] == bad, -1, rows[name])}
        result = ops.set_contrast(library(queries), library(bank), **given, scale=10.0)
        expected = reference.set_contrast(queries, bank, **pads, scale=10.0)
        assert_close(library.back(result), expected, 1e-5)
        if library.floor == "cuda":
            with debug():
                message = f"{name} must lie in [-1, 6), got {bad}"
                assert call(library, **given) == f"set_contrast: {message}"


def test_two_libraries_in_one_call():
    queries, bank, positives, negatives = problem(4, 2, 3, 8)
    with pytest.raises(ValueError) as error:
        ops.set_contrast(queries, bank, torch.from_numpy(positives), negatives, scale=10.0)
    assert str(error.value) == (
        "set_contrast: positives must be of one library and on one device with queries (numpy on cpu), "
        "got torch on cpu"
    )


# --- torch ------------------------------------------------------------------------------------------


def tensors(library, *shape, **options):
    queries, *rest = (library(x) for x in problem(*shape, **options))
    return [queries.requires_grad_(), *rest]


def test_only_queries_get_a_gradient(torch_library):
    queries, bank, *lists = tensors(torch_library, 4, 2, 3, 8)
    bank = torch.nn.Parameter(bank)
    loss = ops.set_contrast(queries, bank, *lists, scale=10.0)
    loss.sum().backward()
    assert queries.grad is not None
    assert bank.grad is None
    with torch.no_grad():
        assert not ops.set_contrast(queries, bank, *lists, scale=10.0).requires_grad


def test_autograd_notices_a_bank_that_was_updated(torch_library):
    queries, bank, *lists = tensors(torch_library, 4, 2, 3, 8)
    loss = ops.set_contrast(queries, bank, *lists, scale=10.0)
    ops.memory_update_(bank, queries.detach(), lists[0][:, 0].clamp_min(0), momentum=0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("denominator", ["joint", "own"])
def test_compiles_without_a_graph_break(torch_library, denominator):
    queries, bank, *lists = tensors(torch_library, 4, 2, 3, 8, sets=2)
    weights = torch.rand(2, device=bank.device)

    def step(queries, bank, positives, negatives, weights):
        loss = ops.set_contrast(
            queries * 2,
            bank,
            positives,
            negatives,
            weights=weights,
            scale=10.0,
            denominator=denominator,
        )
        return loss.square().sum()

    expected = step(queries, bank, *lists, weights)
    (expected_grad,) = torch.autograd.grad(expected, queries)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(queries, bank, *lists, weights)
    (grad,) = torch.autograd.grad(loss, queries)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(
    "query_dtype, bank_dtype", [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_autocast(torch_library, query_dtype, bank_dtype):
    queries, bank, positives, negatives = problem(4, 2, 3, 8)
    queries = torch_library(queries, query_dtype).requires_grad_()
    bank = torch_library(bank, bank_dtype)
    lists = torch_library(positives), torch_library(negatives)
    expected = ops.set_contrast(queries, bank, *lists, scale=10.0)
    (expected_grad,) = torch.autograd.grad(expected.sum(), queries)
    with torch.autocast(queries.device.type, dtype=torch.bfloat16):
        loss = ops.set_contrast(queries, bank, *lists, scale=10.0)
        (grad,) = torch.autograd.grad(loss.sum(), queries)
    assert (loss.dtype, grad.dtype) == (torch.float32, queries.dtype)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


def test_operator_registration(torch_library):
    queries, bank, positives, negatives = tensors(torch_library, 4, 2, 3, 8)
    weights = torch.rand(4, 2, device=bank.device)
    for arguments in [
        (queries, bank, positives, negatives, None, 10.0, "joint"),
        (queries.detach().bfloat16().requires_grad_(), bank, positives, None, weights, 5.0, "own"),
    ]:
        torch.library.opcheck(torch.ops.pyreid.set_contrast.default, arguments)
    slopes = torch.rand(2, 4, 5, device=bank.device)
    grad_loss = torch.rand(2, 4, device=bank.device)
    arguments = (grad_loss, slopes, bank, positives, negatives)
    torch.library.opcheck(torch.ops.pyreid.set_contrast_backward.default, arguments)


def test_graphs(cuda):
    queries, bank, *lists = (torch.from_numpy(x).to(cuda) for x in problem(16, 4, 200, 256))
    queries.requires_grad_()

    def step():
        loss = ops.set_contrast(queries, bank, *lists, scale=10.0)
        return loss, *torch.autograd.grad(loss.sum(), queries)

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
