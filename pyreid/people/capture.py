"""One picture of one person in one camera, a function of the seed and of three numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pyreid.people.body import JOINTS, Capsules, Proportions, Skeleton, body, skeleton, walking
from pyreid.people.render import Window, lit, render
from pyreid.people.scene import Camera, streaked
from pyreid.people.wardrobe import Outfit

_PERSON, _CAMERA, _VISITS, _PASS, _SHOT, _PASSER = range(6)  # what random numbers are for
PER_PASS = 4  # images of a person who crosses a camera's view once
_FINER = 2  # pixels of the renderer to one of the picture, along each axis

# What an arm may do besides swinging: the left shoulder's and elbow's turns about x, y and z.
_GESTURES = {
    "none": None,
    "calls": ((-0.5, 0, 0), (-2.3, 0, 0)),
    "reads": ((-0.35, 0, 0), (-1.5, 0, 0)),
    "hand in pocket": ((0.25, 0, 0.25), (-0.7, 0, 0)),
    "carries": ((0.05, 0, 0.16), (-0.08, 0, 0)),
}


@dataclass(frozen=True)
class Person:
    proportions: Proportions
    outfit: Outfit
    stride: float
    swing: float  # of the arms
    stoop: float

    @staticmethod
    def draw(rng: np.random.Generator) -> Person:
        return Person(
            Proportions.draw(rng),
            Outfit.draw(rng),
            stride=float(rng.uniform(0.6, 1.05)),
            swing=float(rng.uniform(0.4, 1.2)),
            stoop=float(np.abs(rng.normal(0, 0.08))),
        )

    def joints(self, phase: float, pace: float, gesture: str) -> Skeleton:
        """Facing the viewer; a gesture is made with the hand that carries no bag."""
        pose = walking(phase, pace * self.stride, swing=self.swing, stoop=self.stoop)
        carrying, other = (1, -1) if self.outfit.bag_side > 0 else (-1, 1)
        _gesture(pose, "carries" if self.outfit.bag == "hand" else "none", carrying)
        _gesture(pose, gesture, other)
        return skeleton(self.proportions, pose)

    def walk(self, phase: float, pace: float, gesture: str) -> Capsules:
        return self.dressed(self.joints(phase, pace, gesture))

    def dressed(self, joints: Skeleton) -> Capsules:
        return joints.attach(self.outfit.dress(body(self.proportions)))


@lru_cache(maxsize=256)
def person(seed: int, number: int) -> Person:
    return Person.draw(_random(seed, _PERSON, number))


@lru_cache(maxsize=64)
def camera(seed: int, number: int, gap: float) -> Camera:
    return Camera.draw((seed, _CAMERA, number), gap)


def photograph(
    seed: int,
    who: int | None,
    where: int,
    shot: int,
    *,
    height: int,
    width: int,
    occlusion: float = 0.15,
    gap: float = 0.5,
    astray: float = 0.0,
    view: int | None = None,
    turn: int = 0,
) -> np.ndarray:
    """(height, width, 3) uint8: the picture `shot` of the person `who` (None: of nobody) in a camera.

    Args:
        occlusion: how often something hides a part of the person.
        gap: between cameras; see `Camera.draw`.
        astray: how far the detector has missed the person, in heights of the picture.
        view: the person is turned by this many times 45 degrees; default: drawn as the camera has it.
        turn: and then by this many times 45 degrees to their left, which changes nothing else.
    """
    seen = camera(seed, where, gap)
    moment = _moment(seed, who, where, shot, seen, view, turn)
    rng = moment.rng
    picture = seen.backdrop(height, width, moment.at)
    if who is not None:
        someone = person(seed, who)
        passing = _passing(moment, astray, height, width)
        capsules = someone.walk(*passing.stride, moment.gesture)
        _add(picture, seen, someone, capsules, passing.yaw, passing.missed, rng)
    if rng.random() < occlusion:
        if rng.random() < 0.4:  # someone else passes before
            passer = Person.draw(_random(seed, _PASSER, int(rng.integers(2**31))))
            beside = rng.choice((-1, 1)) * rng.uniform(0.5, 0.75), rng.uniform(-0.12, 0.02)
            capsules = passer.walk(*_stride(rng), "none")
            _add(picture, seen, passer, capsules, rng.uniform(0, 2 * np.pi), beside, rng)
        else:
            seen.occlude(picture, rng)
    if rng.random() < 0.15:
        picture = streaked(picture, 1 + max(1, round(rng.uniform(0.01, 0.03) * height)))
    return seen.expose(picture, rng)


def bare(
    seed: int,
    who: int,
    where: int,
    shot: int,
    *,
    height: int,
    width: int,
    gap: float = 0.5,
    astray: float = 0.0,
    turn: int = 0,
) -> tuple[Capsules, Window]:
    """The body that `photograph` dresses and draws, as the camera sees it, and the window of the picture."""
    seen = camera(seed, where, gap)
    moment = _moment(seed, who, where, shot, seen, None, turn)
    someone = person(seed, who)
    passing = _passing(moment, astray, height, width)
    joints = someone.joints(*passing.stride, moment.gesture)
    dressed = someone.dressed(joints).turned(passing.yaw, seen.pitch)
    window = _window(dressed, passing.missed, moment.rng)
    return joints.attach(body(someone.proportions)).turned(passing.yaw, seen.pitch), window


def visits(seed: int, who: int, cameras: int) -> list[int]:
    """The cameras in which a person appears: two at least, where there are two."""
    rng = _random(seed, _VISITS, who)
    many = int(rng.integers(min(2, cameras), cameras + 1))
    return sorted(int(where) for where in rng.permutation(cameras)[:many])


class _Moment(NamedTuple):
    """What is known of a shot before anybody is drawn."""

    rng: np.random.Generator  # for all that follows
    at: np.ndarray  # where in the place
    yaw: float
    gesture: str


def _moment(
    seed: int, who: int | None, where: int, shot: int, seen: Camera, view: int | None, turn: int
) -> _Moment:
    key = (0 if who is None else who + 1, where)
    track = _random(seed, _PASS, *key, shot // PER_PASS)  # what the images of a pass share
    rng = _random(seed, _SHOT, *key, shot)
    turns = int(track.choice(8, p=seen.views))
    yaw = np.pi / 4 * ((turns if view is None else view) + turn) + track.normal(0, 0.18)
    gesture = str(track.choice(list(_GESTURES)[:4], p=(0.7, 0.1, 0.1, 0.1)))
    at = track.random(2) + rng.uniform(-1, 1, 2) * (0.15, 0.04)  # people walk on
    return _Moment(rng, at, yaw, gesture)


class _Passing(NamedTuple):
    """How the person comes by."""

    stride: tuple[float, float]
    missed: tuple[float, float]
    yaw: float


def _passing(moment: _Moment, astray: float, height: int, width: int) -> _Passing:
    rng = moment.rng
    stride = _stride(rng)
    missed = astray * height / width * float(rng.choice((-1, 1))), astray * rng.normal(0, 0.5)
    return _Passing(stride, missed, moment.yaw + rng.normal(0, 0.12))


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _stride(rng: np.random.Generator) -> tuple[float, float]:
    """Phase and pace."""
    return rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.1)


def _gesture(pose: np.ndarray, gesture: str, sign: int) -> None:
    """A gesture with the left arm (1) or the right (-1)."""
    if angles := _GESTURES[gesture]:
        side = "left" if sign > 0 else "right"
        for joint, (about_x, about_y, about_z) in zip(("shoulder", "elbow"), angles, strict=True):
            pose[JOINTS[f"{side} {joint}"]] = about_x, sign * about_y, sign * about_z


def _add(
    picture: np.ndarray,
    seen: Camera,
    who: Person,
    capsules: Capsules,
    yaw: float,
    missed: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Draws a person into a picture as a detector cuts it out; see `_window`."""
    height, width = picture.shape[:2]
    capsules = capsules.turned(yaw, seen.pitch)
    window = _window(capsules, missed, rng)
    _shadow(picture, capsules, window)

    surface = render(capsules, _FINER * height, _FINER * width, window=window)
    colour = who.outfit.paint(surface) * lit(surface.normals, seen.light, seen.ambient)[:, None]
    fine = surface.picture(np.concatenate([colour, np.ones_like(colour[:, :1])], axis=1))
    parts = [fine[i::_FINER, j::_FINER] for i in range(_FINER) for j in range(_FINER)]
    layer = np.add.reduce(parts) / np.float32(_FINER**2)
    picture *= 1 - layer[..., 3:]
    picture += layer[..., :3]


def _window(capsules: Capsules, missed: tuple[float, float], rng: np.random.Generator) -> Window:
    """What a detector cuts out, which may have missed by some widths and heights."""
    left, bottom, right, top = capsules.box()
    tall = (top - bottom) * np.clip(rng.normal(1.07, 0.035), 0.97, 1.2)
    wide = np.clip(1.15 * (right - left), 0.42 * tall, 0.56 * tall)
    x = (left + right) / 2 + wide * (rng.normal(0, 0.045) - missed[0])
    y = (bottom + top) / 2 + tall * (rng.normal(0, 0.02) - missed[1])
    return (x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2)


def _shadow(picture: np.ndarray, capsules: Capsules, window: Window) -> None:
    """Soft and dark, below the feet."""
    height, width = picture.shape[:2]
    left, bottom, right, top = window
    first, feet, last, _ = capsules.box()
    x = left + (right - left) / width * (np.arange(width) + 0.5) - (first + last) / 2
    y = top - (top - bottom) / height * (np.arange(height) + 0.5) - feet - 0.06
    dark = 0.45 * np.exp(-((x / 0.38) ** 2) - (y[:, None] / 0.10) ** 2)
    picture *= (1 - dark[..., None]).astype(np.float32)
