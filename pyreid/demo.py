"""`pyreid demo`: ICE learns to tell made-up people apart, from images without labels, in minutes on a CPU."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from pyreid import evaluation, models, people, report, train
from pyreid.methods import METHODS

PEOPLE = people.People(ids=120, test_ids=60, cameras=4, height=64, width=32)
TRAINING = train.Training(
    epochs=10,
    steps=40,
    batch_size=32,
    warmup_epochs=2,
    learning_rate=1e-3,
    height=PEOPLE.height,
    width=PEOPLE.width,
    evaluate_every=2,
)


def main(output: str) -> int:
    folder = Path(output)
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    data = people.people_data(PEOPLE)
    print(f"{data.summary()}\n(drawn in {time.perf_counter() - start:.1f} s)\n", flush=True)

    torch.manual_seed(TRAINING.seed)
    encoder = models.build_encoder("small")
    before = evaluate(encoder, data)
    print(f"untrained: {brief(before)}\n", flush=True)
    method = METHODS["ice"]
    result = train.fit(method.Config(), encoder, data, TRAINING, output=folder)
    if result.stopped:
        return 130
    print(f"\ntrained:   {brief(result.evaluation)}")
    print(f"untrained: {brief(before)}\n")
    seconds = {}
    for entry in result.history:
        for stage, spent in entry["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    print("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items()))
    page = report.of_run(folder, result, data, TRAINING, before=before)
    print(f"report:  {page}\n", flush=True)

    from pyreid.benchmarks import run

    run.run(["memory_update", "negative_mining"], ["cpu"], quick=True)
    print(
        f"\n{time.perf_counter() - start:.0f} s in all. Open {page}, or read README.md on your own images."
    )
    return 0


def evaluate(encoder, data) -> evaluation.Evaluation:
    return evaluation.evaluate_data(encoder, data, height=PEOPLE.height, width=PEOPLE.width)


def brief(found) -> str:
    return f"mAP {float(found.ranking.mAP):6.1%}, rank-1 {float(found.ranking.cmc[0]):6.1%}"
