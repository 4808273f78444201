"""Features that are not one array on its device: files, shards, and device memory that is too small."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyreid import ops
from pyreid.ops import _panels, _shards
from pyreid.ops import jaccard as jaccard_room

VARIANTS = ["spcl", "openunreid", "zhong", "jvtc", "ca-jaccard"]


def people(size, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((max(size // 8, 1), dim))[np.arange(size) % max(size // 8, 1)]
    x = x + 0.6 * rng.standard_normal((size, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles, panels and pieces so small that there are several of each."""
    monkeypatch.setattr(_panels, "_CPU_SCORES", 1)
    monkeypatch.setattr(_panels, "_CUDA_SCORES", 1)
    monkeypatch.setattr(_shards, "_TAKEN", 100)
    monkeypatch.setattr(jaccard_room, "_QUERIES", 48)
    monkeypatch.setattr(jaccard_room, "_AHEAD", 2)
    monkeypatch.setattr(jaccard_room, "_GATHERED", 16 * 90)


def assert_same(graph, expected):
    assert graph.shape == expected.shape
    assert graph.max_distance == expected.max_distance
    for part, wanted in zip(graph[:3], expected[:3], strict=True):
        assert type(part) is type(wanted)
        np.testing.assert_array_equal(np.asarray(part.tolist()), np.asarray(wanted.tolist()))


def cut(array, *places):
    bounds = [0, *places, len(array)]
    return [array[first:last] for first, last in itertools.pairwise(bounds)]


def options_of(variant, size):
    cameras = torch.arange(size) % 3
    return {"variant": variant} | ({"cameras": cameras} if variant == "ca-jaccard" else {})


@pytest.mark.parametrize(
    "variant, dtype", [*((variant, "float32") for variant in VARIANTS), ("zhong", "bfloat16")]
)
def test_shards_are_their_array(torch_library, small_blocks, variant, dtype):
    """Bit for bit, the emulated floor's included; from host memory to the device, on CUDA."""
    size = 110 if torch_library.floor == "emulated" else 700
    host = torch.tensor(people(size)).to(getattr(torch, dtype))
    options = options_of(variant, size)
    there = {name: torch_library(x) if name == "cameras" else x for name, x in options.items()}
    features = host.to(torch_library(host[:1].float().numpy()).device)
    expected = ops.jaccard_graph(features, 8, 3, max_distance=0.7, **there)
    shards = cut(host, 1, 1, 100)
    graph = ops.jaccard_graph(
        shards, 8, 3, max_distance=0.7, device=features.device.type, **options
    )
    assert_same(graph, expected)
    labels = ops.pseudo_labels(shards, k1=8, k2=3, eps=0.7, device=features.device, **options)
    assert labels.device.type == "cpu"
    torch.testing.assert_close(labels, ops.dbscan(expected, 0.7, 4).cpu(), rtol=0, atol=0)


def test_host_memory_to_the_device(cuda):
    host = torch.tensor(people(3000, 64))
    expected = ops.pseudo_labels(host.to(cuda))
    for features in (host, host.numpy(), cut(host.numpy(), 1300)):
        labels = ops.pseudo_labels(features, device="cuda")
        np.testing.assert_array_equal(np.asarray(labels), expected.cpu())


@pytest.mark.parametrize("variant", VARIANTS)
def test_files(tmp_path, small_blocks, variant):
    features = people(700)
    options = options_of(variant, 700)
    if "cameras" in options:
        options["cameras"] = options["cameras"].numpy()
    expected = ops.jaccard_graph(features, 8, 3, max_distance=0.7, **options)
    for n, part in enumerate([features, *cut(features, 300)]):
        np.save(tmp_path / f"{n}.npy", part)
    whole, *parts = (np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in range(3))
    for mapped in (whole, parts, [whole], [features[:5], whole[5:]]):
        assert_same(ops.jaccard_graph(mapped, 8, 3, max_distance=0.7, **options), expected)
    labels = ops.pseudo_labels(parts, k1=8, k2=3, eps=0.7, **options)
    assert isinstance(labels, np.ndarray)
    np.testing.assert_array_equal(labels, ops.dbscan(expected, 0.7, 4))


