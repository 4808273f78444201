"""Body pictures of whole data sets: in memory, or in the folders that GCL reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pyreid import people
from pyreid.data import Images, MeshArrays
from pyreid.data.meshes import FOLDERS, NameIndex
from pyreid.meshes.figure import capsule_turns, neutral, picture, turns
from pyreid.meshes.keypoints import Lifted, lift, read_keypoints
from pyreid.meshes.smpl import Bodies, read_bodies
from pyreid.people import People
from pyreid.people.body import Proportions, body
from pyreid.progress import Progress

Keypoints = Mapping[str, np.ndarray] | str | os.PathLike[str]
Smpl = Bodies | tuple[str | os.PathLike[str], str | os.PathLike[str]]

_QUALITY = 95  # of JPEG
_CHUNK = 16  # photos that a process takes at a time
_FRAME = (256, 128)  # height and width of the released networks


def make_meshes(
    images: Images,
    *,
    height: int = _FRAME[0],
    width: int = _FRAME[1],
    keypoints: Keypoints | None = None,
    smpl: Smpl | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> MeshArrays:
    """The body pictures of `images`: what a regressor found, where it found somebody; else a body of our own
    in the pose that keypoints tell of; else somebody who walks towards the viewer.

    Args:
        keypoints: a file (`read_keypoints`), or (17, 3) by the name of the photo.
        smpl: `read_bodies`, or its two files: the model, and poses, shapes and cameras.
        workers: processes that draw; 0: this one. They change nothing.
        quiet: shows no progress.
    """
    artist = Artist.of(images, height, width, keypoints, smpl, quiet=quiet)
    return _gathered(artist, images.names, workers, quiet)


def write_meshes(
    folder: str | os.PathLike[str],
    images: Images,
    *,
    height: int = _FRAME[0],
    width: int = _FRAME[1],
    keypoints: Keypoints | None = None,
    smpl: Smpl | None = None,
    workers: int = 0,
    quiet: bool = False,
) -> int:
    """The body pictures of `make_meshes` as files, as GCL's authors give theirs out: FOLDER/render,
    FOLDER/render_45 ... FOLDER/render_315, under the names of the photos, without the data set's folder
    before them. What is there already is left as it is: another run goes on where one was interrupted.

    Returns how many photos got any.
    """
    artist = Artist.of(images, height, width, keypoints, smpl, quiet=quiet)
    return write_drawn(folder, artist, images.names, workers=workers, quiet=quiet)


def people_meshes(
    made_up: People, subset: str = "train", *, workers: int = 0, quiet: bool = False
) -> MeshArrays:
    """The true body pictures of a subset of `people_data(made_up)`: the bare body of each of the
    `people.turned_photos`, in grey, as its camera sees it."""
    artist = Portraitist(made_up, subset, made_up.height, made_up.width)
    return _gathered(artist, people.image_names(made_up, subset), workers, quiet)


@dataclass(frozen=True)
class Portraitist:
    """Draws the true bodies of made-up people: row -> (8, height, width) uint8."""

    people: People
    subset: str
    height: int
    width: int

    def __call__(self, row: int) -> np.ndarray:
        views = [
            picture(capsules, self.height, self.width, window=window)
            for capsules, window in people.turned_bodies(self.people, self.subset, row)
        ]
        blank = np.full((len(FOLDERS), self.height, self.width), 255, np.uint8)
        return np.stack(views) if views else blank


@dataclass(frozen=True)
class Artist:
    """Draws what is known of photos: row -> (8, height, width) uint8."""

    images: Images
    height: int
    width: int
    keypoints: Sequence[np.ndarray | None]
    bodies: Bodies | None
    found: Sequence[int | None]  # rows of the bodies

    @staticmethod
    def of(
        images: Images,
        height: int,
        width: int,
        keypoints: Keypoints | None,
        smpl: Smpl | None,
        *,
        quiet: bool,
    ) -> Artist:
        if images.kind != "images":
            raise ValueError(f"meshes: images must be single images, got {images.kind}")
        if height < 8 or width < 4:
            raise ValueError(
                f"meshes: height and width must be 8 and 4 at least, got {height}, {width}"
            )
        points: list[np.ndarray | None] = [None] * len(images)
        rows: list[int | None] = [None] * len(images)
        if keypoints is not None:
            by_name = keypoints if isinstance(keypoints, Mapping) else read_keypoints(keypoints)
            index = NameIndex(by_name)
            points = [index.find(name) for name in images.names]
            _check_found("keypoints", points, images.names, by_name, quiet)
        if isinstance(smpl, tuple):
            smpl = read_bodies(*smpl)
        if smpl is not None:
            rows = smpl.rows(images.names)
            _check_found("poses", rows, images.names, smpl.names, quiet)
        return Artist(images, height, width, points, smpl, rows)

    def __call__(self, row: int) -> np.ndarray:
        size = self.images[row][0].size
        height, width = self.height, self.width
        found, keypoints = self.found[row], self.keypoints[row]
        if found is not None:
            assert self.bodies is not None
            return self.bodies.turns(found, size=size, height=height, width=width)
        lifted = None if keypoints is None else lift(keypoints, size)
        if lifted is None:
            name = PurePosixPath(self.images.names[row]).name
            return turns(neutral(name), height=height, width=width, aspect=size[0] / size[1])
        return lifted_turns(lifted, height=height, width=width)


def lifted_turns(lifted: Lifted, *, height: int, width: int) -> np.ndarray:
    """(8, height, width) uint8: somebody whom keypoints tell of, as they were seen and turned."""
    capsules = lifted.skeleton.attach(body(Proportions(stature=lifted.skeleton.unit)))
    return capsule_turns(capsules, height=height, width=width, window=lifted.window)


def write_drawn(
    folder: str | os.PathLike[str],
    artist: Artist | Portraitist,
    names: Sequence[str],
    *,
    workers: int = 0,
    quiet: bool = False,
) -> int:
    """What an artist draws, as files; see `write_meshes`."""
    folder = Path(folder)
    names = released_names(names)
    there = [set(_files(folder / below)) for below in FOLDERS]
    rows = [row for row, name in enumerate(names) if not all(name in some for some in there)]
    done = len(names) - len(rows)
    with Progress("body pictures", len(names), unit="photos", done=done, quiet=quiet) as progress:
        for row, views in drawn(artist, rows, workers):
            for below, view, some in zip(FOLDERS, views, there, strict=True):
                if names[row] not in some:
                    _save(view, folder / below / names[row])
            progress.advance()
    return len(rows)


def drawn(
    artist: Artist | Portraitist, rows: Sequence[int], workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Each row with its views, in order."""
    if not workers or not rows:
        yield from ((row, artist(row)) for row in rows)
        return
    with ProcessPoolExecutor(workers, initializer=_begin, initargs=(artist,)) as pool:
        yield from zip(rows, pool.map(_draw, rows, chunksize=_CHUNK), strict=True)


