import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreid import ops, reference
from pyreid.ops import _panels


def problem(batch, size, dim, *, groups=5, cameras=3, grid=None, seed=0):
    """Queries, bank, and every rule. `grid`: coordinates from that many values, so that scores tie."""
    rng = np.random.default_rng(seed)

    def unit(count):
        if grid:  # sums of a few powers of two: exact in float32, in any order
            return rng.integers(0, grid, (count, dim)).astype(np.float32) / 4
        x = rng.standard_normal((count, dim)).astype(np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    rules = {
        "self_rows": rng.integers(-1, max(size, 1), batch),
        "query_groups": rng.integers(-1, groups, batch),
        "bank_groups": rng.integers(-1, groups, size),
        "query_cameras": rng.integers(0, cameras, batch),
        "bank_cameras": rng.integers(0, cameras, size),
    }
    return unit(batch), unit(size), rules


def check(library, queries, bank, k, *, dtype=None, atol=1e-5, **rules):
    arrays = {n: library(v) if isinstance(v, np.ndarray) else v for n, v in rules.items()}
    q, b = library(queries, dtype), library(bank, dtype)
    runs = [ops.mine_negatives(q, b, k, **arrays) for _ in range(2)]
    scores, rows = (library.back(x) for x in runs[0])
    np.testing.assert_array_equal(scores, library.back(runs[1].scores))
    np.testing.assert_array_equal(rows, library.back(runs[1].rows))
    expected_scores, expected_rows = reference.mine_negatives(
        library.back(q), library.back(b), k, **rules
    )
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=atol)
    assert scores.dtype == np.float32
    assert rows.dtype == np.int64
    return rows, expected_rows


@pytest.fixture
def small_panels(monkeypatch):
    """Panels of 256 rows: a bank of a thousand crosses several borders."""
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)
    monkeypatch.setattr(_panels, "_CUDA_SCORES", 1)


@pytest.mark.parametrize("batch, size, dim, k", [
    (0, 50, 8, 3),
    (1, 1, 1, 1),
    (7, 50, 64, 50),
    (3, 50, 1, 60),  # k > N
    (2, 0, 8, 2),  # nothing there
    (5, 3000, 64, 100),
    (2, 700, 2048, 7),
    (1, 5000, 4, 4900),
])  # fmt: skip
def test_matches_reference(library, small_panels, batch, size, dim, k):
    queries, bank, rules = problem(batch, size, dim, grid=3 if dim < 2048 else None)
    for chosen in (
        {},
        {"skip": 3, "self_rows": rules["self_rows"]},
        {"camera_penalty": 0.5, **rules},
        {"camera_penalty": -0.25, **rules},
    ):
        if batch * size > 5000 and chosen:
            chosen["skip"] = 1
        rows, expected = check(library, queries, bank, k, **chosen)
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("dim", [1, 64, 2048])
def test_a_whole_data_set(dim):
    queries, bank, rules = problem(256, 12936, dim)
    q, b = torch.from_numpy(queries), torch.from_numpy(bank)
    scores, rows = ops.mine_negatives(q, b, 50)
    exact = q.double() @ b.double().T
    torch.testing.assert_close(scores.double(), exact.topk(50).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.double(), exact.gather(1, rows), rtol=0, atol=1e-5)
    groups = {name: torch.from_numpy(rules[name]) for name in ("query_groups", "bank_groups")}
    same = groups["query_groups"][:, None] == groups["bank_groups"]
    allowed = exact.masked_fill(same & (groups["query_groups"] >= 0)[:, None], -torch.inf)
    found = ops.mine_negatives(q, b, 50, **groups).scores
    torch.testing.assert_close(found.double(), allowed.topk(50).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0])
def test_all_scores_tie(library, small_panels, value):
    bank = np.full((1000, 4), value, np.float32)
    queries = np.ones((3, 4), np.float32)
    rows, _ = check(library, queries, bank, 20, skip=5)
    np.testing.assert_array_equal(rows, np.tile(np.arange(5, 25), (3, 1)))


def test_minus_zero_ties_with_zero(library):
    bank = np.array([[0.0], [-0.0], [1.0], [-0.0]], np.float32)
    rows, _ = check(library, np.ones((1, 1), np.float32), bank, 4)
    np.testing.assert_array_equal(rows, [[2, 0, 1, 3]])


def test_ever_better_rows(library, small_panels):
    # Ascending scores: every column passes, candidates overflow and are dropped, again and again.
    bank = np.arange(6000, dtype=np.float32)[:, None]
    rows, _ = check(library, np.ones((2, 1), np.float32), bank, 9)
    np.testing.assert_array_equal(rows[0], np.arange(5999, 5990, -1))


def test_fewer_qualify(library):
    queries, bank, _ = problem(4, 30, 8)
    same = np.zeros(30, np.int64)
    same[[3, 17]] = 1
    rows, expected = check(
        library, queries, bank, 5, query_groups=np.zeros(4, np.int64), bank_groups=same
    )
    np.testing.assert_array_equal(rows, expected)
    assert (rows[:, 2:] == -1).all()
    assert set(rows[0, :2]) == {3, 17}


