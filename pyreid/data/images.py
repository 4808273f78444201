"""Sets of images with what is known of each: a name, an identity, a camera."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image


class ImageError(ValueError):
    """An image that cannot be read; the message names it."""


class Images(torch.utils.data.Dataset):
    """N images; `images[row]` is (PIL image in RGB, id, camera).

    Args:
        names: N distinct strings, such as paths relative to the root of the set. Features that are kept
            elsewhere belong to images by name.
        ids: (N,) int64, -1 where the identity is not known (or junk). Default: not known.
        cameras: (N,) int64, not negative; 0 to C - 1 over all subsets of a data set. Default: all 0.
        frames: (N,) int64, when each was taken, as the number of its camera's frame, over all subsets of a
            data set; -1 where it is not known. Default: not known.
    """

    kind = "images"
    names: tuple[str, ...]
    ids: np.ndarray
    cameras: np.ndarray
    frames: np.ndarray
    _places: np.ndarray  # (N,) where each image is in what it is read from

    def __init__(
        self, names: Sequence[str], ids: Any = None, cameras: Any = None, frames: Any = None
    ):
        where = type(self).__name__
        self.names = tuple(names)
        count = len(self.names)
        self.ids = _column(where, "ids", ids, -1, count)
        self.cameras = _column(where, "cameras", cameras, 0, count)
        self.frames = _column(where, "frames", frames, -1, count)
        self._places = np.arange(count)
        if len(set(self.names)) != count:
            repeated, _ = Counter(self.names).most_common(1)[0]
            raise ValueError(f"{where}: names must be distinct, got {repeated!r} more than once")
        if count and self.ids.min() < -1:
            raise ValueError(f"{where}: ids must be at least -1, got {self.ids.min()}")
        if count and self.cameras.min() < 0:
            raise ValueError(f"{where}: cameras must not be negative, got {self.cameras.min()}")
        if count and self.frames.min() < -1:
            raise ValueError(f"{where}: frames must be at least -1, got {self.frames.min()}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[Image.Image, int, int]:
        row = range(len(self))[row]  # IndexError beyond the end: what ends a loop over the set
        return self._read(row), int(self.ids[row]), int(self.cameras[row])

    def select(self, rows: Any) -> Images:
        """The images of `rows`, in that order: (M,) distinct rows, a mask (N,) or a slice. Nothing is copied
        but what is known of them."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows) if len(rows) else np.empty(0, np.int64)
        rows = np.arange(len(self))[rows]
        if len(np.unique(rows)) != len(rows):
            raise ValueError("select: rows must be distinct, got some more than once")
        chosen = copy.copy(self)
        chosen.names = tuple(self.names[row] for row in rows)
        chosen.ids, chosen.cameras = self.ids[rows], self.cameras[rows]
        chosen.frames = self.frames[rows]
        chosen._places = self._places[rows]
        return chosen

    def stills(self) -> Images:
        """The same with a single image in each place: for pictures."""
        return self

    def _read(self, row: int) -> Image.Image:
        raise NotImplementedError


class ImageFiles(Images):
    """Image files: `names` are their paths below the folder `root`. Each is opened when it is asked for."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        names: Sequence[str],
        ids: Any = None,
        cameras: Any = None,
        frames: Any = None,
    ):
        super().__init__(names, ids, cameras, frames)
        self.root = Path(root)

    def _read(self, row: int) -> Image.Image:
        path = self.root / self.names[row]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise ImageError(f"{path}: no such image") from None
        except Exception as error:  # decoders differ in what a damaged file makes them raise
            raise ImageError(f"{path}: cannot be read as an image: {_reason(error)}") from None


class ImageArrays(Images):
    """Images in memory: `pixels` (N, H, W, 3) uint8. Default names: 000000, 000001, ..."""

    def __init__(
        self,
        pixels: np.ndarray,
        names: Sequence[str] | None = None,
        ids: Any = None,
        cameras: Any = None,
        frames: Any = None,
    ):
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {pixels.shape}"
            raise ValueError(f"ImageArrays: pixels must be uint8 (N, H, W, 3), got {got}")
        super().__init__(_numbered(len(pixels)) if names is None else names, ids, cameras, frames)
        if len(self) != len(pixels):
            raise ValueError(
                f"ImageArrays: names must be one per image, got {len(self)} for {len(pixels)} images"
            )
        self.pixels = pixels

    def _read(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[self._places[row]])


class _OtherDataset(Images):
    """The images of somebody's map-style dataset."""

    def __init__(self, dataset: Any, names: Sequence[str], ids: Any, cameras: Any, frames: Any):
        super().__init__(names, ids, cameras, frames)
        self.dataset = dataset

    def _read(self, row: int) -> Image.Image:
        place = int(self._places[row])
        try:
            item = self.dataset[place]
        except Exception as error:
            raise ImageError(f"item {place} of the dataset: {_reason(error)}") from error
        return _rgb(_triple(item, place)[0], place)


