"""What rows on many GPUs should take, by a model, and what they take over gloo on this machine.

`python -m benchmarks.sharded` in a checkout, `python -m pyreid.benchmarks.sharded` elsewhere, prints the
predicted tables of docs/many-gpus.md: nothing of them is measured. `--measure` runs features to labels and a
step with a bank in some processes, and prints the bytes that went and came beside those of the model.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pyreid import distributed, sharded

from .growth import features_of


class Machine(NamedTuple):
    """Assumed of each GPU."""

    half: float = 500e12  # FLOP/s of products of 16-bit rows, as a library reaches them
    single: float = 50e12  # of float32 ones
    near: float = 300e9  # bytes/s to the other 7 of a node (NVLink)
    far: float = 40e9  # bytes/s to other nodes (400 Gbit/s for each GPU)
    select: float = 1.4  # time of a search, of that of its products

    def wire(self, ranks: int) -> float:
        return self.near if ranks <= 8 else self.far


class Shape(NamedTuple):
    """Of the neighbourhoods, each a mean over rows: as measured on features of a half-trained encoder."""

    k1: int = 30
    k2: int = 6
    reciprocal: float = 24  # reciprocal neighbours
    members: float = 33  # of a set
    weights: float = 67  # of a mean of sets
    rounds: int = 6  # of joining clusters


# Of pyreid.sharded, in elements.
PANEL, FETCHED, ENTRIES = 2**28, 2**27, 2**26


def volumes(rows: int, dim: int, ranks: int, shape: Shape, element: int = 2) -> dict[str, float]:
    """Bytes that a rank receives from features to labels, at most: as if the rows that it asks for together
    had no neighbour in common, and as if others' rows were as likely neighbours as its own."""
    own, others = rows / ranks, (ranks - 1) / ranks
    half = round(shape.k1 / 2) + 1
    listed = shape.k1 - 1
    return {
        "rows": rows * others * dim * element,
        "lists": asked(rows, ranks, listed, ENTRIES / shape.k1**2) * (8 + 4 * shape.k1),
        "half-size sets": asked(rows, ranks, shape.reciprocal, ENTRIES / shape.k1**2)
        * (8 + 4 * half),
        "members": asked(rows, ranks, shape.members, FETCHED / dim / (shape.members + 1))
        * (4 + dim * element),
        "weights": asked(rows, ranks, shape.k2 - 1, ENTRIES / (shape.k2 * shape.members))
        * (8 + 8 * shape.members),
        "transpose": own * others * shape.weights * 12,
        "columns": asked(rows, ranks, shape.weights, ENTRIES / shape.weights**2)
        * (8 + 8 * shape.weights),
        "labels": others * rows * (1 + 8 * shape.rounds),
    }


def asked(rows: int, ranks: int, of_each: float, height: float) -> float:
    """How many rows of others a rank asks for, `of_each` for each of its own, `height` of these together."""
    own, others = rows / ranks, rows * (ranks - 1) / ranks
    return min(own * of_each * (ranks - 1) / ranks, math.ceil(own / height) * others)


def memory(rows: int, dim: int, ranks: int, shape: Shape, element: int = 2) -> float:
    """Bytes on a rank, at the most."""
    own = rows / ranks
    panel = min(PANEL, own * dim)
    search = own * dim * 2 + panel * (2 * element + 2) + own * shape.k1 * 60
    kept = 12 * shape.k1 + 8 * shape.members + 2 * 8 * shape.weights
    graph = own * kept + max(own * 40 * shape.weights, ENTRIES * 40)
    labels = own * 8 * 2 * shape.k1 + 20 * rows
    return own * dim * element + max(search, graph, labels)


def seconds(rows: int, dim: int, ranks: int, shape: Shape, machine: Machine) -> tuple[float, float]:
    """Of the search, in which rows travel while others are multiplied, and of all other messages."""
    moved = volumes(rows, dim, ranks, shape)
    products = 2.0 * rows * rows * dim / ranks / machine.half * machine.select
    search = max(products, moved.pop("rows") / machine.wire(ranks))
    return search, sum(moved.values()) / machine.wire(ranks)