def test_ranks_beside_shards(small_blocks):
    features = people(200)
    ranks = ops.knn(features, 9).rows[:, ::-1].copy()
    expected = ops.jaccard_graph(features, 8, 3, ranks=ranks)
    assert_same(ops.jaccard_graph(cut(features, 70), 8, 3, ranks=ranks), expected)


def test_rows_of_any_order_come_from_their_shards(small_blocks):
    features = people(100)
    rows = np.random.default_rng(0).integers(0, 100, 60)
    for array in (features, torch.tensor(features), np.asfortranarray(features)):
        shards = _shards.Shards("op", cut(array, 30, 30, 77), "cpu")
        np.testing.assert_array_equal(shards.take(rows), features[rows])
        chosen = shards.selected(rows)
        assert chosen.shape == (60, 16)
        np.testing.assert_array_equal(chosen.take([5, 0, 5]), features[rows[[5, 0, 5]]])
        np.testing.assert_array_equal(chosen.take(range(9, 50)), features[rows[9:50]])
        panels = [(first, panel.clone()) for first, panel in chosen.panels(25)]
        assert [first for first, _ in panels] == [0, 25, 50]
        np.testing.assert_array_equal(torch.cat([panel for _, panel in panels]), features[rows])


@pytest.mark.parametrize("size", [0, 1, 3])
def test_few_rows(torch_library, size):
    features = torch.tensor(people(size))
    for shards in ([features], [features[:0], features]):
        labels = ops.pseudo_labels(shards, k1=4, k2=2, min_samples=1)
        assert labels.tolist() == ops.pseudo_labels(features, k1=4, k2=2, min_samples=1).tolist()


def test_not_finite():
    features = people(60)
    features[41, 2] = np.nan
    with pytest.raises(ValueError) as error:
        ops.jaccard_graph(cut(features, 30), 6, 3)
    assert str(error.value).endswith("features must have rows of finite norm, got nan in row 41")


def test_wrong_shards():
    x = people(20)
    for shards, message in [
        ([], "hold at least one array, got none"),
        ([x, [1.0]], "be arrays of torch or NumPy, got list"),
        ([x, x[:, :5]], "be alike in all shards, got float32 of 5 columns beside float32 of 16"),
        ([x, x.astype(np.float16)],
         "be alike in all shards, got float16 of 16 columns beside float32 of 16"),
        ([x[0]], "have shape (any, any), got (16,)"),
        ([x.astype(np.float64)], "be float32, float16 or bfloat16, got float64"),
        ([x.astype(">f4")], "be float32, float16 or bfloat16, got >f4"),
    ]:  # fmt: skip
        for op in (ops.jaccard_graph, ops.pseudo_labels):
            with pytest.raises(ValueError) as error:
                op(shards)
            assert str(error.value) == f"{op.__name__}: features must {message}"


SCRIPT = """
import sys, threading, time
import numpy as np
from pyreid import _native, ops
from pyreid.ops import _panels, jaccard as room

_native.cpu().set("knn_filter", 0)  # which would copy the rows, to 16 bits
_panels._CPU_SCORES, room._QUERIES, room._AHEAD, room._GATHERED = 2**14, 128, 2, 2**20
features = np.load(sys.argv[1], mmap_mode="r")

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

ops.pseudo_labels([np.eye(64, dtype=np.float32)], k1=5, k2=2)  # libraries, threads
before, most, ended = anonymous(), 0, False

def watch():
    global most
    while not ended:
        most = max(most, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
for given in (features, [features[:1000], features[1000:]]):
    most = 0
    ops.pseudo_labels(given, k1=10, k2=3)
    print(most - before)
ended = True
watcher.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_not_brought_into_memory(tmp_path):
    path = tmp_path / "features.npy"
    np.save(path, people(2400, 4096))  # 38 MiB
    command = [sys.executable, "-c", SCRIPT, path]
    # Else malloc keeps some of what it has got back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    mapped, shards = map(float, done.stdout.split())
    assert mapped < 20
    assert shards < 30
