"""`pyreid bench`: runs the benchmarks and prints one table, ours against the baselines."""

from __future__ import annotations

import importlib
import json
import pkgutil
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pyreid import __version__, _native, get_num_threads, info

from . import timing

HEADER = (
    f"{'op':<16} {'size':<58} {'ours':>10} {'baseline':<18} {'takes':>10} {'ratio':>8} "
    f"{'GB/s':>7} {'of floor':>8}"
)


def op_names() -> list[str]:
    modules = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(m.name.removeprefix("bench_") for m in modules if m.name.startswith("bench_"))


def run(
    ops: list[str], devices: list[str], *, quick: bool = False, json_file: str | None = None
) -> list[dict[str, Any]]:
    """Verifies and measures; prints rows as they come; writes `json_file` after each, so that an
    interrupted run keeps what it has."""
    records: list[dict[str, Any]] = []
    machine = describe_machine(devices)
    print(machine_line(machine), flush=True)
    for device in devices:
        ceilings = timing.ceilings(device)
        print(
            f"\n{device}: copies {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s (read + write), "
            f"multiplies {ceilings['matrix_dtype']} at {ceilings['flops_per_second'] / 1e12:,.2f} TFLOP/s"
        )
        print(HEADER)
        for op in ops:
            bench = importlib.import_module(f"{__package__}.bench_{op}")
            for case in bench.cases(device, quick):
                try:
                    timing.verify(case)
                    result = timing.measure(case, budget=0.4 if quick else 1.5)
                except (MemoryError, torch.OutOfMemoryError) as error:
                    reason = str(error).splitlines()[0]
                    print(f"{case.op:<16} {case.size:<58} left out: {reason}", flush=True)
                    continue
                print("\n".join(rows(result)), flush=True)
                records.append(result.record())
                if json_file:
                    content = {"machine": machine, "results": records}
                    Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    return records


def rows(result: timing.Result):
    case, ours = result.case, result.seconds["ours"]
    start = (
        f"{case.op:<16} {case.size:<58} {_time(ours):>10}",
        f"{case.bytes / ours / 1e9:7.1f} {result.floor_seconds / ours:8.0%}",
    )
    for i, name in enumerate([*case.baselines, *case.bounds]):
        seconds = result.seconds[name]
        head, tail = start if i == 0 else (" " * len(start[0]), "")
        yield f"{head} {name:<18} {_time(seconds):>10} {seconds / ours:7.1f}x {tail}".rstrip()


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def describe_machine(devices: list[str]) -> dict[str, Any]:
    """Whatever a reader needs to place the figures."""
    machine: dict[str, Any] = {
        "pyreid": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "cpu_floor": _native.cpu_variant(),
        "threads": get_num_threads(),
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
