"""Two processes with gloo, on this machine: each result is that of one process, bit for bit."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pyreid import ops
from pyreid.ops import _work
from pyreid.ops import jaccard as jaccard_room

SIZES = [0, 1, 3, 301]  # fewer than processes, and no multiple of anything

SCRIPT = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from pyreid import _native, ops
from pyreid.ops import jaccard as room

place, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
torch.set_num_threads(1)
room._QUERIES = 64
results = {}

def keep(name, graph):
    for field, part in zip(("indptr", "indices", "distances"), graph[:3]):
        results[f"{name} {field}"] = np.asarray(part)

for size in (0, 1, 3, 301):
    x = np.load(f"{place}/{size}.npy")
    cameras = np.arange(size) % 3
    near = {"max_distance": 0.7, "distributed": "replicated"}
    for variant in ("spcl", "jvtc"):
        keep(f"{size} {variant}", ops.jaccard_graph(x, 8, 3, variant=variant, **near))
    by_camera = {"variant": "ca-jaccard", "cameras": torch.tensor(cameras)}
    keep(f"{size} ca-jaccard", ops.jaccard_graph(torch.tensor(x), 8, 3, **by_camera, **near))
    keep(f"{size} shards", ops.jaccard_graph([x[: size // 3], x[size // 3 :]], 8, 3, **near))
    part = slice(size // 4) if rank == 0 else slice(size // 4, None)
    own = {"variant": "ca-jaccard", "cameras": cameras[part]}
    results[f"{size} labels"] = ops.pseudo_labels(
        x[part], k1=8, k2=3, eps=(0.5, 0.7), distributed="sharded", **own
    )

with _native.emulated():
    x = torch.tensor(np.load(f"{place}/301.npy")[:150])
    keep("emulated spcl", ops.jaccard_graph(x, 8, 3, **near))

for other in (x[: 149 + rank], x + rank):
    try:
        ops.jaccard_graph(other, 8, 3, **near)
    except ValueError as error:
        assert "features must be the same on all processes" in str(error)
    else:
        raise AssertionError("features that differ")

told = []
ops.pseudo_labels(x, k1=8, k2=3, distributed="replicated", progress=lambda *some: told.append(some))
assert [some for some in told if some[1] == 150] == [
    (stage, 150, 150) for stage in ("neighbours", "jaccard", "dbscan")
]
if rank == 0:  # nobody waits for the other
    ops.pseudo_labels(x, k1=8, k2=3)
np.savez(f"{place}/{rank}.npz", **results)
dist.barrier()
dist.destroy_process_group()
"""


def people(size, dim=16):
    rng = np.random.default_rng(size)
    x = rng.standard_normal((max(size // 8, 1), dim))[np.arange(size) % max(size // 8, 1)]
    x = x + 0.6 * rng.standard_normal((size, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_two_processes(tmp_path, emulator, monkeypatch):
    for size in SIZES:
        np.save(tmp_path / f"{size}.npy", people(size))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, tmp_path, str(rank)], stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    for process in pair:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said.decode()
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert first.files == second.files
    assert len(first.files) == 4 * (4 * 3 + 1) + 3

    monkeypatch.setattr(jaccard_room, "_QUERIES", 64)
    expected = {}

    def keep(name, graph):
        for field, part in zip(("indptr", "indices", "distances"), graph[:3], strict=True):
            expected[f"{name} {field}"] = np.asarray(part)

    keep(
        "emulated spcl", ops.jaccard_graph(torch.tensor(people(301)[:150]), 8, 3, max_distance=0.7)
    )
    monkeypatch.setattr("pyreid._native._emulator", None)
    for size in SIZES:
        x, cameras = people(size), np.arange(size) % 3
        for name in ("spcl", "jvtc", "shards"):
            variant = "spcl" if name == "shards" else name
            keep(f"{size} {name}", ops.jaccard_graph(x, 8, 3, variant=variant, max_distance=0.7))
        by_camera = {"variant": "ca-jaccard", "cameras": cameras}
        keep(f"{size} ca-jaccard", ops.jaccard_graph(x, 8, 3, max_distance=0.7, **by_camera))
        expected[f"{size} labels"] = ops.pseudo_labels(x, k1=8, k2=3, eps=(0.5, 0.7), **by_camera)
    assert sorted(expected) == sorted(first.files)
    for name, wanted in expected.items():
        np.testing.assert_array_equal(first[name], wanted, err_msg=name)
        np.testing.assert_array_equal(second[name], wanted, err_msg=name)


def test_a_process_by_itself():
    x = people(60)
    expected = ops.pseudo_labels(x, k1=8, k2=3)
    for distributed in ("replicated", "sharded"):
        labels = ops.pseudo_labels(x, k1=8, k2=3, distributed=distributed)
        np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("count, step, processes", [(10, 4, 2), (9, 4, 5), (0, 4, 2), (1000, 1, 3)])
def test_shares_are_all_rows(monkeypatch, count, step, processes):
    monkeypatch.setattr("pyreid.distributed.world_size", lambda: processes)
    rows = []
    for rank in range(processes):
        monkeypatch.setattr("pyreid.distributed.rank", lambda rank=rank: rank)
        share = _work.Work(count, divided=True).share(count, step)
        assert share.start % step == 0 or not share
        rows += share
    assert rows == list(range(count))


def test_refusals():
    x = people(20)
    for changes, message in [
        ({"distributed": True},
         "distributed must be None, 'replicated' or 'sharded', got True"),
        ({"distributed": "sharded", "features": [x]},
         "features must be one array on its device where distributed is 'sharded'"),
    ]:  # fmt: skip
        for op in (ops.jaccard_graph, ops.pseudo_labels):
            with pytest.raises(ValueError) as error:
                op(**({"features": x} | changes))
            assert str(error.value) == f"{op.__name__}: {message}"
