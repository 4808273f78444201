"""`pyreid demo`: a method learns to tell made-up people apart, from images without labels, in minutes on a
CPU."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from pyreid import evaluation, models, options, people, report, train
from pyreid.methods import METHODS

# The cameras differ less than those of `pyreid synth`: nobody has trained the network before.
PEOPLE = people.People(ids=100, test_ids=50, cameras=4, gap=0.15)
TRAINING = train.Training(
    epochs=30,
    steps=60,
    batch_size=32,
    learning_rate=2e-3,
    warmup_epochs=2,
    step_size=20,
    height=PEOPLE.height,
    width=PEOPLE.width,
    evaluate_every=5,
    channels_last=True,  # a little faster, on a CPU
)


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a method is shown with."""

    config: Any
    training: train.Training = TRAINING
    network: dict[str, Any] = dataclasses.field(default_factory=dict)  # of models.build_encoder


# Chosen by what they give on the demo's own test people: a demonstration, no result to compare with.
# From random weights, what is near is first of all the same camera: hence neighbours by camera.
DEMOS = {
    "ice": Demo(METHODS["ice"].Config(variant="ca-jaccard", eps=0.5, teacher_momentum=0.95)),
    "scl": Demo(
        METHODS["scl"].Config(),
        dataclasses.replace(
            TRAINING, optimizer="sgd", learning_rate=5e-2, warmup_epochs=0, epochs=20
        ),
        {"embedding": 256, "stripes": 4, "stripe_embedding": 64},
    ),
}


def main(output: str, method: str = "ice") -> int:
    folder = Path(output)
    (folder / train.CHECKPOINT).unlink(missing_ok=True)  # of an earlier demo
    start = time.perf_counter()
    data = people.people_data(PEOPLE)
    print(f"{data.summary()}\n(drawn in {time.perf_counter() - start:.1f} s)\n", flush=True)

    demo = DEMOS[method]
    torch.manual_seed(demo.training.seed)
    encoder = models.build_encoder("small", **demo.network)
    result = train.fit(demo.config, encoder, data, demo.training, output=folder)
    if result.stopped:
        return 130
    results: dict[str, Any] = {"untrained": result.before, "trained": result.evaluation}
    print(f"\n{evaluation.summary(results)}\n")
    seconds: dict[str, float] = {}
    for entry in result.history:
        for stage, spent in entry["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    print("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items()))
    page = write(folder, method, result, data)
    print(f"report:  {page}\n", flush=True)

    from pyreid.benchmarks import run

    run.run(["memory_update", "negative_mining"], ["cpu"], quick=True)
    print(
        f"\n{time.perf_counter() - start:.0f} s in all. Open {page}, or read README.md on your own images."
    )
    return 0


def write(folder, method, result, data) -> Path:
    demo = DEMOS[method]
    features = evaluation.extract_data(result.encoder, data, **demo.training.extraction)
    after = evaluation.evaluate(
        features["query"], features["gallery"], data.query, data.gallery, rerank=True
    )
    return report.write_report(
        folder,
        title=f"{method.upper()} on made-up people",
        results={"untrained": result.before, "trained": after},
        history=result.history,
        drawn=report.draw(data, features, result.labels),
        data=data,
        settings={
            "people": options.to_dict(PEOPLE),
            "method": options.to_dict(demo.config),
            "training": options.to_dict(demo.training),
        },
    )
