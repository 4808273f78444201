"""`pyreid demo`: a method learns to tell made-up people apart, from images without labels, in minutes on a
CPU."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyreid import evaluation, meshes, models, options, people, pictures, report, stages, train
from pyreid.data import ANGLES, MeshedImages, ReidData, transforms
from pyreid.methods import GCL, METHODS
from pyreid.quality import ssim

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


# GCL's three stages; the first is another method's.
WARMUP = METHODS["ice"].Config(variant="ca-jaccard", eps=0.5, teacher_momentum=0.95)
GCL_CONFIG = GCL.Config(
    variant="ca-jaccard",
    rho=None,
    eps=0.4,
    generator_width=8,
    discriminator_width=8,
    discriminator_scales=2,
    gan_rate=1e-3,
    gan_rate_joint=2e-4,
    gan_momentum=0.5,
    adversarial_weight=0.05,
    appearance_weight=0.25,
    contrast_weight=2.0,
    negatives=512,
    temperature=0.1,
)
GCL_NETWORK: dict[str, Any] = {"embedding": 256}
GCL_TRAININGS = {
    1: dataclasses.replace(TRAINING, epochs=12, step_size=8),
    2: dataclasses.replace(
        TRAINING,
        epochs=12,
        steps=None,
        batch_size=8,
        weight_decay=0.0,
        warmup_epochs=0,
        step_size=9,
        gamma=0.3,
        evaluate_every=0,
        channels_last=False,
    ),
    3: dataclasses.replace(
        TRAINING,
        epochs=8,
        steps=None,
        batch_size=32,
        optimizer="sgd",
        learning_rate=5e-3,
        weight_decay=5e-4,
        warmup_epochs=0,
        step_size=6,
        gamma=0.2,
        evaluate_every=2,
        channels_last=False,
    ),
}
_SHOWN, _JUDGED = 8, 60  # photos in the grid of views, and those whose views are judged


def main(output: str, method: str = "ice") -> int:
    if method == "gcl":
        return _in_stages(Path(output))
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


def _in_stages(folder: Path) -> int:
    """GCL: three runs, and pictures of people who were turned."""
    for stage in stages.STAGES:
        (folder / f"stage{stage}" / train.CHECKPOINT).unlink(missing_ok=True)  # of an earlier demo
    start = time.perf_counter()
    data = bodied(people.people_data(PEOPLE), PEOPLE)
    print(f"{data.summary()}\n(drawn in {time.perf_counter() - start:.1f} s)\n", flush=True)
    found = trained_in_stages(data, 1, folder)
    if found[max(found)].result.stopped:
        return 130
    results: dict[str, Any] = {
        "untrained": found[1].result.before,
        "stage 1": found[1].result.evaluation,
        "stage 3": found[3].result.evaluation,
    }
    print(f"\n{evaluation.summary(results)}\n")
    for stage, (_, result) in found.items():
        spent = sum(sum(entry["seconds"].values()) for entry in result.history)
        print(f"stage {stage}: {len(result.history)} epochs, {spent:.0f} s")
    views = turned_views(found[3].method, PEOPLE)
    print(f"\n{views.summary()}\n")
    sheet = views.sheet(_SHOWN)
    page = report.write_report(
        folder,
        title="GCL on made-up people",
        results=results,
        history=found[3].result.history,
        drawn=[
            report.Picture("Generated views", "Test people turned", sheet, views.summary()),
            *report.draw(
                data.stills(),
                evaluation.extract_data(
                    found[3].result.encoder, data.stills(), **GCL_TRAININGS[3].extraction
                ),
                found[3].result.labels,
            ),
        ],
        data=data,
        settings={
            "people": options.to_dict(PEOPLE),
            "method": options.to_dict(GCL_CONFIG),
            **{
                f"stage {stage}": options.to_dict(training)
                for stage, training in GCL_TRAININGS.items()
            },
        },
    )
    (folder / "views.png").write_bytes(pictures.png(sheet))
    with (folder / "views.json").open("w") as file:
        json.dump(views.figures(), file, indent=1)
    print(f"views:   {folder / 'views.png'}\nreport:  {page}")
    print(f"\n{time.perf_counter() - start:.0f} s in all. Open {page}, or read docs/gcl.md.")
    return 0


def bodied(data: ReidData, drawn: people.People) -> ReidData:
    """Made-up people with the pictures of their bodies."""
    bodies = meshes.people_meshes(drawn, "train")
    return dataclasses.replace(data, train=MeshedImages(data.train, bodies))


def trained_in_stages(
    data: ReidData, seed: int, folder: Path | None, **training: Any
) -> dict[int, stages.Stage]:
    """The demo's GCL; `training`: changes to the options of all stages."""
    trainings = {
        stage: dataclasses.replace(each, seed=seed, **training)
        for stage, each in GCL_TRAININGS.items()
    }
    torch.manual_seed(seed)
    encoder = models.build_part_encoder("small", **GCL_NETWORK)
    return stages.train_stages(
        encoder, data, GCL_CONFIG, warmup=WARMUP, trainings=trainings, output=folder
    )