def as_images(
    dataset: Any,
    *,
    names: Sequence[str] | None = None,
    ids: Any = None,
    cameras: Any = None,
    frames: Any = None,
) -> Images:
    """`dataset` as Images: one already (returned as it is), or any map-style dataset whose items are
    (image, id, camera), the image PIL's or a (3, H, W) uint8 tensor.

    Args:
        names: default 000000, 000001, ...
        ids, cameras: (N,), if at hand: otherwise every item is asked for once, for its two numbers.
        frames: (N,). Default: not known.
    """
    if isinstance(dataset, Images):
        return dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ValueError(
            "as_images: dataset must have __len__ and __getitem__ (map-style), "
            f"got {type(dataset).__name__}"
        )
    count = len(dataset)
    if ids is None or cameras is None:
        found = np.empty((count, 2), np.int64)
        for place in range(count):
            found[place] = _triple(dataset[place], place)[1:]
        ids = found[:, 0] if ids is None else ids
        cameras = found[:, 1] if cameras is None else cameras
    names = _numbered(count) if names is None else names
    return _OtherDataset(dataset, names, ids, cameras, frames)


def readable(images: Images, *, threads: int = 1) -> np.ndarray:
    """The rows (M,) of images that can be read, ascending. Each is opened once, `threads` at a time."""

    def can_be_read(row: int) -> bool:
        try:
            images[row]
        except ImageError:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        return np.flatnonzero(list(pool.map(can_be_read, range(len(images)))))


class Counts(NamedTuple):
    """What a subset of a published data set holds. Junk (id -1) counts neither as id nor as image."""

    ids: int
    images: int


@dataclass(frozen=True)
class ReidData:
    """A data set: images to train on, and those to evaluate with. Cameras are numbered alike in all three."""

    name: str
    train: Images
    query: Images | None = None
    gallery: Images | None = None
    published: Mapping[str, Counts] | None = None  # by subset, where the set is a published one

    @property
    def subsets(self) -> dict[str, Images]:
        """The subsets that there are, by name."""
        every = {"train": self.train, "query": self.query, "gallery": self.gallery}
        return {name: images for name, images in every.items() if images is not None}

    @property
    def cameras(self) -> int:
        """How many cameras there are: C."""
        return max((int(s.cameras.max()) + 1 for s in self.subsets.values() if len(s)), default=0)

    @property
    def one_camera(self) -> bool:
        """All test images are of one camera, or nobody knows of which: then those of a query's own camera
        must count, or nothing would."""
        subsets = [images for images in (self.query, self.gallery) if images is not None]
        return len({camera for images in subsets for camera in images.cameras.tolist()}) <= 1

    def stills(self) -> ReidData:
        """The same with a single image in place of each tracklet: for pictures."""
        train, query, gallery = (
            None if images is None else images.stills()
            for images in (self.train, self.query, self.gallery)
        )
        assert train is not None
        return replace(self, train=train, query=query, gallery=gallery)

    def summary(self) -> str:
        """A table of the subsets, and where they differ from what was published."""
        rows = [("subset", "ids", self.train.kind, "cameras")]
        for name, images in self.subsets.items():
            counts, cameras = count(images), len(np.unique(images.cameras))
            ids = f"{counts.ids:,}" if counts.ids else "-"
            rows.append((name, ids, f"{len(images):,}", f"{cameras:,}"))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = [
            " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.insert(1, "-+-".join("-" * width for width in widths))
        return "\n".join([self.name, *lines, *self.differences()])

    def differences(self) -> list[str]:
        """One sentence for each subset that is not of the published size."""
        found = []
        for name, expected in (self.published or {}).items():
            images = self.subsets.get(name)
            got = count(images) if images is not None else Counts(0, 0)
            if got != expected:
                found.append(
                    f"{self.name}: {name} should have {expected.images:,} {self.train.kind} of "
                    f"{expected.ids:,} ids, "
                    f"found {got.images:,} of {got.ids:,}: half unpacked?"
                )
        return found


def count(images: Images) -> Counts:
    """Identities and images, junk (id -1) left out."""
    known = images.ids[images.ids >= 0]
    return Counts(len(np.unique(known)), len(known))


def _column(where: str, name: str, values: Any, default: int, count: int) -> np.ndarray:
    if values is None:
        return np.full(count, default, np.int64)
    column = np.asarray(values)
    if column.shape != (count,) or (count and column.dtype.kind not in "iu"):
        got = f"{column.dtype} {column.shape}"
        raise ValueError(f"{where}: {name} must be whole numbers of shape ({count},), got {got}")
    return column.astype(np.int64)


def _numbered(count: int) -> list[str]:
    return [f"{place:06d}" for place in range(count)]


def _triple(item: Any, place: int) -> tuple[Any, int, int]:
    if not isinstance(item, (tuple, list)) or len(item) != 3:
        raise ValueError(
            f"as_images: items must be (image, id, camera), got {_kind(item)} at {place}"
        )
    return item[0], int(item[1]), int(item[2])


def _rgb(image: Any, place: int) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image if isinstance(image, torch.Tensor) else torch.empty(0)
    if pixels.dtype == torch.uint8 and pixels.ndim == 3 and pixels.shape[0] == 3:
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    raise ValueError(
        f"as_images: image must be PIL's or a uint8 tensor (3, H, W), got {_kind(image)} at {place}"
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
