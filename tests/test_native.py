"""The floors as modules: builds for three instruction levels, threads, fork, products, what is missing."""

import importlib
import importlib.util
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import pyreid
from pyreid import _native, ops, reference

LEVEL = importlib.import_module("pyreid._cpu").get("instruction_level")
VARIANTS = ["_cpu"] + [
    f"_cpu_v{level}"
    for level in (3, 4)
    if level <= LEVEL and importlib.util.find_spec(f"pyreid._cpu_v{level}")
]


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    module = importlib.import_module(f"pyreid.{request.param}")
    monkeypatch.setattr(_native, "cpu", lambda: module)
    return module


def update(events=40, dim=70, seed=0):
    rng = np.random.default_rng(seed)
    bank = rng.standard_normal((9, dim)).astype(np.float32)
    features = rng.standard_normal((events, dim)).astype(np.float32)
    return ops.memory_update_(bank, features, rng.integers(0, 9, events), momentum=0.3)


def test_the_best_build_is_chosen():
    assert _native.cpu_variant() == VARIANTS[-1]


def test_a_build_can_be_asked_for():
    script = "from pyreid import _native; print(_native.cpu().__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYREID_CPU": "_cpu", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "pyreid._cpu\n"


def test_builds_give_the_same_bits(variant):
    result = update()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "cpu", lambda: importlib.import_module("pyreid._cpu"))
        np.testing.assert_array_equal(result, update())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "batch, size, dim",
    [
        (0, 5, 3),
        (1, 1, 1),
        (5, 0, 7),
        (3, 7, 0),
        (9, 50, 31),
        (17, 129, 600),
        (40, 75, 70),
        (64, 100, 1030),
        (100, 77, 1030),
    ],
)
def test_products(variant, batch, size, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(batch, dim, generator=generator)
    rows = torch.randn(size, dim, generator=generator).to(dtype)
    scores = torch.full((batch, size), torch.nan)
    variant.product(queries, rows, scores, 0)
    expected = queries.double() @ rows.double().T
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def threads():
    before = pyreid.get_num_threads()
    yield pyreid.set_num_threads
    pyreid.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads):
    results = []
    for count in (1, 2, 5, 3):
        threads(count)
        assert pyreid.get_num_threads() == count
        results.append(update(events=3000, dim=500))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        threads(0)


def test_python_threads_at_once():
    expected = [update(events=2000, seed=seed) for seed in range(8)]
    results = [None] * 8

    def work(seed):
        for _ in range(5):
            results[seed] = update(events=2000, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, other in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, other)


def _in_a_child(queue):
    queue.put(update(events=3000, dim=500))


def test_after_fork(threads):
    """A data loader's workers fork while the parent's pool exists."""
    threads(3)
    expected = update(events=3000, dim=500)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), expected)
    child.join()
    np.testing.assert_array_equal(update(events=3000, dim=500), expected)


def test_import_loads_nothing_and_prints_nothing():
    script = "import sys, pyreid; assert 'torch' not in sys.modules; pyreid.__version__"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""


def test_missing_cuda_floor_says_why(monkeypatch):
    monkeypatch.setattr(_native, "cuda_error", lambda: "it was not built (no nvcc)")
    _native.cuda.cache_clear()
    with pytest.raises(RuntimeError) as error:
        _native.cuda()
    _native.cuda.cache_clear()
    assert "there is no CUDA floor: it was not built (no nvcc)" in str(error.value)
    assert "python -m pyreid.info" in str(error.value)


def test_devices_without_a_floor():
    bank = torch.zeros(2, 3, device="meta")
    with pytest.raises(ValueError, match="device 'meta' have no floor in pyreid"):
        _native.cpu().memory_update(bank, bank, bank, 0.2, "last", 1, True, None, 0)


class Foreign:
    """An array of some other library: it speaks DLPack, and that is all."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **_):
        return self.array.__dlpack__()


def test_arrays_that_speak_dlpack():
    rng = np.random.default_rng(0)
    bank, features = (rng.standard_normal((6, 8)).astype(np.float32) for _ in range(2))
    rows = np.array([5, 1, 5, 0, 2, 2])
    for half in (np.float32, np.float16):
        expected = reference.memory_update(bank, features.astype(half), rows, momentum=0.3)
        result = bank.copy()
        arguments = Foreign(result), Foreign(features.astype(half)), Foreign(rows)
        ops.memory_update_(*arguments, momentum=0.3)
        np.testing.assert_allclose(result, expected, atol=1e-6)
    part = Foreign(np.zeros((6, 16), np.float32)[:, ::2])
    with pytest.raises(ValueError, match="features must be C-contiguous, got a strided view"):
        ops.memory_update_(Foreign(bank), part, Foreign(rows), momentum=0.3)
    with pytest.raises(ValueError, match="bank must be float32, float16 or bfloat16, got uint8"):
        ops.memory_update_(Foreign(np.zeros((2, 2), np.uint8)), part, Foreign(rows), momentum=0.3)


def test_bfloat16_in_numpy():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 only with ml_dtypes")
    bank = np.eye(3, dtype=np.float32).astype(ml_dtypes.bfloat16)
    features = np.ones((1, 3), np.float32)
    ops.memory_update_(bank, features, np.array([0]), momentum=0.5)
    expected = reference.memory_update(
        np.eye(3, dtype=np.float32), features, np.array([0]), momentum=0.5
    )
    np.testing.assert_allclose(bank.astype(np.float32), expected, atol=4e-3)


def test_settings():
    with pytest.raises(KeyError, match="no_such_setting"):
        _native.cpu().get("no_such_setting")
    with pytest.raises(KeyError, match="read-only"):
        _native.cpu().set("instruction_level", 1)
