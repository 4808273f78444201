"""What a step of GCL costs, stage by stage: steps per second, and the memory it takes.

`python -m benchmarks.gcl_cost` in a checkout, `python -m pyreid.benchmarks.gcl_cost` elsewhere. It runs
`train.fit`'s own steps, of the released sizes: ResNet-50, 16 photos of 256x128, a bank of Market-1501's size
and 8192 negatives. Photos and bodies are noise in memory, the bank is random and its clusters are given:
neither extraction nor clustering is timed. A line of JSON for each measurement, then a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from pyreid import models, train
from pyreid.data import Images, MeshedImages, Meshes, ReidData
from pyreid.methods import GCL

from . import cost
from .run import describe_machine, machine_line

_DISTINCT = 64  # pictures, of which all photos are


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    device = train.device_of(arguments.device)
    machine = describe_machine([])
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["tf32"] = torch.backends.cudnn.allow_tf32
    print(machine_line(machine), flush=True)
    found = []
    for stage in arguments.stages.split(","):
        for precision in arguments.precision.split(","):
            found.append(measured(arguments, device, stage, precision))
            print(json.dumps(found[-1]), flush=True)
    print()
    print(f"| {arguments.encoder}, batches of {arguments.batch_size} | steps/s | a step | memory |")
    print("|---|---|---|---|")
    for each in found:
        print(
            f"| stage {each['stage']}, {each['precision']} | {1 / each['seconds']:.2f} "
            f"| {cost.duration(each['seconds'])} | {cost.size(each['peak_bytes'])} |"
        )


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--stages", default="2,3", help="one or more, with commas")
    parser.add_argument("--precision", default="float32,bfloat16", help="one or more, with commas")
    parser.add_argument("--encoder", default="resnet50", metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--images", type=int, default=12936, metavar="N", help="rows of the bank")
    parser.add_argument("--ids", type=int, default=751, help="clusters")
    parser.add_argument("--generator-width", type=int, default=16)
    parser.add_argument("--discriminator-width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="that are timed, at least 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    return arguments


class _Noise(Images):
    """Photos, of which few are distinct."""

    def __init__(self, pixels: np.ndarray, count: int):
        super().__init__([f"{k:06}" for k in range(count)], np.arange(count))
        self.pixels = pixels

    def _read(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row % len(self.pixels)])


class _Bodies(Meshes):
    """Likewise."""

    def __init__(self, pixels: np.ndarray, names: tuple[str, ...]):
        self.pixels, self.names = pixels, names

    def at(self, row: int, turn: int) -> np.ndarray:
        return self.pixels[(row + turn) % len(self.pixels)]


def measured(
    arguments: argparse.Namespace, device: torch.device, stage: str, precision: str
) -> dict[str, object]:
    rng = np.random.default_rng(0)
    size = (_DISTINCT, arguments.height, arguments.width)
    photos = _Noise(rng.integers(0, 255, (*size, 3), dtype=np.uint8), arguments.images)
    bodies = _Bodies(rng.integers(0, 255, size, dtype=np.uint8), photos.names)
    data = ReidData("noise", MeshedImages(photos, bodies))
    torch.manual_seed(0)
    encoder = models.build_part_encoder(arguments.encoder)
    config = GCL.Config(
        stage=stage,  # type: ignore[arg-type]
        generator_width=arguments.generator_width,
        discriminator_width=arguments.discriminator_width,
    )
    method = GCL(encoder, config)
    training = train.Training(
        **GCL.recipe
        | {
            "batch_size": arguments.batch_size,
            "height": arguments.height,
            "width": arguments.width,
            "precision": precision,
            "channels_last": arguments.channels_last,
            "workers": arguments.workers,
            "device": str(device),
            "evaluate_every": 0,
        }
    )
    run = train._Run(method, data, training, None, {})
    run.begin(resume=False)
    labels = torch.arange(arguments.images, device=device) % arguments.ids
    run.entry, run.labels, run.last_labels = {"losses": {}, "seconds": {}}, labels, labels.cpu()
    method.labels = labels
    method.bank = normalize(torch.randn(arguments.images, encoder.dim, device=device))
    cost.train_steps(run, 5 if device.type == "cuda" else 1)
    cost.reset_peak(device)
    _, seconds = cost.train_steps(run, arguments.steps)
    found = {
        "stage": stage,
        "precision": precision,
        "seconds": seconds,
        "peak_bytes": cost.peak_bytes(device),
        "parameters": {
            name: sum(weight.numel() for weight in network.parameters())
            for name, network in {"encoder": encoder, **method.beside}.items()
        },
    }
    del run, method, encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"gcl_cost: {error}")
