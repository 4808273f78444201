"""A person as tapered capsules: proportions, a skeleton of 15 joints, a walk, and what hangs on the joints.

Axes: x to the right of the picture, y up, z towards the viewer; metres, with the ground at y = 0. At yaw 0 a
person faces the viewer, so their left is at positive x. What is fixed to a joint is measured in statures.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

Point = tuple[float, float, float]


class Part(enum.IntEnum):
    """What a capsule belongs to: the body first, then what can be worn."""

    HEAD = 0
    NECK = 1
    TORSO = 2
    HIPS = 3
    LEFT_UPPER_ARM = 4
    RIGHT_UPPER_ARM = 5
    LEFT_FOREARM = 6
    RIGHT_FOREARM = 7
    LEFT_HAND = 8
    RIGHT_HAND = 9
    LEFT_THIGH = 10
    RIGHT_THIGH = 11
    LEFT_SHIN = 12
    RIGHT_SHIN = 13
    LEFT_FOOT = 14
    RIGHT_FOOT = 15
    HAIR = 16
    HAT = 17
    HEM = 18  # of a skirt or a coat, over the thighs
    BAG = 19


# Joints: the parent, and where they are from it when standing, in statures. Parents come first.
_REST: dict[str, tuple[str | None, Point]] = {
    "pelvis": (None, (0, 0.534, 0)),
    "chest": ("pelvis", (0, 0.09, 0)),
    "head": ("chest", (0, 0.235, 0)),
    "left shoulder": ("chest", (0.105, 0.172, 0)),
    "right shoulder": ("chest", (-0.105, 0.172, 0)),
    "left elbow": ("left shoulder", (0, -0.172, 0)),
    "right elbow": ("right shoulder", (0, -0.172, 0)),
    "left wrist": ("left elbow", (0, -0.145, 0)),
    "right wrist": ("right elbow", (0, -0.145, 0)),
    "left hip": ("pelvis", (0.052, -0.01, 0)),
    "right hip": ("pelvis", (-0.052, -0.01, 0)),
    "left knee": ("left hip", (0, -0.24, 0)),
    "right knee": ("right hip", (0, -0.24, 0)),
    "left ankle": ("left knee", (0, -0.24, 0)),
    "right ankle": ("right knee", (0, -0.24, 0)),
}
JOINTS = {name: index for index, name in enumerate(_REST)}
_PARENTS = [JOINTS.get(parent or "", -1) for parent, _ in _REST.values()]
_OFFSETS = np.array([offset for _, offset in _REST.values()])
_SOLE = 0.044  # of the foot, below the ankle


@dataclass(frozen=True)
class Proportions:
    """Stature in metres; the rest as factors of an average build."""

    stature: float = 1.72
    girth: float = 1.0
    shoulders: float = 1.0
    hips: float = 1.0
    legs: float = 1.0

    @staticmethod
    def draw(rng: np.random.Generator) -> Proportions:
        drawn = rng.normal((1.70, 1.03, 1, 1, 1), (0.09, 0.13, 0.07, 0.07, 0.03))
        least, most = (1.45, 0.8, 0.85, 0.87, 0.93), (1.98, 1.4, 1.18, 1.18, 1.07)
        return Proportions(*(float(value) for value in drawn.clip(least, most)))


class Piece(NamedTuple):
    """A tapered capsule fixed to a joint: the segment between two points, in the joint's frame and in
    statures, and the radius at each end."""

    part: Part
    joint: str
    start: Point
    end: Point
    radii: tuple[float, float]


@dataclass(frozen=True)
class Capsules:
    """K tapered capsules in space. `origin` and `axes` are the frames of their joints, which stay with the
    body as it turns: textures are measured in them."""

    start: np.ndarray  # (K, 3)
    end: np.ndarray  # (K, 3)
    radii: np.ndarray  # (K, 2)
    part: np.ndarray  # (K,) int64, of Part
    origin: np.ndarray  # (K, 3)
    axes: np.ndarray  # (K, 3, 3), in columns
    unit: float  # metres to a stature

    def turned(self, yaw: float, pitch: float = 0.0) -> Capsules:
        """As seen when the body has turned by `yaw` about the vertical, to its left, by a viewer who looks
        down by `pitch`; radians."""
        turn = rotations(np.array([pitch, 0.0, 0.0])) @ rotations(np.array([0.0, yaw, 0.0]))
        return replace(
            self,
            start=self.start @ turn.T,
            end=self.end @ turn.T,
            origin=self.origin @ turn.T,
            axes=turn @ self.axes,
        )

    def moved(self, by: Sequence[float]) -> Capsules:
        shift = np.asarray(by)
        return replace(
            self, start=self.start + shift, end=self.end + shift, origin=self.origin + shift
        )

    def box(self) -> tuple[float, float, float, float]:
        """What the picture of the body fills: left, bottom, right, top."""
        ends = np.stack([self.start, self.end], axis=1)[..., :2]  # (K, 2, 2)
        low = (ends - self.radii[..., None]).min(axis=(0, 1))
        high = (ends + self.radii[..., None]).max(axis=(0, 1))
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


@dataclass(frozen=True)
class Skeleton:
    """Joints in space, in the order of `JOINTS`."""

    positions: np.ndarray  # (J, 3)
    rotations: np.ndarray  # (J, 3, 3)
    unit: float  # metres to a stature

    def attach(self, pieces: Iterable[Piece]) -> Capsules:
        """Pieces to where their joints are."""
        parts, joints, starts, ends, radii = zip(*pieces, strict=True)
        where = [JOINTS[joint] for joint in joints]
        origin, axes = self.positions[where], self.rotations[where]
        return Capsules(
            start=origin + self.unit * np.einsum("kij,kj->ki", axes, np.array(starts)),
            end=origin + self.unit * np.einsum("kij,kj->ki", axes, np.array(ends)),
            radii=self.unit * np.array(radii),
            part=np.array(parts, dtype=np.int64),
            origin=origin,
            axes=axes,
            unit=self.unit,
        )


def body(proportions: Proportions) -> list[Piece]:
    """The 25 capsules of a bare body."""
    girth, hips = proportions.girth, proportions.girth * proportions.hips
    wide, limb = proportions.shoulders, proportions.girth**0.5
    pieces = [
        Piece(Part.HEAD, "head", (0, 0.035, 0.012), (0, 0.090, -0.004), (0.036, 0.053)),
        Piece(Part.HEAD, "head", (0, 0.062, 0.050), (0, 0.046, 0.056), (0.006, 0.008)),  # the nose
        Piece(Part.NECK, "chest", (0, 0.18, -0.006), (0, 0.25, 0), (0.034 * limb, 0.030 * limb)),
        Piece(
            Part.TORSO,
            "chest",
            (-0.085 * wide, 0.160, 0),
            (0.085 * wide, 0.160, 0),
            (0.048 * girth**0.3, 0.048 * girth**0.3),
        ),
        Piece(
            Part.TORSO,
            "chest",
            (0, 0.13, 0.006),
            (0, 0, 0.010),
            (0.062 * girth, 0.058 * girth),
        ),
    ]
    for side, sign in (("left", 1), ("right", -1)):

        def add(part: str, joint: str, start: Point, end: Point, radii, by, side=side, sign=sign):
            part = part if part in Part.__members__ else f"{side}_{part}".upper()
            joint = joint if joint in JOINTS else f"{side} {joint}"
            (x, *start_yz), (u, *end_yz) = start, end
            pieces.append(
                Piece(
                    Part[part],
                    joint,
                    (sign * x, *start_yz),
                    (sign * u, *end_yz),
                    (radii[0] * by, radii[1] * by),
                )
            )

        add("TORSO", "chest", (0.05 * wide, 0.12, 0.004), (0.04, 0, 0.006), (0.064, 0.059), girth)
        add(
            "TORSO",
            "chest",
            (0.06 * wide, 0.172, -0.004),
            (0.012, 0.21, -0.006),
            (0.036, 0.034),
            limb,
        )
        add("HIPS", "pelvis", (0.036, 0.09, 0.004), (0.044, 0, -0.006), (0.059, 0.066), hips)
        add("upper_arm", "shoulder", (0, 0, 0), (0, -0.172, 0), (0.034, 0.026), limb)
        add("forearm", "elbow", (0, 0, 0), (0, -0.145, 0), (0.026, 0.018), limb)
        add("hand", "wrist", (0, -0.012, 0), (0, -0.065, 0.008), (0.019, 0.013), 1)
        add("thigh", "hip", (0, 0, 0), (0, -0.24, 0), (0.059, 0.038), limb)
        add("shin", "knee", (0, 0, 0), (0, -0.24, 0), (0.037, 0.023), limb)
        add("shin", "knee", (0, -0.05, -0.012), (0, -0.12, -0.01), (0.030, 0.026), limb)  # the calf
        add("foot", "ankle", (0, -0.022, -0.02), (0.008, -0.027, 0.085), (0.022, 0.017), 1)
    return pieces


def rotations(angles: np.ndarray) -> np.ndarray:
    """(..., 3) radians about x, y and z, taken in the order x, z, y -> (..., 3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = (
        np.moveaxis(np.cos(angles), -1, 0),
        np.moveaxis(np.sin(angles), -1, 0),
    )
    zero, one = np.zeros_like(cx), np.ones_like(cx)

    def matrix(*entries):
        return np.stack(entries, axis=-1).reshape(*cx.shape, 3, 3)

    about_x = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_z = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return about_y @ about_z @ about_x


def skeleton(proportions: Proportions, pose: np.ndarray) -> Skeleton:
    """Joints of a body in a pose, with the lower foot on the ground.

    Args:
        pose: (15, 3) radians by which each joint turns what hangs on it, about x, y and z.
    """
    unit, legs = proportions.stature, proportions.legs
    offsets = unit * _OFFSETS
    trunk = (1 - 0.53 * legs) / 0.47  # longer legs make no taller body
    for name, index in JOINTS.items():
        if name.split()[-1] in ("knee", "ankle"):
            offsets[index] *= legs
        elif name in ("chest", "head"):
            offsets[index, 1] *= trunk
        elif name.endswith("shoulder"):
            offsets[index] *= (proportions.shoulders, trunk, 1)
        elif name.endswith("hip"):
            offsets[index, 0] *= proportions.hips
    turns = rotations(pose)
    positions = np.zeros((len(JOINTS), 3))
    for joint, parent in enumerate(_PARENTS):
        if parent >= 0:
            positions[joint] = positions[parent] + turns[parent] @ offsets[joint]
            turns[joint] = turns[parent] @ turns[joint]
    ankles = [JOINTS["left ankle"], JOINTS["right ankle"]]
    soles = np.array([(0, -_SOLE, -0.02), (0, -_SOLE, 0.085)]) * unit
    ground = positions[ankles, None] + np.einsum("aij,sj->asi", turns[ankles], soles)
    positions[:, 1] -= ground[..., 1].min()
    return Skeleton(positions, turns, unit)


def walking(
    phase: float, stride: float = 1.0, *, swing: float = 1.0, stoop: float = 0.0
) -> np.ndarray:
    """(15, 3): the pose at a phase of the gait, in radians; the left leg is ahead at pi / 2. Half a cycle
    later left and right have changed places. A `stride` of 0 stands; `swing` is that of the arms."""
    pose = np.zeros((len(JOINTS), 3))
    for side, sign, angle in (("left", 1, phase), ("right", -1, phase + np.pi)):
        ahead = stride * np.sin(angle)
        lifted = 0.06 + 0.95 * stride * max(0.0, np.cos(angle + 0.5)) ** 2
        pose[JOINTS[f"{side} hip"]] = -0.42 * ahead, 0, 0.02 * sign
        pose[JOINTS[f"{side} knee"], 0] = lifted
        pose[JOINTS[f"{side} ankle"]] = -0.75 * (lifted - 0.42 * ahead), 0.12 * sign, 0
        pose[JOINTS[f"{side} shoulder"]] = 0.45 * swing * ahead, 0, 0.10 * sign
        pose[JOINTS[f"{side} elbow"], 0] = -0.22 - 0.25 * swing * stride * (1 - np.sin(angle)) / 2
    turn = stride * np.sin(phase)
    pose[JOINTS["pelvis"], 1] = -0.08 * turn
    pose[JOINTS["chest"]] = stoop + 0.03 * stride, 0.18 * turn, 0
    pose[JOINTS["head"]] = -0.5 * stoop, -0.10 * turn, 0
    return pose
