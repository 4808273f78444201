"""`pyreid bench`: runs the benchmarks and tells: a table as they come, JSON, a page with pictures."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyreid import __version__, _native, get_num_threads, info

from . import compare, page, peers, store, timing, words

BUDGETS = {True: (0.3, 3.0), False: (0.8, 4.0)}  # quick or not: seconds a contender, patience
HEADER = (
    f"{'op':<18} {'size':<58} {'ours':>9} {'peak':>9}  {'baseline':<36} {'takes':>9} {'ratio':>8} "
    f"{'peak':>9} {'GB/s':>6} {'TFLOP/s':>8} {'of floor':>8}"
)


def op_names() -> list[str]:
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(m.name.removeprefix("bench_") for m in modules if m.name.startswith("bench_"))


def run(
    ops: Sequence[str],
    devices: Sequence[str],
    *,
    quick: bool = False,
    json_file: str | None = None,
    html_file: str | None = None,
    compare_file: str | None = None,
    resume: bool = False,
    limit: float | None = None,
) -> int:
    """Verifies and measures; prints rows as they come; writes `json_file` after each, so that an interrupted
    run keeps what it has.

    Args:
        html_file: the page, written at the end and when interrupted.
        compare_file: an older `json_file`, for verdicts.
        resume: take what `json_file` has, if it is of this machine and version, and measure the rest.
        limit: seconds, after which no case is begun any more.

    Returns:
        An exit status: 1 where a contender failed or disagreed, or ours is slower than it was; 130 where
        interrupted.
    """
    old = store.read(compare_file) if compare_file else None
    machine = describe_machine(devices)
    suite = Suite(machine, quick, json_file, limit)
    if resume:
        suite.resume()
    print(machine_line(machine), flush=True)
    status = 0
    try:
        for device in devices:
            print(f"\n{ceilings_line(device, machine['ceilings'][device])}\n{HEADER}", flush=True)
            for op in ops:
                try:
                    bench = importlib.import_module(f"{__package__}.bench_{op}")
                except ImportError as error:  # a baseline's library
                    suite.leave_out({"op": op, "size": "", "device": device}, str(error))
                    continue
                for case in bench.cases(device, quick):
                    suite.take(case)
        suite.content["complete"] = not suite.late
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept", file=sys.stderr)
        status = 130
    suite.save()
    status = status or int(bool(suite.content["failed"]))
    if old:
        verdicts = compare.verdicts(old, suite.content)
        print("\n" + "\n".join(compare.lines(old, suite.content, verdicts)))
        suite.content["compared"] = compare.told(old, verdicts)
        suite.save()
        status = status or int(any(verdict.kind == "slower" for verdict in verdicts))
    if html_file:
        store.write(html_file, page.page(suite.content))
    return status


class Suite:
    """What was measured so far, on disk after every case."""

    def __init__(
        self, machine: dict[str, Any], quick: bool, json_file: str | None, limit: float | None
    ):
        self.file = json_file
        self.content: dict[str, Any] = {
            "format": store.FORMAT,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "command": "pyreid bench" + (" --quick" if quick else ""),
            "quick": quick,
            "complete": False,
            "machine": machine,
            "results": [],
            "left_out": [],
            "failed": [],
        }
        self.late = False
        self._budget, self._patience = BUDGETS[quick]
        self._end = math.inf if limit is None else time.monotonic() + limit
        self._had: dict[tuple, dict] = {}

    def resume(self) -> None:
        if not self.file:
            raise ValueError("resume needs a file: give --json too")
        if not Path(self.file).exists():
            return
        old = store.read(self.file)
        was, now = old["machine"], self.content["machine"]
        for what in ("pyreid", "commit", "torch", "processor", "cpu_floor", "threads", "gpu"):
            if was.get(what) != now.get(what):
                raise ValueError(f"{self.file} has {what} {was.get(what)}, this is {now.get(what)}")
        if old["quick"] != self.content["quick"]:
            raise ValueError(
                f"{self.file} was made {'with' if old['quick'] else 'without'} --quick"
            )
        self.content["machine"] = was  # its floors are what the old percentages are of
        timing.known_ceilings.update(was["ceilings"])
        self._had = {key(record): record for record in old["results"]}

    def take(self, case: timing.Case) -> None:
        name = {"op": case.op, "size": case.size, "device": case.device}
        if key(name) in self._had:
            self.content["results"].append(self._had[key(name)])
            return
        if time.monotonic() > self._end:
            self.late = True
            self.leave_out(name, "no time was left")
            return
        try:
            budget = self._budget if case.headline else self._budget / 2
            result = timing.measure(case, budget, self._patience, self._forecast(case))
        except timing.LeftOut as error:
            self.leave_out(name, str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.leave_out(name, str(error).split("\n")[0] or "out of memory")
        except (AssertionError, RuntimeError, TypeError, ValueError, ImportError) as error:
            self.content["failed"].append(name | {"reason": str(error)})
            print(f"{title(name)} FAILED: {error}", flush=True)
        else:
            record = result.record()
            self.content["results"].append(record)
            print("\n".join(rows(record)), flush=True)
        self.save()

    def leave_out(self, name: dict[str, str], reason: str) -> None:
        self.content["left_out"].append(name | {"reason": reason})
        print(f"{title(name)} left out: {reason}", flush=True)

    def _forecast(self, case: timing.Case) -> Any:
        """How long a contender will take, by how it has grown with N so far."""

        def seconds(contender: str) -> float:
            known = points(self.content["results"], case, contender)
            if not known:
                return 0.0
            n, last = known[-1]
            exponent = case.growth.time
            if len(known) > 1:
                exponent = math.log(last / known[-2][1]) / math.log(n / known[-2][0])
            return last * (case.growth.n / n) ** max(exponent, 0.0)

        return seconds

    def save(self) -> None:
        if self.file:
            store.write(self.file, json.dumps(self.content, indent=1) + "\n")


def key(record: dict[str, Any]) -> tuple:
    return record["device"], record["op"], record["size"]


def title(record: dict[str, Any]) -> str:
    return f"{record['op']:<18} {record['size']:<58}"


def points(results: list[dict], case: timing.Case, contender: str) -> list[tuple[int, float]]:
    """(N, seconds) of a contender, of the cases on the same line with smaller N."""
    if case.growth is None:
        return []
    return sorted(
        (record["growth"]["n"], record["seconds"][contender])
        for record in results
        if (record["op"], record["device"]) == (case.op, case.device)
        and record["growth"]
        and record["growth"]["line"] == case.growth.line
        and record["growth"]["n"] < case.growth.n
        and contender in record["seconds"]
    )


def rows(record: dict[str, Any]):
    """A result's lines of the table."""
    ours = record["seconds"]["ours"]
    peak = words.size(record["peak_bytes"]["ours"])
    head = f"{title(record)} {words.duration(ours):>9} {peak:>9} "
    tail = ""
    if floor := record["floor_seconds"]:
        tail = (
            f"{record['bytes_per_second'] / 1e9:6.1f} {record['flops_per_second'] / 1e12:8.2f} "
            f"{floor / ours:8.0%}"
        )
    for i, (name, seconds) in enumerate(list(record["seconds"].items())[1:]):
        bound, ratio = name in record["bounds"], f"{seconds / ours:.1f}"
        yield (
            f"{head if i == 0 else ' ' * len(head)} {name:<36} {words.duration(seconds):>9} "
            f"{f'({ratio})' if bound else f'{ratio} ':>8} {words.size(record['peak_bytes'][name]):>9} "
            f"{tail if i == 0 else ''}"
        ).rstrip()
    if len(record["seconds"]) == 1:
        yield f"{head} {'':<36} {'':>9} {'':>8} {'':>9} {tail}".rstrip()
    for name, reason in record["left_out"].items():
        yield f"{' ' * len(head)} {name:<36} left out: {reason}"


def describe_machine(devices: Sequence[str]) -> dict[str, Any]:
    """Whatever a reader needs to place the figures."""
    peers.set_threads()
    machine: dict[str, Any] = {
        "pyreid": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cpu_floor": _native.cpu_variant(),
        "threads": get_num_threads(),
        "versions": peers.versions(),
        "ceilings": {device: timing.ceilings(device) for device in devices},
    }
    if "cuda" in devices:
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        machine["info"] = info.report()
    return machine


def machine_line(machine: dict[str, Any]) -> str:
    gpu = f"; {machine['gpu']}" if "gpu" in machine else ""
    return (
        f"pyreid {machine['pyreid']} ({machine['commit']}), torch {machine['torch']}, "
        f"{machine['processor']}, {machine['threads']} threads{gpu}"
    )


def ceilings_line(device: str, ceilings: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:,.2f}" for name, rate in ceilings["rates"].items())
    return (
        f"{device}: copies {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s (read + write), "
        f"matrix products in TFLOP/s: {rates}"
    )


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        place = Path(__file__).parent
        return subprocess.run(
            command, cwd=place, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