def step(
    rows: int, dim: int, ranks: int, batch: int, k: int, machine: Machine
) -> dict[str, tuple[float, float]]:
    """(bytes received, seconds) of a call with `batch` queries on each rank."""
    away = (ranks - 1) * batch
    moved = {
        "mine": away * (dim * 4 + k * 12),
        "cross_entropy": away * (2 * dim * 4 + 8) + 2 * away * (8 + 4 + 12),
        "update": batch * (ranks - 1) / ranks * (dim * 4 + 4),
    }
    flop = 2.0 * batch * rows * dim
    work = {"mine": flop / machine.half, "cross_entropy": 2 * flop / machine.single, "update": 0.0}
    return {name: (moved[name], work[name] + moved[name] / machine.wire(ranks)) for name in moved}


def print_predicted(machine: Machine, shape: Shape) -> None:
    print(
        "| N | D | GPUs | rows come | the rest comes | memory | search | the rest travels |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for rows in (10_000_000, 100_000_000):
        for dim in (512, 2048):
            for ranks in (8, 16, 32, 64):
                moved = volumes(rows, dim, ranks, shape)
                panels = moved.pop("rows")
                search, rest = seconds(rows, dim, ranks, shape, machine)
                print(
                    f"| {rows // 10**6} M | {dim} | {ranks} | {panels / 1e9:.0f} GB "
                    f"| {sum(moved.values()) / 1e9:.0f} GB | {memory(rows, dim, ranks, shape) / 1e9:.0f} GB "
                    f"| {told(search)} | {told(rest)} |"
                )
    print("\n| N | D | GPUs | mine | cross_entropy | update |\n|---|---|---|---|---|---|")
    for rows in (10_000_000, 100_000_000):
        for dim in (512, 2048):
            for ranks in (8, 64):
                calls = step(rows, dim, ranks, 64, 50, machine)
                cells = [f"{moved / 1e6:.1f} MB, {told(took)}" for moved, took in calls.values()]
                print(f"| {rows // 10**6} M | {dim} | {ranks} | {' | '.join(cells)} |")


def told(took: float) -> str:
    if took >= 5400:
        return f"{took / 3600:.1f} h"
    if took >= 90:
        return f"{took / 60:.0f} min"
    if took >= 0.1:
        return f"{took:.0f} s" if took >= 10 else f"{took:.2g} s"
    return f"{took * 1e3:.2g} ms" if took >= 1e-4 else "< 0.1 ms"


# --- measured -------------------------------------------------------------------------------------------


def work(rank: int, ranks: int, rows: int, dim: int, place: str, found: Any) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{place}/{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    own = slice(rows * rank // ranks, rows * (rank + 1) // ranks)
    # As in a data set whose files are in no order of people.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    features = features_of(rows, dim)[order][own].contiguous()
    bank = sharded.ShardedMemoryBank(features)
    queries, some = features[:16].clone().requires_grad_(), torch.arange(16) * (rows // 16)
    calls = {
        "labels": lambda: sharded.pseudo_labels(features),
        "mine": lambda: bank.mine(queries, 50),
        "cross_entropy": lambda: bank.cross_entropy(queries, some, scale=20.0),
        "update": lambda: bank.update(queries, some),
    }
    for name, call in calls.items():
        dist.barrier()
        began = time.perf_counter()
        with distributed.counted() as traffic:
            call()
        took = time.perf_counter() - began
        if rank == 0:
            found.put((name, took, traffic.received.total()))
    dist.barrier()
    dist.destroy_process_group()


def print_measured(rows: int, dim: int, counts: list[int]) -> None:
    print(f"gloo, one thread each, N = {rows:,}, D = {dim}, float32; rank 0")
    print("| processes | call | took | received | model |\n|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        for ranks in counts:
            found = context.Queue()
            started = [
                context.Process(target=work, args=(rank, ranks, rows, dim, place, found))
                for rank in range(ranks)
            ]
            for process in started:
                process.start()
            expected = {
                name: moved
                for name, (moved, _) in step(rows, dim, ranks, 16, 50, Machine()).items()
            }
            expected["labels"] = sum(volumes(rows, dim, ranks, Shape(), element=4).values())
            for _ in expected:
                name, took, received = found.get(timeout=600)
                print(
                    f"| {ranks} | {name} | {told(took)} | {received / 1e6:.3f} MB "
                    f"| {expected[name] / 1e6:.3f} MB |",
                    flush=True,
                )
            for process in started:
                process.join()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run processes on this machine")
    parser.add_argument("--rows", type=int, default=4000, help="default: 4000")
    parser.add_argument("--dim", type=int, default=64, help="default: 64")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4])
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print_measured(arguments.rows, arguments.dim, arguments.processes)
    else:
        print_predicted(Machine(), Shape())


if __name__ == "__main__":
    main()
