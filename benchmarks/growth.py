"""How features to labels grow with N: seconds of each stage, and peak memory beyond the features.

`python -m benchmarks.growth [N ...]` in a checkout, `python -m pyreid.benchmarks.growth` elsewhere. Each size
runs in a process of its own, because a process keeps what it has used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time

import torch

from pyreid import get_num_threads, ops

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
        print(
            f"| {size:,} | {times} | {features / 2**20:.1f} MiB | {found['bytes'] / 2**20:.1f} MiB "
            f"| {found['bytes'] / size / 1024:.1f} KiB |",
            flush=True,
        )


def features_of(size: int, dim: int) -> torch.Tensor:
    """Unit rows around centres of 17, as far from them as a half-trained encoder's."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(size, dim, generator=generator)
    rows += torch.randn(size // 17 + 1, dim, generator=generator)[torch.arange(size) // 17]
    return torch.nn.functional.normalize(rows)


def measured(size: int, dim: int, device: str) -> dict:
    ops.pseudo_labels(features_of(200, dim).to(device))  # libraries, threads
    features = features_of(size, dim).to(device)
    with _Peak(device) as peak:
        _, stats = ops.pseudo_labels(features, return_stats=True)
    runs = [stats.seconds]
    for _ in range(4 if sum(stats.seconds.values()) < 5 else 2):
        runs.append(ops.pseudo_labels(features, return_stats=True)[1].seconds)
    seconds = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    return {"seconds": seconds, "bytes": peak.bytes}


class _Peak:
    """The most memory in use inside the block beyond that at its beginning; on the CPU, as the system sees it
    every millisecond."""

    bytes = 0

    def __init__(self, device: str):
        self._cuda, self._ended = device == "cuda", threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> _Peak:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before = _anonymous()
            self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._ended.set()
            self._watch.join()

    def _look(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, _anonymous() - self._before)
            time.sleep(0.001)


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
