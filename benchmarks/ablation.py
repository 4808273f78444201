"""What each part of ICE is worth: whole, without one part or another, and beside Cluster Contrast.

`python -m pyreid.benchmarks.ablation` in a checkout, `python -m pyreid.benchmarks.ablation` elsewhere. Small
encoders learn from scratch, on the CPU, to tell made-up people apart; mAP and rank-1 are those of people and
images that no training has seen. Each run has a thread of its own, and its result is a line in --output: a
command that was stopped goes on where it was, and one that is repeated only prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import pyreid
from pyreid import models, options, people, train
from pyreid.data import ReidData
from pyreid.methods import METHODS

PEOPLE = people.People(ids=100, test_ids=50, cameras=4, images=4, gap=0.3)
TRAINING = train.Training(
    epochs=20,
    steps=50,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=2,
    step_size=15,  # without it, Cluster Contrast falls apart at the end
    height=PEOPLE.height,
    width=PEOPLE.width,
    device="cpu",
    channels_last=True,  # faster, on a CPU
)
CLUSTERING: dict[str, Any] = {"k1": 15, "k2": 4, "eps": 0.4, "instances": 4}
ICE = CLUSTERING | {"teacher_momentum": 0.98}

# What is compared: a method, and its options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ICE": ("ice", ICE),
    "without the camera term": ("ice", ICE | {"camera_weight": 0.0}),
    "without the hard instance term": ("ice", ICE | {"hard_weight": 0.0}),
    "without the soft instance term": ("ice", ICE | {"soft_weight": 0.0}),
    # At the eps of the others it finds too few clusters to begin with, for some seeds.
    "ICE on ca-jaccard": ("ice", ICE | {"variant": "ca-jaccard", "eps": 0.5}),
    "Cluster Contrast": ("cluster-contrast", CLUSTERING),
}


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    drawn = replace(PEOPLE, ids=arguments.ids, test_ids=arguments.test_ids)
    training = replace(TRAINING, epochs=arguments.epochs, steps=arguments.steps)
    training = replace(training, evaluate_every=training.epochs)
    wanted = [
        settings(name, replace(training, seed=seed), drawn)
        for seed in range(1, arguments.seeds + 1)
        for name in arguments.variants
    ]
    output = Path(arguments.output)
    done = [record for record in read(output) if record["settings"] in wanted]
    missing = [each for each in wanted if each not in [record["settings"] for record in done]]
    if missing:
        output.parent.mkdir(parents=True, exist_ok=True)
    for record in made(missing, arguments.jobs):
        done.append(record)
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{len(done):3} of {len(wanted)}: {record['settings']['variant']}, "
            f"seed {record['settings']['training']['seed']}: mAP {record['before']['mAP']:.1%} to "
            f"{record['after']['mAP']:.1%}, {record['seconds']:.0f} s",
            flush=True,
        )
    print("\n" + "\n".join(table(done)))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, with seeds 1, 2, ...")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, a thread each")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--output", metavar="FILE", default="runs/ablation.jsonl")
    parser.add_argument("--epochs", type=int, default=TRAINING.epochs)
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="of an epoch")
    parser.add_argument("--ids", type=int, default=PEOPLE.ids, help="people to train on")
    parser.add_argument("--test-ids", type=int, default=PEOPLE.test_ids, help="others, to test")
    return parser.parse_args(argv)


def settings(name: str, training: train.Training, drawn: people.People) -> dict[str, Any]:
    """All that a run depends on, as its line in the file has it."""
    method, changes = VARIANTS[name]
    found = {
        "variant": name,
        "method": method,
        "config": options.to_dict(METHODS[method].Config(**changes)),
        "training": options.to_dict(training),
        "people": options.to_dict(drawn),
    }
    return json.loads(json.dumps(found))


def read(output: Path) -> list[dict[str, Any]]:
    if not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines()]


# --- the runs


def made(missing: list[dict[str, Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """Their records, as they come."""
    if not missing:
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that begin here
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(missing)), spawned, _one_thread) as pool:
        futures = [pool.submit(record_of, each) for each in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)
    pyreid.set_num_threads(1)


def record_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """The run of these settings, and what came of it."""
    method = METHODS[wanted["method"]]
    training = options.replace(train.Training(), wanted["training"], "training")
    drawn = options.replace(people.People(), wanted["people"], "people")
    data = data_of(drawn)
    torch.manual_seed(training.seed)
    encoder = models.build_encoder("small")
    config = options.replace(method.Config(), wanted["config"], "config")
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # the epochs of all runs at once
        result = train.fit(config, encoder, data, training)
    if result.stopped:
        raise KeyboardInterrupt
    figures = ("mAP", "rank1")
    assert result.before is not None
    assert result.evaluation is not None
    after = result.evaluation.to_dict()
    return {
        "settings": wanted,
        "before": {name: result.before[name] for name in figures},
        "after": {name: after[name] for name in figures},
        "clusters": result.history[-1]["clusters"],
        "seconds": time.perf_counter() - start,
    }


@functools.cache
def data_of(drawn: people.People) -> ReidData:
    return people.people_data(drawn, quiet=True)


# --- the table


def table(records: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: mean and standard deviation over seeds."""
    training, drawn = (records[0]["settings"][part] for part in ("training", "people"))
    yield (
        f"{training['epochs']} epochs of {training['steps']} steps of {training['batch_size']} images, "
        f"{drawn['ids']} people to train on, {drawn['test_ids']} others to test with:"
    )
    yield ""
    yield "| | mAP before | mAP | rank-1 before | rank-1 | ARI of clusters | runs | a run |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in VARIANTS:
        runs = [record for record in records if record["settings"]["variant"] == name]
        if not runs:
            continue
        cells = [
            spread([run[when][figure] for run in runs])
            for figure in ("mAP", "rank1")
            for when in ("before", "after")
        ]
        ari = [run["clusters"]["ari"] for run in runs]
        cells += [spread(ari) if None not in ari else "none", str(len(runs))]
        cells.append(f"{statistics.fmean(run['seconds'] for run in runs):.0f} s")
        yield f"| {' | '.join([name, *cells])} |"


def spread(shares: list[float]) -> str:
    """In percent."""
    mean = f"{100 * statistics.fmean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ± {100 * statistics.stdev(shares):.1f}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("ablation: stopped; the same command goes on")