@dataclasses.dataclass(frozen=True)
class Views:
    """Photos of people whom the generator has not seen, what it makes of them at eight angles, and what
    would really be seen. (B, 8, H, W, 3) uint8 but where said otherwise."""

    photos: np.ndarray  # (B, H, W, 3)
    generated: np.ndarray
    truth: np.ndarray
    cycled: np.ndarray  # (B, H, W, 3)
    bodies: np.ndarray  # (B, 8, H, W) bool, where the body is

    def figures(self) -> dict[str, float]:
        """Mean SSIM to the truth over the seven turned views, of what was generated and of the photo itself:
        over the whole picture, and within the silhouette of the turned body. And of the reconstruction."""
        turned, truth = (_planes(each[:, 1:]) for each in (self.generated, self.truth))
        copied = _planes(np.broadcast_to(self.photos[:, None], self.truth[:, 1:].shape))
        inside = torch.from_numpy(self.bodies[:, 1:]).flatten(0, 1)
        found = {
            "generated": ssim(turned, truth),
            "copied": ssim(copied, truth),
            "generated, body": ssim(turned, truth, inside),
            "copied, body": ssim(copied, truth, inside),
            "reconstructed": ssim(_planes(self.generated[:, :1]), _planes(self.photos[:, None])),
        }
        return {name: float(values.nanmean()) for name, values in found.items()}

    def summary(self) -> str:
        found = self.figures()
        return (
            f"{len(self.photos)} photos of test people turned by 45 to 315 degrees. SSIM to what would be "
            "seen: "
            f"{found['generated, body']:.3f} within the body's silhouette, where the photo as it is has "
            f"{found['copied, body']:.3f}; {found['generated']:.3f} over the whole picture, whose background "
            f"the photo has as it is: {found['copied']:.3f}."
        )

    def sheet(self, rows: int) -> Image.Image:
        chosen = np.linspace(0, len(self.photos) - 1, min(rows, len(self.photos))).astype(int)
        return pictures.view_grid(
            [Image.fromarray(self.photos[row]) for row in chosen],
            self.generated[chosen],
            self.cycled[chosen],
            truth=self.truth[chosen],
            angles=ANGLES,
        )


def turned_views(method: GCL, drawn: people.People) -> Views:
    """Of queries from the first to the last: all people, and the cameras as they come."""
    data = people.people_data(drawn, quiet=True)
    assert data.query is not None
    rows = np.unique(np.linspace(0, len(data.query) - 1, _JUDGED).astype(int))
    bodies = meshes.people_meshes(drawn, "query", quiet=True)
    pixels = np.stack([[bodies.at(row, turn) for turn in range(len(ANGLES))] for row in rows])
    view: Any = transforms.make("plain", drawn.height, drawn.width)
    photos = [data.query[int(row)][0] for row in rows]
    device = next(method.parameters()).device
    generated, cycled = method.render(
        torch.stack([view(photo) for photo in photos]).to(device),
        (torch.from_numpy(pixels)[:, :, None].float() / 127.5 - 1).to(device),
    )
    return Views(
        np.stack([np.asarray(photo) for photo in photos]),
        transforms.pixels(generated),
        people.turned_photos(drawn, "query", rows.tolist()),
        transforms.pixels(cycled),
        pixels < 255,
    )


def _planes(images: np.ndarray) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]."""
    flat = torch.from_numpy(np.ascontiguousarray(images)).flatten(0, -4)
    return flat.permute(0, 3, 1, 2).double() / 255
