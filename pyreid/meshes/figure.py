"""The body that needs nobody's files: tapered capsules in a pose, grey, in eight turns."""

from __future__ import annotations

import zlib

import numpy as np

from pyreid.data import ANGLES
from pyreid.meshes.shading import FINER, grey
from pyreid.people.body import Capsules, Proportions, body, skeleton, walking
from pyreid.people.render import Window, render

_FILLED = 0.92  # of the height of a picture of somebody, by the body
_STRIDE = 0.62  # of a walk of which nothing is known: half as wide as high


def turns(
    pose: np.ndarray,
    *,
    height: int,
    width: int,
    yaw: float = 0.0,
    pitch: float = 0.0,
    proportions: Proportions | None = None,
    aspect: float | None = None,
) -> np.ndarray:
    """(8, height, width) uint8: a body in a pose, as it is and turned to its left by 45 to 315 degrees; from
    head to foot, in the middle of the picture.

    Args:
        pose: (15, 3), as of `people.body.walking`.
        yaw: how far it has turned to its left from facing the viewer before; radians.
        pitch: how far the viewer looks down.
        aspect: of the photo that the picture stands for, its width over its height. Default: the picture's.
    """
    proportions = proportions or Proportions()
    capsules = skeleton(proportions, pose).attach(body(proportions))
    _, low, _, high = capsules.turned(yaw, pitch).box()
    window = _around((low + high) / 2, (high - low) / _FILLED, aspect or width / height)
    return capsule_turns(capsules, height=height, width=width, window=window, yaw=yaw, pitch=pitch)


def capsule_turns(
    capsules: Capsules,
    *,
    height: int,
    width: int,
    window: Window,
    yaw: float = 0.0,
    pitch: float = 0.0,
) -> np.ndarray:
    """(8, height, width) uint8: capsules as they turn about the origin, through a window that stays."""
    views = [
        picture(capsules.turned(yaw + angle, pitch), height, width, window=window)
        for angle in np.radians(ANGLES)
    ]
    return np.stack(views)


def neutral(name: str) -> np.ndarray:
    """(15, 3): the walk of somebody of whom nothing is known, at a phase that the name of the photo gives."""
    phase = 2 * np.pi * zlib.crc32(name.encode()) / 2**32
    return walking(phase, _STRIDE)


def picture(capsules: Capsules, height: int, width: int, *, window: Window) -> np.ndarray:
    """(height, width) uint8: capsules in grey on white, seen through a window."""
    surface = render(capsules, FINER * height, FINER * width, window=window)
    return grey(
        surface.picture(surface.normals),
        surface.picture(surface.depth),
        surface.silhouette(),
        smooth=capsules.unit,
    )


def _around(middle: float, tall: float, aspect: float) -> Window:
    wide = tall * aspect
    return -wide / 2, middle - tall / 2, wide / 2, middle + tall / 2