def test_scores_that_do_not_qualify(library):
    bank = np.array([[np.nan], [1.0], [-np.inf], [np.inf], [2.0]], np.float32)
    scores, rows = ops.mine_negatives(library(np.ones((1, 1), np.float32)), library(bank), 4)
    np.testing.assert_array_equal(library.back(rows), [[3, 4, 1, -1]])
    np.testing.assert_array_equal(library.back(scores), [[np.inf, 2, 1, -np.inf]])


def test_half_precision_banks(library):
    queries, bank, rules = problem(6, 400, 64)
    for dtype in library.half_precisions:
        check(library, queries, bank, 30, dtype=dtype, camera_penalty=0.1, **rules)


def test_32_bit_ids(library):
    queries, bank, rules = problem(6, 400, 16, grid=3)
    rules = {name: ids.astype(np.int32) for name, ids in rules.items()}
    rows, expected = check(library, queries, bank, 30, camera_penalty=0.5, **rules)
    np.testing.assert_array_equal(rows, expected)


def test_many_ranks_are_sorted_in_memory(library):
    if library.floor == "emulated" and not library.name.endswith("emulated"):
        pytest.skip("one schedule is enough")
    bank = np.random.default_rng(0).permutation(6000).astype(np.float32)[:, None]
    rows, expected = check(library, np.ones((1, 1), np.float32), bank, 5000, skip=100)
    np.testing.assert_array_equal(rows, expected)


