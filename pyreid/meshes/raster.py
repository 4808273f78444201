"""Pictures of triangle meshes: a z-buffer, all candidate pixels of all triangles as one list.

The vertices are given as they fall on the picture. Their nearness is any number that is larger nearer by and
linear over a triangle's picture: -z where the view is parallel, 1 / z in perspective.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pyreid.meshes.shading import FINER, grey

_AT_ONCE = 1 << 20  # candidates: bounds memory for a few large triangles


class Hits(NamedTuple):
    """What is seen in each of the pixels (H, W); -1 and 0 where nothing is."""

    face: np.ndarray  # (H, W) int64
    weights: np.ndarray  # (H, W, 3) float32, of the three vertices
    nearness: np.ndarray  # (H, W) float32


def rasterise(
    points: np.ndarray, nearness: np.ndarray, faces: np.ndarray, height: int, width: int
) -> Hits:
    """The nearest triangle over the middle of each pixel.

    Args:
        points: (V, 2), x and y of the vertices in pixels: the middle of the first pixel is (0.5, 0.5).
        nearness: (V,), larger is nearer.
        faces: (F, 3) int64, seen from either side.
    """
    corners = points[faces]  # (F, 3, 2)
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    low = np.ceil(corners.min(axis=1) - 0.5).clip(0, (width, height)).astype(np.int64)
    high = np.floor(corners.max(axis=1) + 0.5).clip(0, (width, height)).astype(np.int64)
    span = (high - low).clip(0)
    span[area == 0] = 0
    counts = span[:, 0] * span[:, 1]
    whole = np.flatnonzero(counts)

    # Of each triangle: its box, where its weights u and v are 0, by how much they grow with x and with y.
    counts, low, span = counts[whole], low[whole].astype(np.int32), span[whole].astype(np.int32)
    first, second = first[whole] / area[whole, None], second[whole] / area[whole, None]
    origin = corners[whole, 0] - 0.5 - low
    edges = np.stack(
        [*origin.T, second[:, 1], -second[:, 0], -first[:, 1], first[:, 0]],
        axis=1,
        dtype=np.float32,
    )
    levels = nearness[faces[whole]].astype(np.float32)  # (F, 3)
    levels[:, 1:] -= levels[:, :1]
    corner = low[:, 1] * width + low[:, 0]
    ends = np.cumsum(counts)

    face = np.full(height * width, -1)
    weights = np.zeros((height * width, 3), np.float32)
    nearest = np.full(height * width, -np.inf, np.float32)
    start = 0
    while start < len(whole):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        many = counts[start:stop]
        owner = np.repeat(np.arange(start, stop, dtype=np.int32), many)
        place = np.arange(len(owner), dtype=np.int32)
        place -= np.repeat((ends[start:stop] - many - before).astype(np.int32), many)
        row, column = np.divmod(place, span[owner, 0])
        x0, y0, ux, uy, vx, vy = edges[owner].T
        x, y = column.astype(np.float32) - x0, row.astype(np.float32) - y0
        u, v = x * ux + y * uy, x * vx + y * vy
        inside = np.flatnonzero((u >= 0) & (v >= 0) & (u + v <= 1))
        owner, u, v = owner[inside], u[inside], v[inside]
        pixel = corner[owner] + row[inside] * width + column[inside]
        base, rise, other = levels[owner].T
        near = base + u * rise + v * other
        np.maximum.at(nearest, pixel, near)
        won = np.flatnonzero(near == nearest[pixel])[::-1]  # of equals the first face
        pixel, u, v = pixel[won], u[won], v[won]
        face[pixel] = whole[owner[won]]
        weights[pixel] = np.stack([1 - u - v, u, v], axis=1)
        start = stop
    nearest[face < 0] = 0
    return Hits(
        face.reshape(height, width),
        weights.reshape(height, width, 3),
        nearest.reshape(height, width),
    )


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(V, 3) unit vectors: of the faces around each vertex, by their areas; faces are counter-clockwise from
    outside."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normal = np.cross(b - a, c - a)
    sums = [np.bincount(faces.ravel(), np.repeat(normal[:, k], 3), len(vertices)) for k in range(3)]
    total = np.stack(sums, axis=1)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def mesh_picture(
    points: np.ndarray,
    nearness: np.ndarray,
    normals: np.ndarray,
    faces: np.ndarray,
    height: int,
    width: int,
) -> np.ndarray:
    """(height, width) uint8: a closed mesh in grey on white, smooth between its vertices.

    Args:
        points: (V, 2) of the vertices, in pixels.
        nearness: (V,), larger is nearer.
        normals: (V, 3), x to the right, y up, z to the viewer.
        faces: (F, 3) int64, counter-clockwise from outside.
    """
    a, b, c = (points[faces[:, k]] for k in range(3))
    first, second = b - a, c - a
    faces = faces[first[:, 0] * second[:, 1] < first[:, 1] * second[:, 0]]  # y goes down
    hits = rasterise(FINER * points, nearness, faces, FINER * height, FINER * width)
    seen = hits.face >= 0
    smooth = np.zeros((*seen.shape, 3), np.float32)
    corners = normals.astype(np.float32)[faces[hits.face[seen]]]
    smooth[seen] = np.einsum("vc,vcx->vx", hits.weights[seen], corners)
    return grey(smooth, hits.nearness, seen)