def released_names(names: Sequence[str]) -> list[str]:
    """Photos' names without the folder that all of them are in, with an extension."""
    parts = [PurePosixPath(name).parts for name in names]
    first = {part[0] if len(part) > 1 else None for part in parts}
    skipped = 1 if len(first) == 1 and None not in first else 0
    kept = [PurePosixPath(*part[skipped:]) for part in parts]
    known = Image.registered_extensions()
    return [f"{path}{'' if path.suffix.lower() in known else '.png'}" for path in kept]


def _gathered(
    artist: Artist | Portraitist, names: Sequence[str], workers: int, quiet: bool
) -> MeshArrays:
    pixels = np.empty((len(names), len(FOLDERS), artist.height, artist.width), np.uint8)
    with Progress("body pictures", len(names), unit="photos", quiet=quiet) as progress:
        for row, views in drawn(artist, range(len(names)), workers):
            pixels[row] = views
            progress.advance()
    return MeshArrays(pixels, names)


_artist: Any = None  # of a worker


def _begin(artist: Artist | Portraitist) -> None:
    global _artist
    _artist = artist


def _draw(row: int) -> np.ndarray:
    views: np.ndarray = _artist(row)
    return views


def _check_found(
    what: str, found: Sequence[Any], names: Sequence[str], known: Any, quiet: bool
) -> None:
    missing = [name for name, one in zip(names, found, strict=True) if one is None]
    if missing and len(missing) == len(names):
        example = next(iter(known), "none at all")
        raise ValueError(
            f"meshes: {what} must be of these photos, such as {names[0]}, got those of {example}"
        )
    if missing:
        Progress("", quiet=quiet).say(
            f"body pictures: {len(missing):,} of {len(names):,} photos have no {what}, the first {missing[0]}"
        )


def _files(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        prefix = Path(where).relative_to(folder)
        yield from (str(PurePosixPath(prefix / name)) for name in names)


def _save(view: np.ndarray, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    Image.fromarray(view).save(unfinished, quality=_QUALITY)
    os.replace(unfinished, path)
