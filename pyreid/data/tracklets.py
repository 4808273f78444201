"""Tracklets: the frames of one person in one camera, one after another, in the place of a single image."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pyreid.data.images import ImageFiles, Images
from pyreid.data.transforms import View


class Clip(Sequence):
    """The frames of a tracklet in their order. Each is read when it is asked for."""

    def __init__(self, frames: Images, rows: np.ndarray):
        self.frames, self.rows = frames, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Clip(self.frames, self.rows[place])
        image: Image.Image = self.frames[int(self.rows[place])][0]
        return image


class Tracklets(Images):
    """N tracklets; `tracklets[row]` is (Clip, id, camera).

    Args:
        frames: the images of all of them.
        members: for each tracklet, its rows of `frames`, in their order; one at least.
        names: N distinct strings. Default: that of each first frame.
        ids, cameras: (N,). Default: those of each first frame, whose number the tracklet has.
    """

    kind = "tracklets"

    def __init__(
        self,
        frames: Images,
        members: Sequence[Any],
        names: Sequence[str] | None = None,
        ids: Any = None,
        cameras: Any = None,
    ):
        rows = [np.asarray(part, np.int64) for part in members]
        if empty := [place for place, part in enumerate(rows) if not len(part)]:
            raise ValueError(
                f"Tracklets: members must be one frame or more, got none at {empty[0]}"
            )
        first = np.array([part[0] for part in rows], np.int64)
        super().__init__(
            [frames.names[row] for row in first] if names is None else names,
            frames.ids[first] if ids is None else ids,
            frames.cameras[first] if cameras is None else cameras,
        )
        if len(self) != len(rows):
            raise ValueError(
                f"Tracklets: names must be one per tracklet, got {len(self)} for {len(rows)}"
            )
        self.frames = frames.frames[first]
        self.images = frames
        self.members = rows

    def _read(self, row: int) -> Clip:  # type: ignore[override]
        return Clip(self.images, self.members[self._places[row]])

    def stills(self) -> Images:
        """The middle frame of each tracklet, with its id and camera: for pictures."""
        parts = [self.members[place] for place in self._places]
        images = copy.copy(self.images.select([int(part[len(part) // 2]) for part in parts]))
        images.ids, images.cameras, images.frames = self.ids, self.cameras, self.frames
        return images


def camstyle(images: ImageFiles, folder: str | os.PathLike[str]) -> Tracklets:
    """Images with their copies in the styles of other cameras, as CamStyle's networks draw them: tracklets of
    the image itself, then the files STEM_fake_ATOB, such as 0002_c1s1_000451_03_fake_1to2.jpg, in or below
    `folder`. To train JVTC on, with a single view of as many frames as it takes views of an image:

        fit(methods.JVTC.Config(views=1), encoder, replace(data, train=camstyle(data.train, folder)),
            Training(frames=4, ...))

    A ValueError where an image has no copies.
    """
    folder = Path(folder)
    styles: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*_fake_*to*")):
        styles.setdefault(path.name.split("_fake_")[0], []).append(str(path.resolve()))
    members: list[list[str]] = []
    for name in images.names:
        copies = styles.get(Path(name).stem)
        if not copies:
            raise ValueError(
                f"camstyle: {folder} must hold copies of every image, got none such as "
                f"{Path(name).stem}_fake_1to2.jpg"
            )
        members.append([str((images.root / name).resolve()), *copies])
    ends = np.cumsum([len(part) for part in members])
    files = ImageFiles("/", [name for part in members for name in part])
    spans = np.split(np.arange(len(files)), ends[:-1])
    styled = Tracklets(files, spans, images.names, images.ids, images.cameras)
    styled.frames = images.frames
    return styled


@dataclass(frozen=True)
class Frames:
    """Clip -> (T, 3, H, W): random frames in their order, each through `view` on its own.

    `exactly`: of a clip that has fewer than `count` frames, so many all the same, some of them again (as SCL
    trains); else all that it has (as SCL tests, with a count of 900).
    """

    view: View
    count: int
    exactly: bool = True

    def __call__(self, clip: Clip) -> torch.Tensor:
        size = len(clip)
        if size >= self.count:
            chosen = torch.randperm(size)[: self.count] if size > self.count else torch.arange(size)
        else:
            chosen = torch.randint(size, (self.count,)) if self.exactly else torch.arange(size)
        return torch.stack([self.view(clip[place]) for place in chosen.sort().values.tolist()])
