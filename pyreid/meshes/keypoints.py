"""From the 17 keypoints of COCO to a body in space: bones of fixed lengths, depths as a walker has them.

A keypoint says where a joint is in the photo. How far its bone comes towards the viewer follows from how much
shorter than itself it looks, up to the sign; knees bend backwards, elbows forwards, legs swing against one
another and arms against legs. Which way the body faces follows from the width of the shoulders, and whether
the left one is on the right.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyreid.people.body import JOINTS, Proportions, Skeleton, rotations, skeleton
from pyreid.people.render import Window

COCO = (
    *("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder"),
    *("left elbow", "right elbow", "left wrist", "right wrist", "left hip", "right hip"),
    *("left knee", "right knee", "left ankle", "right ankle"),
)

_AT = {name: index for index, name in enumerate(COCO)}
_STANDING = skeleton(Proportions(stature=1), np.zeros((len(JOINTS), 3))).positions
_LIMBS = {"leg": ("hip", "knee", "ankle"), "arm": ("shoulder", "elbow", "wrist")}
_SIDES = {"left": 1, "right": -1}
_SURE = 0.3  # confidence below which a keypoint is not believed
_FILLED = 0.92  # of the photo's height, by somebody of whom too little is seen to tell
_LEAN = 0.6  # radians, at most, within the picture


class Lifted(NamedTuple):
    """A body as it was seen, and through which window: lengths in statures, the middle of the hips at 0."""

    skeleton: Skeleton
    window: Window
    yaw: float  # how far it has turned to its left from facing the viewer, in radians


class _Bones(NamedTuple):
    """A limb: directions (2, 3) of its two bones, and how far each swings forwards."""

    along: np.ndarray
    swings: tuple[float, float]
    cost: float


def lift(keypoints: np.ndarray, size: tuple[int, int]) -> Lifted | None:
    """The body that is seen in a photo; None where neither hips nor shoulders are.

    Args:
        keypoints: (17, 3), in the order of `COCO`: x, y in pixels of the photo, confidence. Joints of a low
            confidence are where a walker's would be.
        size: of the photo, width and height.
    """
    points = np.asarray(keypoints, np.float64)
    if points.shape != (len(COCO), 3):
        raise ValueError(f"lift: keypoints must have shape (17, 3), got {points.shape}")
    sure = np.isfinite(points).all(axis=1) & (points[:, 2] >= _SURE)
    seen = {name: points[at, :2] * (1, -1) for name, at in _AT.items() if sure[at]}  # y upwards
    hips, shoulders = _middle(seen, "hip"), _middle(seen, "shoulder")
    if hips is None and shoulders is None:
        return None
    scale = _scale(seen, hips, shoulders, size[1])
    torso = _STANDING[JOINTS["left shoulder"], 1] - _STANDING[JOINTS["left hip"], 1]
    if hips is None:
        assert shoulders is not None
        hips = shoulders - (0, torso * scale)
    up = np.array([0.0, 1.0]) if shoulders is None else shoulders - hips
    seen = {name: (point - hips) / scale for name, point in seen.items()}
    lean = float(np.clip(np.arctan2(up[0], max(up[1], 1e-6)), -_LEAN, _LEAN))
    yaw = _yaw(seen)
    trunk = rotations(np.array([0, 0, -lean])) @ rotations(np.array([0, yaw, 0]))

    rest = _STANDING - (0, _STANDING[JOINTS["left hip"], 1], 0)
    positions = rest @ trunk.T
    turns = np.repeat(trunk[None], len(JOINTS), axis=0)
    legs = {side: _limb(side, "leg", seen, positions, trunk) for side in _SIDES}
    both = min(
        itertools.product(legs["left"], legs["right"]),
        key=lambda pair: sum(one.cost for one in pair) + 0.3 * sum(p.swings[0] for p in pair) ** 2,
    )
    for side, leg in zip(_SIDES, both, strict=True):
        _hang(side, "leg", leg, positions, turns, trunk)
        arms = _limb(side, "arm", seen, positions, trunk)
        against = leg.swings[0]
        arm = min(arms, key=lambda one: one.cost + 0.3 * (one.swings[0] + against) ** 2)
        _hang(side, "arm", arm, positions, turns, trunk)
    left, below = -hips[0] / scale, (-size[1] - hips[1]) / scale
    window = (left, below, left + size[0] / scale, below + size[1] / scale)
    return Lifted(Skeleton(positions, turns, 1.0), window, yaw)


def read_keypoints(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Keypoints (17, 3) by the name of the photo.

    Args:
        path: .json: a dictionary from names to 17 x 3 numbers; or COCO's results or annotations, with
            file_name in each or images beside them. Or .npz: names (N,) and keypoints (N, 17, 3). Where there
            is no third number, all are believed; of several people in a photo, the most confident counts.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                rows = list(zip(arrays["names"].tolist(), arrays["keypoints"], strict=True))
        else:
            rows = _from_json(json.loads(path.read_text(encoding="utf-8")))
        found: dict[str, np.ndarray] = {}
        for name, values in rows:
            keypoints = _seventeen(values)
            best = found.get(str(name))
            if best is None or keypoints[:, 2].mean() > best[:, 2].mean():
                found[str(name)] = keypoints
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: must hold 17 keypoints by name of photo: {reason}") from None
    return found


def _from_json(held: Any) -> list[tuple[str, Any]]:
    if isinstance(held, Mapping) and "annotations" not in held:
        return list(held.items())
    names: dict[Any, str] = {}
    if isinstance(held, Mapping):
        names = {image["id"]: image["file_name"] for image in held.get("images", [])}
        held = held["annotations"]
    rows = []
    for one in held:
        name = one.get("file_name", names.get(one.get("image_id"), one.get("image_id")))
        if name is None:
            raise ValueError("each of a list must have file_name or image_id")
        rows.append((name, one["keypoints"]))
    return rows


def _seventeen(values: Any) -> np.ndarray:
    """(17, 3)."""
    array = np.asarray(values, np.float64)
    if array.shape == (len(COCO), 2):
        return np.concatenate([array, np.ones((len(COCO), 1))], axis=1)
    if array.size != 3 * len(COCO):
        raise ValueError(f"got {array.shape} numbers for one person")
    return array.reshape(len(COCO), 3)


def _middle(seen: Mapping[str, np.ndarray], joint: str) -> np.ndarray | None:
    pair = [seen[name] for side in _SIDES if (name := f"{side} {joint}") in seen]
    return np.mean(pair, axis=0) if len(pair) == 2 else None


def _length(upper: str, lower: str) -> float:
    return float(np.linalg.norm(_STANDING[JOINTS[upper]] - _STANDING[JOINTS[lower]]))


def _scale(
    seen: Mapping[str, np.ndarray],
    hips: np.ndarray | None,
    shoulders: np.ndarray | None,
    height: int,
) -> float:
    """Pixels to a stature: by what looks longest, since bones only ever look shorter than they are."""
    lengths = []
    if hips is not None and shoulders is not None:
        torso = _STANDING[JOINTS["left shoulder"], 1] - _STANDING[JOINTS["left hip"], 1]
        lengths.append(float(np.linalg.norm(shoulders - hips)) / torso)
    for side in _SIDES:
        upper, middle, end = (f"{side} {joint}" for joint in _LIMBS["leg"])
        if {upper, middle, end} <= seen.keys():
            drawn = np.linalg.norm(seen[upper] - seen[middle])
            drawn += np.linalg.norm(seen[middle] - seen[end])
            lengths.append(float(drawn) / (_length(upper, middle) + _length(middle, end)))
    longest = max(lengths, default=_FILLED * height)
    return float(np.clip(longest, 0.25 * height, 3 * height))


def _yaw(seen: Mapping[str, np.ndarray]) -> float:
    """From points in statures."""
    wide = full = 0.0
    for joint in ("shoulder", "hip"):
        left, right = f"left {joint}", f"right {joint}"
        if left in seen and right in seen:
            wide += seen[left][0] - seen[right][0]
            full += _length(left, right)
    cosine = float(np.clip(wide / full, -1, 1)) if full else 1.0

    # Which side it faces: the nose is before the ears, a knee before hip and ankle, an elbow behind.
    rightwards = 0.0
    ears = [seen[name][0] for side in _SIDES if (name := f"{side} ear") in seen]
    behind = ears or [seen[n][0] for side in _SIDES if (n := f"{side} shoulder") in seen]
    if "nose" in seen and behind:
        rightwards += 2 * (seen["nose"][0] - np.mean(behind))
    for side, (limb, ahead) in itertools.product(_SIDES, (("leg", 1), ("arm", -1))):
        upper, middle, end = (f"{side} {joint}" for joint in _LIMBS[limb])
        if {upper, middle, end} <= seen.keys():
            rightwards += ahead * (seen[middle][0] - (seen[upper][0] + seen[end][0]) / 2)
    return float(np.arccos(cosine)) * (1 if rightwards >= 0 else -1)


def _limb(
    side: str, limb: str, seen: Mapping[str, np.ndarray], positions: np.ndarray, trunk: np.ndarray
) -> list[_Bones]:
    """Each way in which the two bones may come out of the picture or go into it."""
    upper, middle, end = (f"{side} {joint}" for joint in _LIMBS[limb])
    lengths = _length(upper, middle), _length(middle, end)
    found = []
    start = positions[JOINTS[upper]]
    for first in _directions(start, seen.get(middle), lengths[0]):
        first = -trunk[:, 1] if first is None else first
        joint = start + lengths[0] * first
        target = seen.get(end) if middle in seen else None
        for second in _directions(joint, target, lengths[1]):
            along = np.stack([first, first if second is None else second])
            found.append(_bones(side, limb, along, trunk))
    return found


def _directions(start: np.ndarray, target: np.ndarray | None, length: float) -> list[Any]:
    """Unit vectors from a joint in space to one in the picture, nearer and further; None: not seen."""
    if target is None:
        return [None]
    flat = (target - start[:2]) / length
    if (reach := float(np.linalg.norm(flat))) >= 1:
        return [np.array([*flat / reach, 0.0])]
    depth = np.sqrt(1 - reach**2)
    return [np.array([*flat, depth]), np.array([*flat, -depth])]


def _bones(side: str, limb: str, along: np.ndarray, trunk: np.ndarray) -> _Bones:
    """How unlike a walker this is."""
    outwards, up, ahead = (along @ trunk).T
    swings = np.arctan2(ahead, -up)
    bend = float(swings[1] - swings[0]) * (-1 if limb == "leg" else 1)
    beside = outwards - 0.05 * _SIDES[side]
    cost = 4 * max(0.0, -bend) ** 2 + beside[0] ** 2 + 0.5 * beside[1] ** 2
    cost += 0.3 * float(swings[0]) ** 2 + 0.05 * float(swings[1]) ** 2
    return _Bones(along, (float(swings[0]), float(swings[1])), float(cost))


def _hang(
    side: str,
    limb: str,
    bones: _Bones,
    positions: np.ndarray,
    turns: np.ndarray,
    trunk: np.ndarray,
) -> None:
    """Puts a limb to its place."""
    names = [f"{side} {joint}" for joint in _LIMBS[limb]]
    at = [JOINTS[name] for name in names]
    for k, direction in enumerate(bones.along):
        positions[at[k + 1]] = positions[at[k]] + _length(names[k], names[k + 1]) * direction
        turns[at[k]] = _frame(-direction, trunk)
    turns[at[2]] = turns[at[1]]
    if limb == "leg":  # feet stay about level
        turns[at[2]] = _frame(0.4 * -bones.along[1] + (0, 0.6, 0), trunk)


def _frame(up: np.ndarray, trunk: np.ndarray) -> np.ndarray:
    """(3, 3): what of a limb is up goes there, what is ahead stays as far ahead as it can."""
    up = up / np.linalg.norm(up)
    ahead = trunk[:, 2] - (trunk[:, 2] @ up) * up
    if np.linalg.norm(ahead) < 0.2:
        ahead = trunk[:, 1] - (trunk[:, 1] @ up) * up
    ahead = ahead / np.linalg.norm(ahead)
    return np.stack([np.cross(up, ahead), up, ahead], axis=1)
