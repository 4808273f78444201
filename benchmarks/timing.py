"""How everything here is timed: verified first, warmed up, side by side, medians.

On CUDA, device events around each call and a cold L2 before it; on the CPU, the wall clock. Contenders take
turns, so that a slow spell of the machine hits all of them alike.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pyreid import _native


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

    def __str__(self) -> str:
        return f"{self.device}-{self.size}".replace(" ", "_")


@dataclass
class Result:
    case: Case
    seconds: dict[str, float]  # median, "ours", every baseline and bound
    spread: dict[str, float]  # half the distance between quartiles, relative to the median
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def floor_seconds(self) -> float:
        """The time that memory or arithmetic alone would take on this machine."""
        return max(
            self.case.bytes / self.ceilings["bytes_per_second"],
            self.case.flops / self.ceilings["flops_per_second"],
        )

    def record(self) -> dict[str, Any]:
        return {
            "op": self.case.op,
            "size": self.case.size,
            "device": self.case.device,
            "seconds": self.seconds,
            "spread": self.spread,
            "bytes": self.case.bytes,
            "flops": self.case.flops,
            "floor_seconds": self.floor_seconds,
        }


def verify(case: Case) -> None:
    """Raises AssertionError, naming the baseline, unless all contenders compute the same."""
    expected = case.compared(case.ours(case.make()))
    for name, baseline in case.baselines.items():
        torch.testing.assert_close(
            case.compared(baseline(case.make())),
            expected,
            rtol=case.tolerance,
            atol=case.tolerance,
            msg=lambda text, name=name: f"{case.op} {case.size}: '{name}' disagrees: {text}",
        )


def pytest_benchmark(case: Case, contender: str, benchmark) -> None:
    """One contender under pytest-benchmark, as `pytest benchmarks` runs it."""
    verify(case)
    call = {"ours": case.ours, **case.baselines, **case.bounds}[contender]
    state = case.make()

    def timed():
        call(state)
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {case}"
    benchmark(timed)


def measure(case: Case, budget: float = 1.5) -> Result:
    """Times all contenders, for about `budget` seconds each."""
    contenders = {"ours": case.ours, **case.baselines, **case.bounds}
    states = {name: case.make() for name in contenders}
    once = {
        name: _time(case.device, lambda c=call, s=states[name]: c(s))
        for name, call in contenders.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    repeats = {name: max(5, min(200, int(budget / max(once[name], 1e-6)))) for name in contenders}
    for turn in range(max(repeats.values())):
        for name, call in contenders.items():
            if turn < repeats[name]:
                samples[name].append(_time(case.device, lambda c=call, s=states[name]: c(s)))
    return Result(
        case,
        {name: statistics.median(times) for name, times in samples.items()},
        {name: _spread(times) for name, times in samples.items()},
        ceilings(case.device),
    )


def _spread(times: list[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def _time(device: str, call: Callable[[], Any]) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    _flush_l2()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


@functools.cache
def _l2_sized_buffer() -> torch.Tensor:
    size = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(4 * size, dtype=torch.uint8, device="cuda")


def _flush_l2() -> None:
    _l2_sized_buffer().zero_()


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """What this machine can do, measured now: bytes read plus written, and matrix operations, a second."""
    size = 2**26 if device == "cpu" else 2**30
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(_time(device, lambda: target.copy_(source)) for _ in range(9))
    side, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    _time(device, lambda: a @ b)
    product = statistics.median(_time(device, lambda: a @ b) for _ in range(9))
    if device == "cpu":  # the better of torch's product and the floor's own
        out, module = torch.empty_like(a), _native.cpu()
        own = statistics.median(
            _time(device, lambda: module.product(a, b, out, 0)) for _ in range(9)
        )
        product = min(product, own)
    return {
        "bytes_per_second": 2 * source.numel() * source.element_size() / copy,
        "flops_per_second": 2 * side**3 / product,
        "matrix_dtype": str(dtype).removeprefix("torch."),
    }


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
