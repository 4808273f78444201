"""Made-up people in made-up cameras: data to train on and to be tested with, without a data set.

A person is a walking body of tapered capsules (`body`), seen by a renderer of our own (`render`), dressed
from a wardrobe in which many things look alike (`wardrobe`), before cameras that do not (`scene`). Every
picture is a function of the seed, the person, the camera and its number (`capture`): a larger set holds
the smaller one, and any number of processes draws the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from pyreid import options
from pyreid.data import ImageArrays, ReidData, Tracklets, frame_numbers
from pyreid.options import option
from pyreid.people.body import Capsules
from pyreid.people.capture import PER_PASS, bare, photograph, visits
from pyreid.people.render import Window
from pyreid.progress import Progress

__all__ = [
    "People",
    "contact_sheet",
    "image_names",
    "people_data",
    "people_tracklets",
    "photograph",
    "turned_bodies",
    "turned_photos",
    "write_market",
]

T = TypeVar("T")

# The folders of Market-1501's layout, and what they are to a trainer.
_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_QUALITY = 90  # of JPEG
_CHUNK = 32  # pictures that a process draws at a time
_ASTRAY = 0.3  # heights by which a detector misses a person
_STRANGERS = 1_000_000_000  # numbers of people who are in no subset


@dataclass(frozen=True)
class People:
    """What is drawn. Training people have odd ids, test people even ones: more of either changes nothing of
    the others. Each appears in two cameras at least, not in all."""

    ids: int = option(100, "people to train on")
    test_ids: int | None = option(None, "other people, to test with; none: half as many")
    cameras: int = option(6, "cameras, as unlike each other as can be")
    images: int = option(4, "images of each person in each camera where they appear")
    height: int = option(64, "of an image, in pixels")
    width: int = option(32, "of an image, in pixels")
    seed: int = option(0, "of all that is random")
    distractors: int = option(
        0, "images in the gallery of nobody, or of strangers half missed: id 0"
    )
    junk: int = option(0, "images in the gallery that miss a test person: id -1")
    occlusion: float = option(0.15, "how often something hides a part of the person")
    gap: float = option(0.5, "between cameras, 0 to 1: how unlike a person looks in two of them")

    def __post_init__(self) -> None:
        least = {"ids": 1, "test_ids": 0, "cameras": 1, "images": 2, "height": 16, "width": 8}
        least |= {"seed": 0, "distractors": 0, "junk": 0, "occlusion": 0, "gap": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"People: {name} must be at least {low}, got {value}")
        for name in ("occlusion", "gap"):
            if (value := getattr(self, name)) > 1:
                raise ValueError(f"People: {name} must be at most 1, got {value}")
        if self.width > 2 * self.height:
            raise ValueError(
                f"People: width must be at most twice the height {self.height}, got {self.width}"
            )
        if self.junk and self.test_count == 0:
            raise ValueError("People: junk must be 0 where there are no test people")

    @property
    def test_count(self) -> int:
        return self.ids // 2 if self.test_ids is None else self.test_ids


class _Shot(NamedTuple):
    """One image to be drawn."""

    id: int
    camera: int
    who: int | None
    number: int
    astray: float = 0.0

    @property
    def name(self) -> str:
        """As in Market-1501: identity, camera and sequence, frame, box."""
        person = "-1" if self.id < 0 else f"{self.id:04d}"
        return f"{person}_c{self.camera + 1}s1_{25 * self.number + 1:06d}_01.jpg"


def people_data(
    people: People | None = None, *, workers: int = 0, quiet: bool = False, **changes: Any
) -> ReidData:
    """Made-up people, in memory, with the names they would have in Market-1501's layout.

    Args:
        people: what is drawn; `changes` to it may be given by name: `people_data(ids=20, seed=1)`.
        workers: processes that draw; 0: this one.
        quiet: shows no progress.
    """
    people = replace(people or People(), **changes)
    subsets: dict[str, Any] = {
        subset: _in_memory(people, subset, shots, workers, quiet)
        for subset, shots in _subsets(people).items()
    }
    return ReidData("people", **subsets)


def people_tracklets(
    people: People | None = None, *, workers: int = 0, quiet: bool = False, **changes: Any
) -> ReidData:
    """Made-up people as Tracklets, in memory: each time that a person crosses a camera's view, four frames.

    Args:
        people: what is drawn, as for `people_data`; `images` must be a multiple of 4, and 8 at least where
            there are test people: the first crossing of each camera is the query, the others are gallery.
    """
    people = replace(people or People(images=8), **changes)
    if people.images % PER_PASS or (people.test_count and people.images < 2 * PER_PASS):
        raise ValueError(
            f"people_tracklets: images must be a multiple of {PER_PASS}, and at least {2 * PER_PASS} to test "
            f"with, got {people.images}"
        )
    if people.distractors or people.junk:
        raise ValueError("people_tracklets: distractors and junk must be 0: they are single images")
    shots = _subsets(people)
    test = sorted(shots["query"] + shots["gallery"], key=lambda shot: shot.name)
    subsets: dict[str, Any] = {}
    for part, drawn in (("train", shots["train"]), ("gallery", test)):
        frames = _in_memory(people, part, drawn, workers, quiet)
        spans = np.arange(len(drawn)).reshape(-1, PER_PASS)  # by person, camera and number
        tracklets = Tracklets(frames, list(spans))
        if part == "train":
            subsets[part] = tracklets
            continue
        first = np.array([drawn[span[0]].number == 0 for span in spans], dtype=bool)
        subsets |= {"query": tracklets.select(first), "gallery": tracklets.select(~first)}
    return ReidData("people", **subsets)


def _in_memory(
    people: People, subset: str, shots: list[_Shot], workers: int, quiet: bool
) -> ImageArrays:
    pixels = np.empty((len(shots), people.height, people.width, 3), dtype=np.uint8)
    done = 0
    for drawn in _at_work(partial(_drawn, people), shots, workers, subset, quiet):
        pixels[done : done + len(drawn)] = drawn
        done += len(drawn)
    names = [_path(subset, shot) for shot in shots]
    return ImageArrays(
        pixels,
        names,
        np.array([shot.id for shot in shots], dtype=np.int64),
        np.array([shot.camera for shot in shots], dtype=np.int64),
        frame_numbers(names),
    )


def write_market(
    path: str | os.PathLike[str],
    people: People | None = None,
    *,
    workers: int = 0,
    quiet: bool = False,
    **changes: Any,
) -> None:
    """The images of `people_data` as JPEG files, in a new folder of Market-1501's layout, with people.json,
    which says what was drawn.

    The folder has its name only once it is whole. Until then it is called .NAME.unfinished.
    """
    people = replace(people or People(), **changes)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"write_market: {path} must be new or an empty folder")
    if not path.parent.is_dir():
        raise ValueError(f"write_market: there is no folder {path.parent}")
    unfinished = path.parent / f".{path.name}.unfinished"
    try:
        unfinished.mkdir()
    except FileExistsError:
        raise ValueError(
            f"write_market: another run is writing, or was killed and left, {unfinished}: delete it"
        ) from None
    try:
        for subset, shots in _subsets(people).items():
            folder = unfinished / _FOLDERS[subset]
            folder.mkdir()
            for _ in _at_work(partial(_written, people, folder), shots, workers, subset, quiet):
                pass
        settings = json.dumps(options.to_dict(people), indent=2) + "\n"
        (unfinished / "people.json").write_text(settings)
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def contact_sheet(
    people: People | None = None, *, rows: int = 8, views: Sequence[int] = (0, 3, 6), **changes: Any
) -> Image.Image:
    """What the people look like: a row for each of the first training people; in columns, each camera with
    the person turned by `views` times 45 degrees."""
    people = replace(people or People(), **changes)
    sheet = np.vstack(
        [
            np.hstack(
                [
                    _draw(people, _Shot(0, camera, 2 * row + 1, number), view)
                    for camera in range(people.cameras)
                    for number, view in enumerate(views)
                ]
            )
            for row in range(rows)
        ]
    )
    return Image.fromarray(sheet)


def image_names(people: People, subset: str) -> list[str]:
    """Of the images of a subset of `people_data(people)`, which need not be drawn for it."""
    return [_path(subset, shot) for shot in _shots(people, subset)]


def turned_photos(
    people: People, subset: str, rows: Sequence[int], turns: Sequence[int] = tuple(range(8))
) -> np.ndarray:
    """(R, T, height, width, 3) uint8: images of a subset of `people_data(people)`, had the person been turned
    to their left by `turns` times 45 degrees: all else is as it was, but the box around them. Turn 0 is the
    image itself."""
    shots = _shots(people, subset)
    drawn = [[_draw(people, shots[row], turn=turn) for turn in turns] for row in rows]
    return np.array(drawn, np.uint8).reshape(len(rows), len(turns), people.height, people.width, 3)


def turned_bodies(
    people: People, subset: str, row: int, turns: Sequence[int] = tuple(range(8))
) -> list[tuple[Capsules, Window]]:
    """The undressed body in each of the `turned_photos` of an image, as the camera sees it, and the window of
    the picture; nothing where the image is of nobody."""
    shot = _shots(people, subset)[row]
    if shot.who is None:
        return []
    return [
        bare(
            people.seed,
            shot.who,
            shot.camera,
            shot.number,
            height=people.height,
            width=people.width,
            gap=people.gap,
            astray=shot.astray,
            turn=turn,
        )
        for turn in turns
    ]


@lru_cache(maxsize=4)
def _shots(people: People, subset: str) -> list[_Shot]:
    if subset not in _FOLDERS:
        raise ValueError(f"people: subset must be one of {', '.join(_FOLDERS)}, got {subset!r}")
    return _subsets(people)[subset]


def _subsets(people: People) -> dict[str, list[_Shot]]:
    """What each subset holds, sorted by name."""
    seed, cameras = people.seed, people.cameras
    train, query, gallery = [], [], []
    for who in range(1, 2 * people.ids, 2):
        for camera in visits(seed, who, cameras):
            train += [_Shot(who, camera, who, number) for number in range(people.images)]
    tested = range(2, 2 * people.test_count + 1, 2)
    for who in tested:
        for camera in visits(seed, who, cameras):
            query.append(_Shot(who, camera, who, 0))
            gallery += [_Shot(who, camera, who, number) for number in range(1, people.images)]
    for number in range(people.distractors):
        stranger = _STRANGERS + number if number % 2 else None
        gallery.append(_Shot(0, number % cameras, stranger, number, _ASTRAY))
    for number in range(people.junk):
        who = tested[number % len(tested)]
        gallery.append(_Shot(-1, number % cameras, who, people.images + number, _ASTRAY))
    subsets = {"train": train, "query": query, "gallery": gallery}
    return {subset: sorted(shots, key=lambda shot: shot.name) for subset, shots in subsets.items()}


def _path(subset: str, shot: _Shot) -> str:
    return f"{_FOLDERS[subset]}/{shot.name}"


def _draw(people: People, shot: _Shot, view: int | None = None, turn: int = 0) -> np.ndarray:
    return photograph(
        people.seed,
        shot.who,
        shot.camera,
        shot.number,
        height=people.height,
        width=people.width,
        occlusion=people.occlusion,
        gap=people.gap,
        astray=shot.astray,
        view=view,
        turn=turn,
    )


def _drawn(people: People, shots: list[_Shot]) -> np.ndarray:
    return np.stack([_draw(people, shot) for shot in shots])


def _written(people: People, folder: Path, shots: list[_Shot]) -> list[str]:
    for shot in shots:
        Image.fromarray(_draw(people, shot)).save(folder / shot.name, quality=_QUALITY)
    return [shot.name for shot in shots]


def _at_work(
    work: Callable[[list[_Shot]], T], shots: list[_Shot], workers: int, label: str, quiet: bool
) -> Iterator[T]:
    """What `work` makes of the shots, some at a time and in their order."""
    chunks = [shots[first : first + _CHUNK] for first in range(0, len(shots), _CHUNK)]
    with Progress(f"drawing people, {label}", len(shots), unit="images", quiet=quiet) as progress:
        if workers:
            with ProcessPoolExecutor(workers) as pool:
                for chunk, made in zip(chunks, pool.map(work, chunks), strict=True):
                    progress.advance(len(chunk))
                    yield made
        else:
            for chunk in chunks:
                made = work(chunk)
                progress.advance(len(chunk))
                yield made
