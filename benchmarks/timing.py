"""How everything here is timed: verified first, warmed up, side by side, medians.

On CUDA, device events around each call and a cold L2 before it, and the clock until the result is there; on
the CPU, the clock. Contenders take turns, so that a slow spell of the machine hits all of them alike. The
floor is what a copy and a matrix product of the same machine take for the least work there is, in the same
run.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyreid import _native

from . import memory


@dataclass(frozen=True)
class Growth:
    """A place among cases that differ in N alone, and what ours is expected to grow by."""

    line: str  # what the cases share
    n: int
    time: float  # exponents of N
    memory: float


@dataclass(frozen=True)
class Case:
    """One problem: ours and the baselines, which must agree before either is timed."""

    op: str
    size: str
    device: str
    make: Callable[[], Any]  # a fresh state; every contender gets one of its own
    ours: Callable[[Any], Any]  # state -> tensor or tensors to compare
    baselines: Mapping[str, Callable[[Any], Any]]
    bytes: int = 0  # the fewest that must move through memory
    flops: int = 0  # the fewest operations, all of them in matrix products
    tolerance: float = 1e-5
    bounds: Mapping[str, Callable[[Any], Any]] = field(
        default_factory=dict
    )  # compute a part: not compared
    compared: Callable[[Any], Any] = lambda result: result  # what of a result must agree
    growth: Growth | None = None
    needs: Mapping[str, int] = field(default_factory=dict)  # contender -> bytes beyond its state
    patience: float = 0.0  # seconds that a baseline may take, if more than the run allows
    headline: bool = True  # in the README too
    whole: bool = False  # a part of training, network and all, rather than an op

    def __str__(self) -> str:
        return f"{self.device}-{self.size}".replace(" ", "_")


def sizes(quick: bool, most: int = 1_000_000) -> list[int]:
    """Rows: small, Market-1501, DukeMTMC-reID, MSMT17, and more."""
    known = (3000, 6000, 12_936) if quick else (3000, 12_936, 16_522, 32_621, 100_000, 1_000_000)
    return [size for size in known if size <= most]


@dataclass
class Result:
    """Of each contender: "ours", every baseline and bound that was not left out."""

    case: Case
    seconds: dict[str, float]  # median; on CUDA of the device's own time
    wall: dict[str, float]  # median, until the result is there
    spread: dict[str, float]  # half the distance between quartiles, relative to the median
    runs: dict[str, int]
    peak: dict[str, int | None]  # bytes beyond the state
    left_out: dict[str, str]  # contender -> why
    ceilings: dict[str, Any]

    @property
    def floor_seconds(self) -> float:
        return floor_seconds(self.case, self.ceilings)

    @property
    def bound_by(self) -> str:
        by_memory = self.case.bytes / self.ceilings["bytes_per_second"]
        return "memory" if self.floor_seconds == by_memory else "products"

    def record(self) -> dict[str, Any]:
        case, ours = self.case, self.seconds["ours"]
        return {
            "op": case.op,
            "size": case.size,
            "device": case.device,
            "headline": case.headline,
            "whole": case.whole,
            "seconds": self.seconds,
            "wall_seconds": self.wall,
            "spread": self.spread,
            "runs": self.runs,
            "peak_bytes": self.peak,
            "bounds": list(case.bounds),
            "left_out": self.left_out,
            "bytes": case.bytes,
            "flops": case.flops,
            "bytes_per_second": case.bytes / ours,
            "flops_per_second": case.flops / ours,
            "floor_seconds": self.floor_seconds,
            "bound_by": self.bound_by,
            "growth": vars(case.growth) if case.growth else None,
        }


class LeftOut(Exception):
    """A case that cannot be run here, and why."""


def floor_seconds(case: Case, ceilings: Mapping[str, Any]) -> float:
    """The time that memory or arithmetic alone would take on this machine."""
    return max(case.bytes / ceilings["bytes_per_second"], case.flops / ceilings["flops_per_second"])


def verify(case: Case, *names: str) -> None:
    """Raises AssertionError, naming the baseline, unless it computes what ours does. Default: all."""
    expected = case.compared(case.ours(case.make()))
    for name in names or case.baselines:
        _compare(case, name, case.baselines[name](case.make()), expected)


def _compare(case: Case, name: str, result: Any, expected: Any) -> None:
    torch.testing.assert_close(
        case.compared(result),
        expected,
        rtol=case.tolerance,
        atol=case.tolerance,
        msg=lambda text: f"{case.op} {case.size}: '{name}' disagrees: {text}",
    )


def pytest_benchmark(case: Case, contender: str, benchmark) -> None:
    """One contender under pytest-benchmark, as `pytest benchmarks` runs it."""
    if contender in case.baselines:
        verify(case, contender)
    call = {"ours": case.ours, **case.baselines, **case.bounds}[contender]
    state = case.make()

    def timed():
        call(state)
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {case}"
    benchmark(timed)


def measure(
    case: Case,
    budget: float = 1.5,
    patience: float = 5.0,
    foretold: Callable[[str], float] = lambda name: 0.0,
) -> Result:
    """Verifies all contenders, then times them side by side, for about `budget` seconds each.

    Whoever does not fit into memory, or is foretold to take longer than `patience` seconds, or raises an
    error, is left out, and it is said why; whoever disagrees is an AssertionError. Ours is given 6 times as
    long, and LeftOut is raised if it is to take longer still. The calls that verify are the warm-up. What
    takes longer than 2 budgets is run twice more, and what takes longer than 6 not again: it has the runs for
    verifying and for memory.
    """
    left_out: dict[str, str] = {}
    contenders = {"ours": case.ours, **case.baselines, **case.bounds}
    floor = floor_seconds(case, ceilings(case.device))
    for name in list(contenders):
        reason = _no_room(case, name)
        own = name == "ours"
        seconds = max(foretold(name), floor if own else 0.0)
        if seconds > (6 * patience if own else max(patience, case.patience)):
            reason = f"would take {seconds:,.0f} s"
        if reason and own:
            raise LeftOut(reason)
        if reason:
            left_out[name] = reason
            del contenders[name]

    states = {name: case.make() for name in contenders}
    calls = {name: lambda c=call, s=states[name]: c(s) for name, call in contenders.items()}
    once: dict[str, list[_Timed]] = {}
    for name, call in list(calls.items()):
        try:
            once[name] = [_Timed(case.device, call)]
        except (RuntimeError, MemoryError, ImportError, AttributeError, TypeError) as error:
            if name == "ours":
                raise
            reason = str(error).split("\n")[0] or type(error).__name__
            left_out[name] = f"failed: {reason}"
            del calls[name]
    expected = case.compared(once["ours"][0].result)
    for name in case.baselines:
        if name in once:
            _compare(case, name, once[name][0].result, expected)
    del expected
    for (first,) in once.values():
        first.result = None
    peak: dict[str, int | None] = {}
    gc.collect()
    for name, call in calls.items():
        before = memory.begin(case.device)
        again = _Timed(case.device, call)
        peak[name] = memory.end(case.device, before)
        again.result = None
        once[name].append(again)

    samples: dict[str, list[_Timed]] = {}
    repeats: dict[str, int] = {}
    for name, known in once.items():
        seconds = min(timed.wall for timed in known)
        few = 0 if seconds > 6 * budget else 2 if seconds > 2 * budget else 5
        repeats[name] = max(few, min(200, int(budget / max(seconds, 1e-6))))
        samples[name] = [] if repeats[name] else known
    for turn in range(max(repeats.values())):
        for name, call in calls.items():
            if turn < repeats[name]:
                timed = _Timed(case.device, call)
                timed.result = None
                samples[name].append(timed)
    return Result(
        case,
        {name: statistics.median(t.seconds for t in timed) for name, timed in samples.items()},
        {name: statistics.median(t.wall for t in timed) for name, timed in samples.items()},
        {name: _spread([t.seconds for t in timed]) for name, timed in samples.items()},
        {name: len(timed) for name, timed in samples.items()},
        peak,
        left_out,
        ceilings(case.device),
    )


def _no_room(case: Case, name: str) -> str | None:
    needs, free = case.needs.get(name, 0), memory.free_bytes(case.device)
    if free is None or needs <= 0.9 * free:
        return None
    return f"needs {needs / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free"


def _spread(times: list[float]) -> float:
    if len(times) < 3:
        return (max(times) - min(times)) / 2 / statistics.median(times)
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


class _Timed:
    """One call: seconds of the device, and of the clock until its result is there; on a CPU they are one."""

    def __init__(self, device: str, call: Callable[[], Any]):
        if device == "cpu":
            start = time.perf_counter()
            self.result = call()
            self.seconds = self.wall = time.perf_counter() - start
            return
        _flush_l2()
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        start = time.perf_counter()
        events[0].record()
        self.result = call()
        events[1].record()
        torch.cuda.synchronize()
        self.wall = time.perf_counter() - start
        self.seconds = events[0].elapsed_time(events[1]) / 1e3


def _time(device: str, call: Callable[[], Any]) -> float:
    return _Timed(device, call).seconds


@functools.cache
def _l2_sized_buffer() -> torch.Tensor:
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(4 * size, dtype=torch.uint8, device="cuda")


def _flush_l2() -> None:
    _l2_sized_buffer().zero_()


known_ceilings: dict[str, dict[str, Any]] = {}


def ceilings(device: str) -> dict[str, Any]:
    """What this machine can do, measured once a run, at first use."""
    if device not in known_ceilings:
        known_ceilings[device] = _ceilings(device)
    return known_ceilings[device]


def _ceilings(device: str) -> dict[str, Any]:
    """Bytes read plus written, and matrix operations, a second."""
    size = 2**26 if device == "cpu" else 2**28
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = min(_time(device, lambda: target.copy_(source)) for _ in range(9))
    rates = {str(t).removeprefix("torch."): _matrix_rate(device, t) for t in _DTYPES[device]}
    best = max(rates, key=lambda name: rates[name])
    return {
        "bytes_per_second": 2 * source.numel() * source.element_size() / copy,
        "flops_per_second": rates[best],
        "matrix_dtype": best,
        "rates": rates,
    }


_DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.float16, torch.bfloat16]}


def _matrix_rate(device: str, dtype: torch.dtype) -> float:
    side = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu":  # the better of torch's product and the floor's own
        calls.append(lambda: _native.cpu().product(a, b, out, 0))
    for call in calls:
        call()
    return 2 * side**3 / min(_time(device, call) for call in calls for _ in range(9))


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
