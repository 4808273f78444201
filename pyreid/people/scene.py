"""Surveillance cameras: the place each one watches, what stands before it, what lens and sensor make of it.

Cameras differ as those of a real network do, and more: another wall and floor, light from elsewhere, another
cast, sharpness and compression. To what has not been trained, two people in one camera look more alike than
one person in two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_MARGIN = (
    1.5  # height of the place over that of a picture; the crops of people come from all over it
)
_WIDTH = 6.0  # its width, in heights of a picture


@dataclass(frozen=True)
class Camera:
    """How one camera sees. Lengths in pictures are parts of the height."""

    key: tuple[int, ...]  # of its random numbers
    views: np.ndarray  # (8,): how often people are seen turned by k * 45 degrees
    pitch: float  # how far it looks down, in radians
    light: np.ndarray  # (3,), unit, towards it
    ambient: float
    gains: np.ndarray  # (3,)
    exposure: float
    gamma: float
    saturation: float
    haze: float  # the level of black
    blur: float
    resolution: float  # of the sensor, over that of the picture
    noise: float
    compression: float  # the step of the coefficients

    @staticmethod
    def draw(key: tuple[int, ...], gap: float) -> Camera:
        """At a `gap` of 0 cameras differ in place, viewpoint and light alone; at 1 hardly anything looks the
        same in two of them."""
        rng = np.random.default_rng(key)
        views = np.full(8, 0.03)
        main = int(rng.integers(8))
        views[[main, (main + int(rng.integers(3, 6))) % 8]] += (0.5, 0.26)
        light = np.array([rng.uniform(-1, 1), rng.uniform(0.2, 1), rng.uniform(0.3, 0.9)])
        cast = rng.normal(0, 1, 3)
        cast -= cast.mean()
        return Camera(
            key=key,
            views=views / views.sum(),
            pitch=float(rng.uniform(0.02, 0.42)),
            light=light / np.linalg.norm(light),
            ambient=float(rng.uniform(0.3, 0.65)),
            gains=np.exp(gap * 0.16 * cast / np.abs(cast).max()),
            exposure=float(np.exp(gap * rng.uniform(-0.32, 0.32))),
            gamma=float(np.exp(gap * rng.uniform(-0.4, 0.4))),
            saturation=float(np.exp(gap * rng.uniform(-0.8, 0.22))),
            haze=gap * float(rng.uniform(0, 0.14)),
            blur=0.002 + gap * float(rng.uniform(0, 0.007)),
            resolution=1 - gap * float(rng.uniform(0, 0.55)),
            noise=0.006 + gap * float(rng.uniform(0, 0.034)),
            compression=0.01 + gap * float(rng.uniform(0, 0.05)),
        )

    def backdrop(self, height: int, width: int, at: np.ndarray) -> np.ndarray:
        """(height, width, 3) float32: a piece of the place, from its top left `at` (0, 0) to its bottom right
        at (1, 1)."""
        place = _place(self.key, height)
        down, across = np.asarray(at).clip(0, 1)
        row, column = int(down * (len(place) - height)), int(across * (place.shape[1] - width))
        return place[row : row + height, column : column + width].copy()

    def occlude(self, picture: np.ndarray, rng: np.random.Generator) -> None:
        """Something of the place comes before the person."""
        height, width = picture.shape[:2]
        own = np.random.default_rng((*self.key, 2))
        kind, paint = own.choice(("pillar", "railing", "plant")), own.uniform(0.1, 0.75, 3)
        row, column = np.mgrid[:height, :width].astype(np.float32) / np.float32(height)
        if kind == "pillar":  # at one side
            wide = rng.uniform(0.05, 0.13)
            centre = rng.choice((rng.uniform(0.04, 0.34), rng.uniform(0.66, 0.96))) * width / height
            across = (column - np.float32(centre)) / np.float32(wide)
            hidden = np.abs(across) < 1
            shade = 0.6 + 0.4 * np.sqrt(np.maximum(1 - across**2, 0))
        elif kind == "railing":
            top, step = rng.uniform(0.55, 0.72), rng.uniform(0.07, 0.12)
            bars = (column + np.float32(rng.uniform(0, 0.2))) % np.float32(step) < 0.018
            hidden = (row > top) & (bars | (row < top + 0.03))
            shade = np.ones_like(row)
        else:
            leaves = _noise(rng, height, width, 0.06) + 0.5 * _noise(rng, height, width, 0.025)
            hidden = leaves > 0.5 + 3.5 * (rng.uniform(0.62, 0.78) - row)
            paint = np.array((0.18, 0.32, 0.12))
            shade = 0.5 + leaves
        picture[hidden] = paint.astype(np.float32) * shade[hidden, None]

    def expose(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(height, width, 3) light -> uint8: lens, sensor and compression. The hour changes the exposure."""
        height, width = picture.shape[:2]
        picture = _blurred(picture, self.blur * height)
        small = round(height * self.resolution), round(width * self.resolution)
        picture = _resized(_resized(picture, *small), height, width)
        gains = self.gains * self.exposure * np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.02, 3))
        picture = np.maximum(picture * gains.astype(np.float32), 0)
        picture **= np.float32(self.gamma)
        grey = (picture[..., :1] + picture[..., 1:2] + picture[..., 2:]) / 3
        picture = grey + np.float32(self.saturation) * (picture - grey)
        picture = np.float32(self.haze) + np.float32(1 - self.haze) * picture
        picture += np.float32(self.noise) * rng.standard_normal(picture.shape, dtype=np.float32)
        picture = _compressed(picture, self.compression)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def streaked(picture: np.ndarray, length: int) -> np.ndarray:
    """Motion along x, over `length` pixels."""
    edges = np.pad(picture, ((0, 0), (length // 2, length - 1 - length // 2), (0, 0)), mode="edge")
    width = picture.shape[1]
    parts = [edges[:, shift : shift + width] for shift in range(length)]
    return np.add.reduce(parts) / np.float32(length)


@lru_cache(maxsize=32)
def _place(key: tuple[int, ...], unit: int) -> np.ndarray:
    """A wall and a floor with things along them, for pictures of `unit` rows."""
    rng = np.random.default_rng((*key, 1))
    height, width = round(_MARGIN * unit), round(_WIDTH * unit)
    row, column = np.mgrid[:height, :width].astype(np.float32) / np.float32(unit)
    horizon = rng.uniform(0.35, 0.95)

    def colour(low=0.25, high=0.85, tint=0.07):
        return (rng.uniform(low, high) + rng.normal(0, tint, 3)).clip(0.05, 0.95)

    wall, floor = colour(), colour()
    picture = np.where((row < horizon)[..., None], wall, floor).astype(np.float32)

    def lay(where: np.ndarray, what: np.ndarray, strength=1.0) -> None:
        share = (strength * where.astype(np.float32))[..., None]
        picture[:] = picture * (1 - share) + np.float32(share) * what.astype(np.float32)

    above = row < horizon
    kind = rng.choice(("bricks", "shutter", "leaves", "plain", "tiles"))
    if kind in ("bricks", "tiles"):
        high = rng.uniform(0.05, 0.09) if kind == "bricks" else rng.uniform(0.12, 0.3)
        layer = np.floor(row / high)
        shift = layer % 2 / 2 if kind == "bricks" else 0
        joints = ((row / high) % 1 < 0.12) | ((column / (2.2 * high) + shift) % 1 < 0.06)
        lay(above & joints, colour(), 0.8)
    elif kind == "shutter":
        lay(above & ((column if rng.random() < 0.5 else row) % 0.11 < 0.045), colour(), 0.7)
    elif kind == "leaves":
        leaves = _noise(rng, height, width, 0.07) + 0.6 * _noise(rng, height, width, 0.02)
        lay(above, np.array((0.20, 0.33, 0.13)))
        lay(above * np.clip(leaves - 0.4, 0, 1), np.array((0.55, 0.70, 0.32)))

    depth = np.maximum(row - horizon, 1e-3)
    kind = rng.choice(("slabs", "grass", "plain", "crossing"))
    if kind == "slabs":  # lines that come nearer, seen from above
        lines = (np.log(depth + 0.12) * 5 % 1 < 0.14) | (column / (0.35 + depth) % 0.5 < 0.03)
        lay(~above & lines, colour(), 0.6)
    elif kind == "grass":
        lay(~above, np.array((0.30, 0.42, 0.18)))
        lay(~above * _noise(rng, height, width, 0.015), np.array((0.5, 0.6, 0.3)), 0.6)
    elif kind == "crossing":
        lay(~above & ((column + 0.5 * row) % 0.5 < 0.22), colour(0.75, 0.95, 0.03))

    for _ in range(int(rng.integers(6, 14))):  # doors, posters, bins, what is parked
        left, wide = rng.uniform(0, _WIDTH), rng.uniform(0.08, 0.5)
        low = horizon + rng.uniform(-0.15, 0.3)
        top = low - rng.uniform(0.1, 0.5)
        inside = (column > left) & (column < left + wide) & (row > top) & (row < low)
        if rng.random() < 0.4:
            u, v = (column - left) / wide * 2 - 1, (row - top) / (low - top) * 2 - 1
            inside &= u**2 + v**2 < 1
        lay(inside, colour(0.1, 0.9, 0.16), rng.uniform(0.7, 1))
    light = 1 + 0.5 * (_noise(rng, height, width, 0.5) - 0.5) + 0.25 * (horizon - row)
    grain = 1 + 0.16 * (_noise(rng, height, width, 0.03) - 0.5)
    return (picture * (light * grain)[..., None]).clip(0, 1).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """(height, width) float32 in [0, 1]: smooth, with detail of `cell` heights."""
    pixels = max(cell * height, 1.5)
    grid = rng.random((round(height / pixels) + 2, round(width / pixels) + 2), dtype=np.float32)
    return _resized(grid[..., None], height, width)[..., 0]


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, between the pixel centres."""
    for axis, size in ((0, height), (1, width)):
        have = picture.shape[axis]
        if have == size:
            continue
        at = ((np.arange(size) + 0.5) * have / size - 0.5).clip(0, have - 1)
        first = np.minimum(at.astype(np.int64), max(have - 2, 0))
        weight = (at - first).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        a = picture.take(first, axis)
        picture = a + weight * (picture.take(np.minimum(first + 1, have - 1), axis) - a)
    return picture


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian. Taps are added one by one, so that the bits do not depend on a matrix product's threads."""
    reach = int(np.ceil(2.5 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        size = picture.shape[axis]
        pad = [(reach, reach) if axis == other else (0, 0) for other in range(3)]
        edges = np.pad(picture, pad, mode="edge")
        slices = (edges.take(range(shift, shift + size), axis) for shift in range(len(taps)))
        picture = sum(tap * part for tap, part in zip(taps, slices, strict=True))
    return picture


_FREQUENCIES = np.arange(8)
_COSINES = np.cos(np.pi * (2 * np.arange(8) + 1) * _FREQUENCIES[:, None] / 16) / 2
_COSINES[0] /= np.sqrt(2)
_COSINES = _COSINES.astype(np.float32)  # (8, 8), orthonormal


def _compressed(picture: np.ndarray, step: float) -> np.ndarray:
    """As if kept as JPEG: the cosines of blocks of 8 x 8 rounded, high frequencies most."""
    height, width = picture.shape[:2]
    picture = np.pad(picture, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    blocks = picture.reshape(picture.shape[0] // 8, 8, picture.shape[1] // 8, 8, 3)
    steps = np.float32(step) * (1 + _FREQUENCIES[:, None] + _FREQUENCIES).astype(np.float32)
    steps = steps[:, None, :, None]
    kept = np.einsum("ui,aibjc->aubjc", _COSINES, blocks)
    kept = np.einsum("vj,aubjc->aubvc", _COSINES, kept)
    kept = np.rint(kept / steps) * steps
    kept = np.einsum("ui,aubvc->aibvc", _COSINES, kept)
    kept = np.einsum("vj,aibvc->aibjc", _COSINES, kept)
    return kept.reshape(picture.shape)[:height, :width]
