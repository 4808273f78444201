"""Body pictures beside photos: a shaded body in the person's pose, and the same turned by k * 45 degrees.

They are what GCL's generator is told the pose by. They come from the folders that its authors render, one
file for each photo and angle, or from one compact file of our own.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from pyreid import files
from pyreid.data.images import ImageError, Images

ANGLES = tuple(
    range(0, 360, 45)
)  # degrees by which a body is turned to its left: turn k is ANGLES[k]
FOLDERS = tuple("render" if angle == 0 else f"render_{angle}" for angle in ANGLES)

_SUBSETS = {"train": "train", "query": "test", "gallery": "test", "test": "test"}
_EXTENSION = re.compile(r"\.[A-Za-z]\w{1,4}$")  # not the number of a frame
_KEYS = {"names", "shape", "ends", "differences"}  # of a cache file


class Meshes:
    """Body pictures of N photos: `meshes.at(row, turn)` is (H, W) uint8, grey on white (255)."""

    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def at(self, row: int, turn: int) -> np.ndarray:
        """(H, W) uint8: the body of photo `row`, turned by `ANGLES[turn]` degrees."""
        raise NotImplementedError

    def of(self, names: Sequence[str]) -> Meshes:
        """Those of the photos `names`, in that order; see `open_meshes` for how names are matched."""
        names = tuple(names)
        if names == self.names:
            return self
        index = NameIndex({name: row for row, name in enumerate(self.names)})
        rows = [index.find(name) for name in names]
        if missing := [name for name, row in zip(names, rows, strict=True) if row is None]:
            raise ValueError(
                f"meshes: must hold a body picture of every photo, {len(missing):,} of {len(names):,} are "
                f"missing, the first {missing[0]}"
            )
        _check_distinct(names, rows)
        return _Chosen(self, np.array(rows, np.int64), names)


class MeshArrays(Meshes):
    """Body pictures in memory: `pixels` (N, 8, H, W) uint8, and the names of their photos."""

    def __init__(self, pixels: np.ndarray, names: Sequence[str]):
        if pixels.ndim != 4 or pixels.shape[1] != len(ANGLES) or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {pixels.shape}"
            raise ValueError(f"MeshArrays: pixels must be uint8 (N, 8, H, W), got {got}")
        self.pixels, self.names = pixels, tuple(names)
        if len(self.names) != len(pixels):
            raise ValueError(
                f"MeshArrays: names must be one per photo, got {len(self)} for {len(pixels)} photos"
            )

    def at(self, row: int, turn: int) -> np.ndarray:
        return self.pixels[row, turn]


class _Chosen(Meshes):
    """Some of others."""

    def __init__(self, meshes: Meshes, rows: np.ndarray, names: tuple[str, ...]):
        self.meshes, self.rows, self.names = meshes, rows, names

    def at(self, row: int, turn: int) -> np.ndarray:
        return self.meshes.at(int(self.rows[row]), turn)


class MeshFolders(Meshes):
    """Body pictures in folders render/, render_45/ ... render_315/, as GCL's authors give them out: those of
    the photos `names`. Each is opened when it is asked for."""

    def __init__(self, folder: str | os.PathLike[str], names: Sequence[str]):
        self.folder, self.names = Path(folder), tuple(names)
        self._paths = []  # by turn, then by row
        missing = []
        for below in FOLDERS:
            index = NameIndex({path: path for path in _pictures_below(self.folder / below)})
            paths = [index.find(name) for name in self.names]
            self._paths.append(paths)
            if without := [name for name, path in zip(self.names, paths, strict=True) if not path]:
                missing.append(
                    f"\n  {below}: {len(without):,} of {len(self):,}, the first {without[0]}"
                )
        if missing:
            raise ValueError(
                f"meshes: {self.folder} must hold a body picture of every photo and angle, missing are "
                f"(`pyreid mesh` would add them):{''.join(missing)}"
            )
        _check_distinct(self.names, self._paths[0])

    def at(self, row: int, turn: int) -> np.ndarray:
        path = self.folder / FOLDERS[turn] / str(self._paths[turn][row])
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("L"))
        except FileNotFoundError:
            raise ImageError(f"{path}: no such body picture") from None
        except Exception as error:  # decoders differ in what a damaged file makes them raise
            raise ImageError(f"{path}: cannot be read as an image: {error}") from None


class MeshFile(Meshes):
    """Body pictures in one file as `save_meshes` writes it, all of one size. They stay compressed in memory,
    each by itself: 34 KiB for the eight of a photo at 256 x 128, in place of 256."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if not set(arrays.files) >= _KEYS:
                    raise ValueError(f"it holds {', '.join(arrays.files)}")
                self.names = tuple(arrays["names"].tolist())
                self._shape = tuple(arrays["shape"].tolist())
                self._ends, self._data = arrays["ends"], arrays["differences"]
        except FileNotFoundError:
            raise ValueError(f"{self.path}: no such file") from None
        except (
            Exception
        ) as error:  # NumPy and zipfile differ in what a damaged file makes them raise
            raise ValueError(
                f"{self.path}: is corrupt or no file of body pictures: {error}"
            ) from None

    def at(self, row: int, turn: int) -> np.ndarray:
        place = range(len(self))[row] * len(ANGLES) + range(len(ANGLES))[turn]
        first = self._ends[place - 1] if place else 0
        rows = np.frombuffer(zlib.decompress(self._data[first : self._ends[place]]), np.uint8)
        return np.cumsum(rows.reshape(self._shape), axis=0, dtype=np.uint8)

    def __reduce__(self) -> Any:
        return MeshFile, (self.path,)  # a worker reads the file itself


