"""What an epoch costs, and where in it the time goes.

`python -m benchmarks.cost` in a checkout, `python -m pyreid.benchmarks.cost` elsewhere. It runs `train.fit`'s
own epoch of a method as it is released: features of all images, clusters, steps. Marks between its parts are
set from outside: around the networks and the ops, on the gradients between them, around the optimiser. On
CUDA a mark is an event on the stream, so that nothing waits for it, and time in which the device has nothing
to do counts to the part that kept it waiting. The same steps are also timed without marks.

Two things are not as in a run. The networks begin with random weights, and steps are made on true ids in
place of the clusters found, whose number would say more about the weights than about the cost: there are as
many centroids and proxies as people, as in a run that has learned. Clustering itself is timed as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pyreid import models, ops, people, train
from pyreid.data import ReidData, open_data
from pyreid.methods import METHODS, clustering
from pyreid.people import capture

from .run import describe_machine, machine_line
from .words import duration

# Of a step, in the order of the table. A mark ends the part that it names.
PARTS = (
    "data",
    "encoder, forward",
    "teacher, forward",
    "losses, forward: ops",
    "losses, forward: rest",
    "losses, backward: ops",
    "losses, backward: rest",
    "encoder, backward",
    "optimiser",
    "memory: ops",
    "teacher and memory: rest",
)
STEP = "step"  # a mark at the end of each
STEP_OPS = ("bank_cross_entropy", "mine_negatives", "set_contrast", "memory_update_")
UNMARKED = 21  # steps, at most


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    device = train.device_of(arguments.device)
    machine = describe_machine([])
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["tf32"] = torch.backends.cudnn.allow_tf32
    print(machine_line(machine), flush=True)
    results: list[dict[str, Any]] = []
    with dataset(arguments) as data:
        print(data.summary(), flush=True)
        for setting in settings(arguments):
            print(f"{name_of(setting)} ...", file=sys.stderr, flush=True)
            results.append(measured(arguments, data, device, setting))
            if arguments.json:
                content = {"machine": machine, "arguments": vars(arguments), "results": results}
                Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + "\n".join(table(arguments, device, results)))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    one_network = [name for name in METHODS if name != "gcl"]  # which has gcl_cost
    parser.add_argument("--method", choices=one_network, default="ice")
    parser.add_argument("--encoder", default="resnet50", metavar="NAME", help="as for train")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="made-up people")
    parser.add_argument("--data", metavar="DIR", help="a data set instead of made-up people")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--test-batch", type=int, default=64, help="images of a pass for features")
    parser.add_argument(
        "--steps", type=int, default=5, help="of the epoch, at least 2; released: 400 for ICE"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--precision", default="float32", help="one or more, with commas")
    parser.add_argument("--channels-last", action="store_true", help="with and without it")
    parser.add_argument("--compile", action="store_true", help="with and without it")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    return arguments


def settings(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is compared: all combinations."""
    for compiled, last, precision in itertools.product(
        (False, True) if arguments.compile else (False,),
        (False, True) if arguments.channels_last else (False,),
        arguments.precision.split(","),
    ):
        yield {"precision": precision, "channels_last": last, "compile": compiled}


def name_of(setting: dict[str, Any]) -> str:
    also = [name.replace("_", " ") for name in ("channels_last", "compile") if setting[name]]
    return ", ".join([setting["precision"], *also])


@contextlib.contextmanager
def dataset(arguments: argparse.Namespace) -> Iterator[ReidData]:
    """Images in files, as users have them: reading them is a part of the cost."""
    if arguments.data:
        yield open_data(arguments.data)
        return
    drawn = people.People(test_ids=1, height=arguments.height, width=arguments.width)
    ids = have = 0
    while have < arguments.images:
        have += drawn.images * len(capture.visits(drawn.seed, 2 * ids + 1, drawn.cameras))
        ids += 1
    with tempfile.TemporaryDirectory() as place:
        people.write_market(Path(place, "people"), drawn, ids=ids, workers=arguments.workers)
        data = open_data(Path(place, "people"))
        yield ReidData("people", data.train.select(np.arange(arguments.images)))