@given(
    batch=st.integers(1, 5),
    size=st.integers(1, 60),
    k=st.integers(1, 20),
    skip=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_permuting_the_bank_permutes_what_is_found(batch, size, k, skip, seed):
    queries, bank, rules = problem(batch, size, 8, seed=seed)
    rules |= {"camera_penalty": 0.2, "skip": skip}
    found = ops.mine_negatives(queries, bank, k, **rules)
    order = np.random.default_rng(seed).permutation(size)
    place = np.append(np.argsort(order), -1)
    rules["bank_groups"] = rules["bank_groups"][order]
    rules["bank_cameras"] = rules["bank_cameras"][order]
    rules["self_rows"] = place[rules["self_rows"]]
    permuted = ops.mine_negatives(queries, bank[order], k, **rules)
    np.testing.assert_allclose(permuted.scores, found.scores, atol=1e-6)
    distinct = np.diff(found.scores, axis=1, append=-np.inf) != 0
    np.testing.assert_array_equal(permuted.rows[distinct], place[found.rows][distinct])


@given(size=st.integers(1, 60), k=st.integers(1, 30), skip=st.integers(0, 30))
def test_skip_is_a_shift(size, k, skip):
    queries, bank, rules = problem(3, size, 8, grid=3)
    all_ranks = ops.mine_negatives(queries, bank, skip + k, **rules)
    skipped = ops.mine_negatives(queries, bank, k, skip=skip, **rules)
    np.testing.assert_array_equal(skipped.rows, all_ranks.rows[:, skip:])


def test_two_floors_agree(emulator):
    from pyreid import _native

    queries, bank, rules = problem(8, 900, 32, grid=4)
    kernel = ops.mine_negatives(queries, bank, 40, camera_penalty=0.5, **rules)
    before, _native._emulator = _native._emulator, None
    host = ops.mine_negatives(queries, bank, 40, camera_penalty=0.5, **rules)
    _native._emulator = before
    np.testing.assert_array_equal(kernel.rows, host.rows)
    np.testing.assert_array_equal(kernel.scores, host.scores)


# --- the systems ----------------------------------------------------------------------------------


def test_selective_contrast_ranks_by_its_own_distance(library):
    """SCL: global, eight stripes and camera in one distance; here one product over concatenated rows."""
    rng = np.random.default_rng(0)
    size, batch, stripes, weight, penalty = 300, 6, 8, 0.5, 0.05

    def unit(*shape):
        x = rng.standard_normal(shape).astype(np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    glob, local = unit(size, 64), unit(stripes, size, 16)
    own = rng.permutation(size)[:batch]
    cameras = rng.integers(0, 4, size)
    g, parts = glob[own] + 0.1 * unit(batch, 64), local[:, own]
    g /= np.linalg.norm(g, axis=-1, keepdims=True)

    distance = weight * ((g[:, None] - glob) ** 2).sum(-1)
    for s in range(stripes):
        distance += (1 - weight) / stripes * ((parts[s][:, None] - local[s]) ** 2).sum(-1)
    distance += penalty * (cameras[own][:, None] == cameras)
    ranking = [[n for n in np.argsort(d) if n != i] for d, i in zip(distance, own, strict=True)]

    def fused(g, parts):
        scale = np.sqrt((1 - weight) / stripes)
        return np.concatenate([np.sqrt(weight) * g, *(scale * p for p in parts)], 1).astype("f")

    arguments = {
        "self_rows": library(own),
        "query_cameras": library(cameras[own]),
        "bank_cameras": library(cameras),
        "camera_penalty": penalty / 2,
    }
    query, bank = library(fused(g, parts)), library(fused(glob, local))
    found = library.back(ops.mine_negatives(query, bank, 57, **arguments).rows)
    np.testing.assert_array_equal(found, np.array(ranking)[:, :57])
    negatives = library.back(ops.mine_negatives(query, bank, 50, skip=7, **arguments).rows)
    np.testing.assert_array_equal(negatives, found[:, 7:])


# --- arguments ------------------------------------------------------------------------------------


def test_wrong_arguments(library):
    queries, bank, rules = problem(4, 30, 8)

    def f32(*shape):
        return library(np.zeros(shape, np.float32))

    def ids(size):
        return library(np.zeros(size, np.int64))

    given = {"queries": library(queries), "bank": library(bank), "k": 5}
    cases = [
        ({"queries": f32(4, 7)}, "queries must have shape (any, 8), got (4, 7)"),
        ({"queries": f32(8)}, "queries must have shape (any, 8), got (8,)"),
        ({"bank": f32(30)}, "bank must have shape (any, any), got (30,)"),
        (
            {"bank": library(np.zeros((30, 8)))},
            "bank must be float32, float16 or bfloat16, got float64",
        ),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 70000}, "k + skip must be at most 65536, got 70000"),
        ({"skip": -1}, "skip must be at least 0, got -1"),
        ({"self_rows": ids(3)}, "self_rows must have shape (4,), got (3,)"),
        ({"self_rows": f32(4)}, "self_rows must be int64 or int32, got float32"),
        ({"query_groups": ids(4)}, "bank_groups must be given with the other of the two, got None"),
        (
            {"query_groups": ids(4), "bank_groups": ids(4)},
            "bank_groups must have shape (30,), got (4,)",
        ),
        (
            {"bank_cameras": ids(30)},
            "query_cameras must be given with the other of the two, got None",
        ),
        (
            {"camera_penalty": 0.1},
            "camera_penalty must be 0 without query_cameras and bank_cameras, got 0.100000",
        ),
        ({"camera_penalty": float("inf")}, "camera_penalty must be finite, got inf"),
        ({"precision": "half"}, "precision must be 'exact' or 'fast', got 'half'"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError) as error:
            ops.mine_negatives(**(given | changes))
        assert str(error.value) == f"mine_negatives: {message}"


# --- torch ----------------------------------------------------------------------------------------


def test_gradient(torch_library):
    queries, bank, rules = problem(5, 60, 16)
    q = torch_library(queries).requires_grad_()
    b = torch_library(bank)
    group_rules = {n: torch_library(rules[n]) for n in ("query_groups", "bank_groups")}
    mined = ops.mine_negatives(q, b, 12, **group_rules)
    weights = torch.rand_like(mined.scores)
    (mined.scores * weights).sum().backward()
    dense = torch_library(queries).requires_grad_()
    ((dense @ b.T).gather(1, mined.rows) * weights).sum().backward()
    torch.testing.assert_close(q.grad, dense.grad, rtol=1e-4, atol=1e-6)
    assert not mined.rows.requires_grad


def test_gradient_where_fewer_qualify(torch_library):
    queries, bank, _ = problem(2, 3, 4)
    q = torch_library(queries).requires_grad_()
    mined = ops.mine_negatives(q, torch_library(bank), 5)
    mined.scores[:, :3].sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("query_dtype, bank_dtype", [
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
])  # fmt: skip
def test_two_dtypes(torch_library, query_dtype, bank_dtype):
    queries, bank, _ = problem(4, 200, 32)
    q = torch_library(queries).to(query_dtype).requires_grad_()
    b = torch_library(bank).to(bank_dtype)
    mined = ops.mine_negatives(q, b, 9)
    expected, rows = (q.detach().float() @ b.float().T).topk(9)
    torch.testing.assert_close(mined.scores, expected, rtol=0, atol=1e-6)
    mined.scores.sum().backward()
    assert q.grad.dtype == query_dtype


def test_exact_whatever_torch_is_set_to(torch_library):
    queries, bank, _ = problem(4, 200, 64)
    q, b = torch_library(queries), torch_library(bank)
    expected = ops.mine_negatives(q, b, 9)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(q.device.type, dtype=torch.bfloat16):
            mined = ops.mine_negatives(q, b, 9)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(mined.scores, expected.scores, rtol=0, atol=0)


def test_compiles_without_a_graph_break(torch_library):
    queries, bank, rules = problem(5, 60, 16)
    b, groups = torch_library(bank), torch_library(rules["query_groups"])
    bank_groups = torch_library(rules["bank_groups"])

    def loss(q):
        mined = ops.mine_negatives(q * 2, b, 12, query_groups=groups, bank_groups=bank_groups)
        return mined.scores.exp().sum()

    plain = torch_library(queries).requires_grad_()
    compiled = torch_library(queries).requires_grad_()
    expected = loss(plain)
    expected.backward()
    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_operator_registration(torch_library):
    queries, bank, rules = problem(5, 60, 16)
    ids = [torch_library(v) for v in rules.values()]
    for q in (torch_library(queries), torch_library(queries).requires_grad_()):
        arguments = (q, torch_library(bank), 4, 1, *ids, 0.1, "exact")
        torch.library.opcheck(torch.ops.pyreid.mine_negatives.default, arguments)
