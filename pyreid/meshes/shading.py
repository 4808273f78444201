"""Grey bodies on white: Lambert's law, one light, the pixels at an outline mixed with the white behind."""

from __future__ import annotations

import numpy as np

FINER = 2  # pixels that are drawn for one of the picture, along each axis

_LIGHT = np.array(
    [-0.33, 0.44, 0.835], dtype=np.float32
)  # towards it: above the viewer's left shoulder
_AMBIENT = 0.28
_ALBEDO = 0.84
_NEAR = 0.016  # in statures: two pixels side by side whose depths differ less are of one surface
_SMOOTH = 10  # steps of smoothing for a picture of 256 rows


def grey(
    normals: np.ndarray, depth: np.ndarray, seen: np.ndarray, *, smooth: float = 0.0
) -> np.ndarray:
    """(H, W) uint8: what was drawn `FINER` times as large, as a picture.

    Args:
        normals: (H * FINER, W * FINER, 3) float32, unit, x to the right, y up, z to the viewer.
        depth: (H * FINER, W * FINER) float32.
        seen: (H * FINER, W * FINER) bool: where there is something.
        smooth: a stature in units of depth: normals run into one another across what joins two parts, as
            skin does, not across an outline. 0: as they are.
    """
    height, width = (size // FINER for size in seen.shape)
    picture = np.full((height, width), 255, np.uint8)
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) // FINER for axis in (1, 0))
    if not len(rows):
        return picture
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    fine = tuple(slice(part.start * FINER, part.stop * FINER) for part in box)
    seen = seen[fine]
    count = _pooled(seen.astype(np.float32))
    some = np.maximum(count, 1)
    normal = np.stack([_pooled(normals[fine][..., k] * seen) for k in range(3)]) / some
    if smooth:
        steps = max(1, round(_SMOOTH * (height / 256) ** 2))
        _spread(normal, _pooled(depth[fine] * seen) / some, count > 0, _NEAR * smooth, steps)
    length = np.sqrt(np.einsum("kij,kij->ij", normal, normal)) + np.float32(1e-6)
    facing = np.maximum(np.einsum("k,kij->ij", _LIGHT, normal) / length, 0)
    bright = 255 * _ALBEDO * (_AMBIENT + (1 - _AMBIENT) * facing)
    share = count / FINER**2
    picture[box] = np.rint(255 + share * (bright - 255))
    return picture


def _pooled(values: np.ndarray) -> np.ndarray:
    """(H * FINER, W * FINER) -> (H, W), the sums."""
    parts = [values[i::FINER, j::FINER] for i in range(FINER) for j in range(FINER)]
    return np.add.reduce(parts)


def _spread(
    normal: np.ndarray, depth: np.ndarray, seen: np.ndarray, near: float, steps: int
) -> None:
    """Lets the normals (3, H, W) diffuse within surfaces."""
    down = (slice(None), slice(None, -1)), (slice(None), slice(1, None))
    across = (slice(None), slice(None), slice(None, -1)), (slice(None), slice(None), slice(1, None))
    flows = []
    for here, there in (down, across):
        one = seen[here[1:]] & seen[there[1:]]
        one &= np.abs(depth[here[1:]] - depth[there[1:]]) < near
        flows.append((here, there, np.float32(0.45) * one))
    for _ in range(steps):
        for here, there, share in flows:
            flow = share * (normal[there] - normal[here])
            normal[here] += flow
            normal[there] -= flow