def measured(
    arguments: argparse.Namespace, data: ReidData, device: torch.device, setting: dict[str, Any]
) -> dict[str, Any]:
    """An epoch's figures, in seconds; after steps and images to warm up with."""
    method = METHODS[arguments.method]
    training = train.Training(
        **method.recipe
        | setting
        | {
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "height": arguments.height,
            "width": arguments.width,
            "test_batch": arguments.test_batch,
            "workers": arguments.workers,
            "device": str(device),
            "evaluate_every": 0,
        }
    )
    torch.manual_seed(training.seed)
    encoder = models.build_encoder(arguments.encoder, **method.encoder_options)
    run = train._Run(method(encoder), data, training, None, {})
    run.begin(resume=False)
    with contextlib.ExitStack() as stack:
        clock = watch(run, stack)
        few = arguments.test_batch + len(run.images) % arguments.test_batch  # all sizes of batches
        run.extract(run.images.select(np.arange(min(few, len(run.images)))))
        clock.running = True
        reset_peak(device)
        run.label()
        extraction = clock.parts()
        peaks = {"label": peak_bytes(device)}
        clock.running = False
        train_steps(run, 3 if device.type == "cuda" or setting["compile"] else 1)
        reset_peak(device)
        _, unmarked = train_steps(run, UNMARKED)
        clock.running = True
        all_steps, _ = train_steps(run, run.steps)
        peaks["steps"] = peak_bytes(device)
    steps = clock.steps()
    label = run.entry["seconds"]
    found = {
        **setting,
        "images": len(run.images),
        "clusters": run.method.clusters.found,
        "true_ids": int(run.labels.max()) + 1,
        "extract": label["extract"],
        "extract_forward": extraction["encoder, forward"],
        "label": label["label"],
        "parts": {part: statistics.fmean(step[part] for step in steps) for part in PARTS},
        "step": statistics.fmean(sum(step[part] for part in PARTS) for step in steps),
        "step_unmarked": unmarked,
        "steps": training.steps,
        "epoch": label["extract"] + label["label"] + all_steps,
        "peak_bytes": peaks,
    }
    del run, encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def train_steps(run: Any, count: int) -> tuple[float, float]:
    """The first steps of an epoch: seconds of all, and of one, without the first, for which workers begin."""
    count = min(count, run.steps)
    run.step = 0
    wait(run.device)
    start = second = time.perf_counter()

    def after_step() -> bool:
        nonlocal second
        if run.step == 1:
            wait(run.device)
            second = time.perf_counter()
        return run.step >= count

    run.train(after_step)
    wait(run.device)
    end = time.perf_counter()
    return end - start, (end - second) / max(count - 1, 1)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Marks, and the time between them. Stands still until it is `running`."""

    def __init__(self, device: torch.device):
        self.running = False
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """What has been since the last mark was `part`."""
        if self.running:
            self._marks.append((part, self._now()))

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.default_stream(self._device))
        return event

    def parts(self) -> dict[str, float]:
        """Seconds of each part since the first mark; forgets the marks."""
        marks, self._marks = self._marks, []
        return self._parts(marks)

    def steps(self) -> list[dict[str, float]]:
        """The same for each step but the first, which waits for workers to begin."""
        marks, self._marks = self._marks, []
        ends = [k for k, (part, _) in enumerate(marks) if part == STEP]
        return [self._parts(marks[k : end + 1]) for k, end in itertools.pairwise(ends)]

    def _parts(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        wait(self._device)
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in itertools.pairwise(marks):
            on_cpu = self._device.type == "cpu"
            seconds[part] += now - before if on_cpu else before.elapsed_time(now) / 1e3
        return seconds


class Watched(torch.nn.Module):
    """A network whose calls are marked."""

    def __init__(self, network: torch.nn.Module, clock: Clock, before: str, name: str):
        super().__init__()
        self.network, self.clock, self.before, self.name = network, clock, before, name

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.clock.mark(self.before if self.training else "data")
        features = self.network(images)
        self.clock.mark(self.name if self.training else "encoder, forward")
        if features.requires_grad:
            features.register_hook(lambda _: self.clock.mark("losses, backward: rest"))
        return features


def watch(run: Any, stack: contextlib.ExitStack) -> Clock:
    """Sets marks in a run that has begun. What is patched outside of it is put back by the stack."""
    method, clock = run.method, Clock(run.device)
    method.encoder = Watched(method.encoder, clock, "data", "encoder, forward")
    if hasattr(method, "teacher"):
        rest = "losses, forward: rest"
        method.teacher.module = Watched(method.teacher.module, clock, rest, "teacher, forward")
    run.optimizers["all"].register_step_pre_hook(lambda *_: clock.mark("encoder, backward"))
    run.optimizers["all"].register_step_post_hook(lambda *_: clock.mark("optimiser"))
    update = method.update

    def updated(batch: Any) -> None:
        update(batch)
        clock.mark("teacher and memory: rest")
        clock.mark(STEP)

    method.update = updated
    for name in STEP_OPS:
        stack.enter_context(mock.patch.object(ops, name, _watched_op(getattr(ops, name), clock)))

    ids = np.asarray(run.images.ids)
    known = torch.from_numpy(np.unique(ids, return_inverse=True)[1]).to(run.device)

    def clustered(*arguments: Any) -> clustering.Clusters:
        return clustering.cluster(*arguments)._replace(labels=known)

    stack.enter_context(
        mock.patch.object(sys.modules[type(method).__module__], "cluster", clustered)
    )
    return clock


def _watched_op(op: Any, clock: Clock) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if not clock.running:
            return op(*arguments, **options)
        learns = torch.is_grad_enabled()  # else it is the update that calls
        clock.mark("losses, forward: rest" if learns else "teacher and memory: rest")
        result = op(*arguments, **options)
        clock.mark("losses, forward: ops" if learns else "memory: ops")
        node = getattr(result, "grad_fn", None)
        if node is not None:
            node.register_prehook(lambda _: clock.mark("losses, backward: rest"))
            node.register_hook(lambda *_: clock.mark("losses, backward: ops"))
        return result

    return call


# --- memory


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Since the reset: of the device's memory, as torch has it; on a CPU, of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() != "Linux":
        return None
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- the table


def table(
    arguments: argparse.Namespace, device: torch.device, results: list[dict[str, Any]]
) -> Iterator[str]:
    """Markdown, a column for each setting."""
    first = results[0]
    yield (
        f"{arguments.method}, {arguments.encoder}, {arguments.height}x{arguments.width}, batches of "
        f"{arguments.batch_size}, {arguments.workers} workers, {device}; {first['images']:,} images "
        f"of {first['true_ids']:,} people:"
    )
    yield ""
    yield row("", [name_of(result) for result in results])
    yield "|---" * (len(results) + 1) + "|"

    def line(label: str, value: Any) -> str:
        return row(label, [value(result) for result in results])

    yield line("features, images/s", lambda r: f"{r['images'] / r['extract']:,.0f}")
    yield line("features", lambda r: duration(r["extract"]))
    yield line("of it, encoder", lambda r: share(r["extract_forward"], r["extract"]))
    yield line("clusters and proxies", lambda r: duration(r["label"]))
    yield line("a step", lambda r: duration(r["step"]))
    for part in PARTS:
        if not any(result["parts"][part] for result in results):
            continue
        yield line(
            f"of it, {part}",
            lambda r, part=part: (
                f"{duration(r['parts'][part])} ({share(r['parts'][part], r['step'])})"
            ),
        )
    yield line("ops, of a step", lambda r: share(ops_seconds(r), r["step"]))
    yield line("a step without marks", lambda r: duration(r["step_unmarked"]))
    yield line("training, images/s", lambda r: f"{arguments.batch_size / r['step']:,.1f}")
    yield line(f"the epoch, {first['steps']} steps", lambda r: duration(r["epoch"]))
    for label, phase in (("features and clusters", "label"), ("steps", "steps")):
        yield line(f"peak memory, {label}", lambda r, phase=phase: size(r["peak_bytes"][phase]))


def row(label: str, cells: list[str]) -> str:
    return f"| {' | '.join([label, *cells])} |"


def ops_seconds(result: dict[str, Any]) -> float:
    return sum(value for part, value in result["parts"].items() if part.endswith(": ops"))


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def size(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"cost: {error}")
