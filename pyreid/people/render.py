"""Pictures of capsules: for every pixel the nearest surface, exactly and all pixels at once.

The view is orthographic, along -z. A tapered capsule is the union of the spheres whose centre and radius
run linearly from one end to the other, so the surface over a pixel is the highest point of a family of
spheres. With t from 0 to 1 along the capsule, height(t) = z(t) + sqrt(q(t)), where q is a quadratic: the
radius squared less the squared distance from the pixel to the axis. Its maximum has a closed form; where that
is not between 0 and 1, an end is the highest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyreid.people.body import Capsules

Window = tuple[float, float, float, float]
STANDING: Window = (-0.5, -0.05, 0.5, 1.95)


@dataclass(frozen=True)
class Surface:
    """What is seen of capsules, for the V pixels where there is something."""

    shape: tuple[int, int]
    pixels: np.ndarray  # (V,) int64, row by row
    depth: np.ndarray  # (V,) float32, larger is nearer
    normals: np.ndarray  # (V, 3) float32, unit
    parts: np.ndarray  # (V,) int64
    coordinates: np.ndarray  # (V, 3) float32: in the frame of the part's joint, in statures

    def picture(self, values: np.ndarray, empty: float = 0.0) -> np.ndarray:
        """Values of the V pixels, such as `surface.depth`, as a picture (height, width, ...)."""
        height, width = self.shape
        picture = np.full((height * width, *values.shape[1:]), empty, dtype=values.dtype)
        picture[self.pixels] = values
        return picture.reshape(height, width, *values.shape[1:])

    def silhouette(self) -> np.ndarray:
        """(height, width) bool."""
        return self.picture(np.ones(len(self.pixels), dtype=bool))


def render(capsules: Capsules, height: int, width: int, *, window: Window = STANDING) -> Surface:
    """What is seen of the capsules through a window: left, bottom, right, top, in metres."""
    left, bottom, right, top = window
    across, down = (right - left) / width, (top - bottom) / height
    start, radius = capsules.start, capsules.radii[:, 0]
    along, taper = capsules.end - start, capsules.radii[:, 1] - radius
    curve = taper**2 - along[:, 0] ** 2 - along[:, 1] ** 2  # of q(t) = curve t^2 + 2 b t + c
    curve = np.where(np.abs(curve) < 1e-8, -1e-8, curve)
    steep = along[:, 2] ** 2 - curve

    # The pixels that a capsule may cover are those of its box; all boxes as one list.
    ends = np.stack([start, capsules.end], axis=1)[..., :2]  # (K, 2, 2)
    low = (ends - capsules.radii[..., None]).min(axis=1)
    high = (ends + capsules.radii[..., None]).max(axis=1)
    column = _clipped((low[:, 0] - left) / across, width)
    columns = _clipped((high[:, 0] - left) / across, width) - column
    row = _clipped((top - high[:, 1]) / down, height)
    rows = _clipped((top - low[:, 1]) / down, height) - row
    counts = rows * columns
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    at_row, at_column = np.divmod(place, columns[owner])
    at_row += row[owner]
    at_column += column[owner]

    values = (*start.T, *along.T, radius, taper, curve, 1 / np.maximum(steep, 1e-12))
    x0, y0, z0, dx, dy, dz, r, dr, a, slope = np.array(values, dtype=np.float32)[:, owner]
    x = np.float32(left) + np.float32(across) * (at_column.astype(np.float32) + 0.5) - x0
    y = np.float32(top) - np.float32(down) * (at_row.astype(np.float32) + 0.5) - y0
    b = r * dr + x * dx + y * dy
    c = r * r - x * x - y * y
    t = -(dz * np.sqrt(np.maximum(b * b - a * c, 0) * slope) + b) / a
    np.clip(t, 0, 1, out=t)
    depth = _height(t, a, b, c, dz)
    nested = np.flatnonzero(a > 0)  # one end before the other: the cone between may not show
    for end in (np.float32(0), np.float32(1)):
        other = _height(end, a[nested], b[nested], c[nested], dz[nested])
        t[nested] = np.where(other > depth[nested], end, t[nested])
        depth[nested] = np.maximum(depth[nested], other)
    depth += z0

    pixel = at_row * width + at_column
    nearest = np.full(height * width, -np.inf, dtype=np.float32)
    np.maximum.at(nearest, pixel, depth)
    seen = np.flatnonzero((depth == nearest[pixel]) & (depth > -np.inf))
    winner = np.full(height * width, -1)
    winner[pixel[seen]] = seen  # of equals the last
    pixels = np.flatnonzero(winner >= 0)
    seen = winner[pixels]

    k, t, depth = owner[seen], t[seen, None], depth[seen]
    start, along = start.astype(np.float32), along.astype(np.float32)
    point = np.stack([x[seen] + start[k, 0], y[seen] + start[k, 1], depth], axis=1)
    normals = point - start[k] - t * along[k]
    normals /= np.sqrt(np.einsum("vi,vi->v", normals, normals))[:, None] + np.float32(1e-9)
    inwards = (capsules.axes / capsules.unit).astype(np.float32)
    offset = point - capsules.origin.astype(np.float32)[k]
    coordinates = np.einsum("vi,vij->vj", offset, inwards[k])
    return Surface((height, width), pixels, depth, normals, capsules.part[k], coordinates)


def lit(normals: np.ndarray, light: np.ndarray, ambient: float = 0.45) -> np.ndarray:
    """(V,) float32: how bright surfaces of these (V, 3) normals are; 1 where they face the `light`, a unit
    vector towards it. The light wraps around the body, as that of the sky does."""
    # Not a BLAS product, whose last bits may depend on its threads.
    facing = np.einsum("vi,i->v", normals, light.astype(np.float32))
    facing = np.maximum(0.6 * facing + 0.4, 0)
    return np.float32(ambient) + np.float32(1 - ambient) * facing


def _clipped(edges: np.ndarray, size: int) -> np.ndarray:
    """Pixels whose centre is beyond these edges begin here."""
    return np.clip(np.ceil(edges - 0.5), 0, size).astype(np.int64)


def _height(t, a, b, c, dz) -> np.ndarray:
    """Of the sphere at t above the start of the axis; -inf where the pixel is beside it."""
    q = (a * t + 2 * b) * t + c
    return np.where(q > 0, t * dz + np.sqrt(np.maximum(q, 0)), np.float32(-np.inf))