def save_meshes(
    path: str | os.PathLike[str], names: Sequence[str], turns: Iterable[np.ndarray]
) -> None:
    """Body pictures to one compact file (.npz), for `open_meshes`.

    Args:
        names: of the N photos.
        turns: for each photo in its order, (8, H, W) uint8; all of one size.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"save_meshes: {path}: name must end in .npz")
    files.check_output(path)
    shape: tuple[int, ...] | None = None
    streams = []
    for pixels in turns:
        shape = shape or pixels.shape
        if pixels.shape != shape or shape[0] != len(ANGLES) or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {pixels.shape}"
            raise ValueError(f"save_meshes: turns must be uint8 (8, H, W) of one size, got {got}")
        rows = np.diff(pixels, axis=1, prepend=np.uint8(0))  # shading is smooth: they are small
        streams += [zlib.compress(view.tobytes()) for view in rows]
    if len(streams) != len(ANGLES) * len(names):
        raise ValueError(
            f"save_meshes: turns must be one per name, got {len(streams) // 8} for {len(names)}"
        )
    with files.replacing(path) as file:
        np.savez(
            file,
            names=np.array(names, dtype=str),
            shape=np.array(shape[1:] if shape else (0, 0)),
            ends=np.cumsum([len(stream) for stream in streams], dtype=np.int64),
            differences=np.frombuffer(b"".join(streams), np.uint8),
        )


def open_meshes(path: str | os.PathLike[str], images: Images, *, subset: str = "train") -> Meshes:
    """The body pictures of `images`, in their order.

    They are matched by name, whatever the extension, as far as the folders go that both have: the picture
    of bounding_box_train/0002_c1s1_000451_03.jpg may be render/0002_c1s1_000451_03.png; that of
    train/0007/0007_001.jpg, render/0007/0007_001.jpg or render/0007_001.jpg.

    Args:
        path: a file of `save_meshes`, or a folder with train.npz and test.npz; or the folder that holds
            render/, render_45/ ... render_315/, or one above it, as released: PATH/train,
            PATH/market/train, PATH/DukeMTMC/train, PATH/msmt17/test.
        subset: "train"; or "query", "gallery" or "test", which are all in test/.

    Raises ValueError that counts and names what is missing.
    """
    if subset not in _SUBSETS:
        raise ValueError(
            f"open_meshes: subset must be one of {', '.join(_SUBSETS)}, got {subset!r}"
        )
    path = Path(path)
    below = _SUBSETS[subset]
    for file in (path, path / f"{below}.npz"):
        if file.is_file():
            return MeshFile(file).of(images.names)
    if not path.is_dir():
        raise ValueError(f"open_meshes: {path} does not exist")
    places = [path, path / below, *sorted(path.glob(f"*/{below}"))]
    if not (places := [place for place in places if (place / FOLDERS[0]).is_dir()]):
        there = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        raise ValueError(
            f"open_meshes: {path} must be a file of body pictures or hold {FOLDERS[0]}/, "
            f"{below}/{FOLDERS[0]}/ or NAME/{below}/{FOLDERS[0]}/; found {there}"
        )
    return MeshFolders(max(places, key=partial(_matches, names=images.names)), images.names)


class MeshedImages(Images):
    """Photos with their body pictures: `images[row]` is (MeshedImage, id, camera).

    Args:
        images: the photos, single images.
        meshes: of these photos at least, matched by name.
    """

    def __init__(self, images: Images, meshes: Meshes):
        if images.kind != "images":
            raise ValueError(f"MeshedImages: images must be single images, got {images.kind}")
        super().__init__(images.names, images.ids, images.cameras, images.frames)
        self._photos = images
        self.meshes = meshes.of(images.names)

    @property
    def photos(self) -> Images:
        """The plain images, in the same order."""
        return self._photos.select(self._places)

    def stills(self) -> Images:
        return self.photos

    def _read(self, row: int) -> MeshedImage:  # type: ignore[override]
        place = int(self._places[row])
        return MeshedImage(self._photos[place][0], self.meshes, place)


@dataclass(frozen=True)
class MeshedImage:
    """A photo and its body pictures, which are read when they are asked for."""

    photo: Image.Image
    meshes: Meshes
    row: int

    def turned(self, turn: int) -> Image.Image:
        """The body in grey, turned by `ANGLES[turn]` degrees."""
        return Image.fromarray(self.meshes.at(self.row, turn))


@dataclass(frozen=True)
class Photo:
    """A view of the photo of a MeshedImage."""

    view: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: MeshedImage) -> torch.Tensor:
        return self.view(image.photo)


T = TypeVar("T")


class NameIndex(Generic[T]):
    """Values by relative path, found by another path of the same file: without extensions, and without
    the folders that only one of them has."""

    def __init__(self, values: Mapping[str, T]):
        self._values = values
        self._whole = {_stem(path): path for path in values}
        names = Counter(path.rsplit("/", 1)[-1] for path in self._whole)
        self._short = {
            name: path
            for whole, path in self._whole.items()
            if names[name := whole.rsplit("/", 1)[-1]] == 1
        }

    def find(self, path: str) -> T | None:
        """None: there is none, or no telling which."""
        parts = PurePosixPath(path).parts
        ends = ["/".join(parts[first:]) for first in range(len(parts))]
        for end in ends:
            if (found := end if end in self._values else self._whole.get(_stem(end))) is not None:
                return self._values[found]
        found = self._short.get(_stem(parts[-1]))
        return None if found is None else self._values[found]


def _stem(path: str) -> str:
    return _EXTENSION.sub("", path)


def _check_distinct(names: Sequence[str], found: Sequence[Any]) -> None:
    repeated = [(one, times) for one, times in Counter(found).most_common(1) if times > 1]
    for one, times in repeated:
        first = names[found.index(one)]
        raise ValueError(
            f"meshes: must hold a body picture for each photo, got one for {times} whose names "
            f"differ in their folders alone, the first {first}"
        )


def _matches(folder: Path, names: Sequence[str]) -> int:
    """How many of the photos have a picture in render/."""
    index = NameIndex({path: path for path in _pictures_below(folder / FOLDERS[0])})
    return sum(index.find(name) is not None for name in names)


def _pictures_below(folder: Path) -> Iterator[str]:
    """Paths of the files in a folder and those below it, relative to it."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = "" if where == str(folder) else Path(where).relative_to(folder).as_posix() + "/"
        yield from (prefix + name for name in sorted(names) if not name.startswith("."))
