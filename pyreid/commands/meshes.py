"""`pyreid mesh`: the body pictures of a data set, for GCL."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pyreid import options
from pyreid.data import Images, MeshFile, open_data, open_folder, save_meshes
from pyreid.meshes.keypoints import read_keypoints
from pyreid.meshes.render import Artist, Portraitist, drawn, write_drawn
from pyreid.meshes.smpl import read_bodies
from pyreid.people import People, image_names
from pyreid.progress import Progress

_INTERRUPTED = 130  # as shells have it
_SUBSETS = {"train": ("train",), "test": ("query", "gallery")}


def main(argv: list[str]) -> int:
    try:
        return _mesh(argv)
    except KeyboardInterrupt:
        print("pyreid mesh: interrupted; into folders, the same command goes on", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        print(f"pyreid mesh: {error}", file=sys.stderr)
        return 2


def _mesh(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if bool(arguments.smpl) != bool(arguments.poses):
        raise ValueError("--smpl and --poses: one takes the other")
    data, output = Path(arguments.data), Path(arguments.output)
    if arguments.images:
        subsets = {"train": open_folder(data).train}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a data set lacks, its body pictures may lack
            subsets = open_data(data).subsets
    keypoints = None if arguments.keypoints is None else read_keypoints(arguments.keypoints)
    smpl = None if arguments.smpl is None else read_bodies(arguments.smpl, arguments.poses)
    made_up = None if keypoints or smpl else _made_up(data)

    def artist(subset: str, images: Images) -> Artist | Portraitist:
        if made_up and list(images.names) == image_names(made_up, subset):
            return Portraitist(made_up, subset, arguments.height, arguments.width)
        return Artist.of(images, arguments.height, arguments.width, keypoints, smpl, quiet=False)

    for below in ("train", "test") if arguments.subset == "all" else (arguments.subset,):
        chosen = {name: subsets[name] for name in _SUBSETS[below] if name in subsets}
        if not chosen:
            raise ValueError(f"{data}: has no images to {below} with")
        artists = {name: artist(name, images) for name, images in chosen.items()}
        if arguments.cache:
            place, count = (
                output / f"{below}.npz",
                _cached(output, below, chosen, artists, arguments),
            )
        else:
            place, count = output / below, 0
            for name, images in chosen.items():
                count += write_drawn(place, artists[name], images.names, workers=arguments.workers)
        total = sum(len(images) for images in chosen.values())
        there = f", {total - count:,} were there" if total - count else ""
        print(f"{below}: 8 body pictures for each of {count:,} photos{there}: {place}")
    return 0


def _cached(
    output: Path,
    below: str,
    chosen: dict[str, Images],
    artists: dict[str, Artist | Portraitist],
    arguments: argparse.Namespace,
) -> int:
    """How many photos got body pictures: all, or none if there is a file for all of them."""
    path = output / f"{below}.npz"
    wanted = [name for images in chosen.values() for name in images.names]
    if path.is_file():
        MeshFile(path).of(wanted)
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with Progress("body pictures", len(wanted), unit="photos") as progress:

        def views() -> Iterator[np.ndarray]:
            for name, images in chosen.items():
                for _, turns in drawn(artists[name], range(len(images)), arguments.workers):
                    progress.advance()
                    yield turns

        save_meshes(path, wanted, views())
    return len(wanted)


def _made_up(data: Path) -> People | None:
    """What `pyreid synth` drew there: of these people the true bodies are known."""
    path = data / "people.json"
    if not path.is_file():
        return None
    return options.replace(People(), json.loads(path.read_text()), str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyreid mesh",
        description="Pictures of the bodies in photos, as they are and turned by 45 to 315 degrees: what "
        "GCL's generator is told the pose by. Without --keypoints or --smpl, everybody walks "
        "towards the viewer; of a data set that `pyreid synth` wrote, the true bodies are known.",
    )
    parser.add_argument("data", metavar="DATA", help="a data set as for `pyreid train --data`")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="gets train/render, train/render_45 ...",
    )
    parser.add_argument(
        "--images", action="store_true", help="DATA is a folder of crops in no data set's layout"
    )
    parser.add_argument(
        "--subset",
        choices=["train", "test", "all"],
        default="train",
        help="test: query and gallery (default: %(default)s)",
    )
    parser.add_argument(
        "--keypoints", metavar="FILE", help="COCO's 17 of each photo: .json or .npz"
    )
    parser.add_argument("--smpl", metavar="MODEL", help="your SMPL model, .npz or .pkl")
    parser.add_argument(
        "--poses", metavar="FILE", help="with --smpl: names, pose, shape, camera: .npz or .pkl"
    )
    parser.add_argument(
        "--cache", action="store_true", help="one compact file DIR/train.npz in place of folders"
    )
    parser.add_argument("--height", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw (default: 0)")
    return parser
