"""How things grow with N. Of features to labels: seconds of each stage, and peak memory beyond the features.

`python -m benchmarks.growth [N ...]` in a checkout, `python -m pyreid.benchmarks.growth` elsewhere. Each size
runs in a process of its own, because a process keeps what it has used. Of every op: `lines` of what a run of
the benchmarks has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from pyreid import get_num_threads, ops

from . import memory

SIZES = (1000, 3000, 10_000, 30_000, 100_000)
STAGES = ("neighbours", "jaccard", "dbscan")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, metavar="N", help=f"default: {SIZES}")
    parser.add_argument("--dim", type=int, default=128, help="columns (default: 128)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--once", action="store_true", help="print one size's figures as JSON")
    arguments = parser.parse_args(argv)
    sizes = arguments.sizes or SIZES
    if arguments.once:
        print(json.dumps(measured(sizes[0], arguments.dim, arguments.device)))
        return
    print(f"{arguments.device}, {get_num_threads()} threads, D = {arguments.dim}; medians")
    print("| N | " + " | ".join(STAGES) + " | all | features | memory beyond | of that a row |")
    print("|---|---|---|---|---|---|---|---|")
    for size in sizes:
        options = ["--dim", str(arguments.dim), "--device", arguments.device, "--once", str(size)]
        command = [sys.executable, "-m", __spec__.name, *options]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        seconds = [found["seconds"][stage] for stage in STAGES]
        times = " | ".join(f"{value:.3g} s" for value in (*seconds, sum(seconds)))
        features = size * arguments.dim * 4
        told = "| not known | not known |"
        if found["bytes"] is not None:
            beyond = found["bytes"] / 2**20
            told = f"| {beyond:.1f} MiB | {1024 * beyond / size:.1f} KiB |"
        print(f"| {size:,} | {times} | {features / 2**20:.1f} MiB {told}", flush=True)


def features_of(size: int, dim: int) -> torch.Tensor:
    """Unit rows around centres of 17, as far from them as a half-trained encoder's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, dim, generator=generator)
    rows += torch.randn(size // 17 + 1, dim, generator=generator)[torch.arange(size) // 17]
    return torch.nn.functional.normalize(rows)


def measured(size: int, dim: int, device: str) -> dict:
    ops.pseudo_labels(features_of(200, dim).to(device))  # libraries, threads
    features = features_of(size, dim).to(device)
    before = memory.begin(device)
    _, stats = ops.pseudo_labels(features, return_stats=True)
    peak = memory.end(device, before)
    runs = [stats.seconds]
    for _ in range(4 if sum(stats.seconds.values()) < 5 else 2):
        runs.append(ops.pseudo_labels(features, return_stats=True)[1].seconds)
    seconds = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    return {"seconds": seconds, "bytes": peak}


class Line(NamedTuple):
    """Cases of an op that differ in N alone."""

    op: str
    name: str
    device: str
    expected: dict[str, float]  # exponents of N, of ours: "seconds", "peak_bytes"
    points: dict[str, dict[str, list[tuple[int, float]]]]  # quantity -> contender -> (N, value)

    def exponent(self, quantity: str, contender: str = "ours") -> float | None:
        return slope(self.points[quantity].get(contender, []))


def lines(results: Iterable[dict[str, Any]]) -> list[Line]:
    """Of the records of a results file. Memory under a MiB, not to be told from nothing, is not in them."""
    found: dict[tuple, Line] = {}
    for record in results:
        if not (growth := record["growth"]):
            continue
        key = record["op"], growth["line"], record["device"]
        expected = {"seconds": growth["time"], "peak_bytes": growth["memory"]}
        line = found.setdefault(key, Line(*key, expected, {"seconds": {}, "peak_bytes": {}}))
        for quantity, least in (("seconds", 0), ("peak_bytes", 2**20)):
            for contender, value in record[quantity].items():
                if value is not None and value > least:
                    values = line.points[quantity].setdefault(contender, [])
                    values.append((growth["n"], value))
    return list(found.values())


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """b of value = a * N ** b, by least squares on logarithmic axes; None of fewer than two sizes."""
    if len({n for n, _ in points}) < 2:
        return None
    logs = [(math.log(n), math.log(value)) for n, value in points]
    middle, level = (statistics.fmean(values) for values in zip(*logs, strict=True))
    across = sum((x - middle) ** 2 for x, _ in logs)
    return sum((x - middle) * (y - level) for x, y in logs) / across


if __name__ == "__main__":
    main()
