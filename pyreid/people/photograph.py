"""One picture of one person in one camera, a function of the seed and of three numbers alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pyreid.people.body import JOINTS, Proportions, body, skeleton, walking
from pyreid.people.render import lit, render
from pyreid.people.scene import Camera, streaked
from pyreid.people.wardrobe import Outfit

_PERSON, _CAMERA, _PASS, _SHOT, _PASSER = range(5)  # what random numbers are for
_PER_PASS = 4  # images of a person who crosses a camera's view once
_FINER = 2  # pixels of the renderer to one of the picture, along each axis


@dataclass(frozen=True)
class Person:
    proportions: Proportions
    outfit: Outfit
    stride: float
    swing: float
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


@lru_cache(maxsize=256)
def person(seed: int, number: int) -> Person:
    return Person.draw(_random(seed, _PERSON, number))


@lru_cache(maxsize=64)
def camera(seed: int, number: int) -> Camera:
    return Camera.draw(np.random.SeedSequence((seed, _CAMERA, number)))


def photograph(
    seed: int,
    who: int | None,
    where: int,
    shot: int,
    *,
    height: int,
    width: int,
    occlusion: float = 0.15,
    astray: float = 0.0,
    view: int | None = None,
) -> np.ndarray:
    """(height, width, 3) uint8: the picture `shot` of the person `who` (None: of nobody) in a camera.

    Args:
        occlusion: how often something hides a part of the person.
        astray: how far the detector has missed the person, in heights of the picture.
        view: the person is turned by this many times 45 degrees; default: drawn as the camera has it.
    """
    seen = camera(seed, where)
    key = (0 if who is None else who + 1, where)
    track = _random(seed, _PASS, *key, shot // _PER_PASS)
    rng = _random(seed, _SHOT, *key, shot)
    drawn = int(track.choice(8, p=seen.views))
    yaw = np.pi / 4 * (drawn if view is None else view) + track.normal(0, 0.18)
    pose = _pose(track)

    picture = seen.backdrop(height, width, rng)
    hidden = rng.random() < occlusion
    crowded = hidden and rng.random() < 0.4
    if who is not None:
        away = astray * np.array([rng.choice((-1, 1)), rng.normal(0, 0.5)]) if astray else (0, 0)
        _show(picture, seen, person(seed, who), yaw + rng.normal(0, 0.12), pose, away, rng)
    if crowded:  # someone else passes before
        passer = Person.draw(_random(seed, _PASSER, int(rng.integers(2**31))))
        away = rng.choice((-1, 1)) * rng.uniform(0.22, 0.34), rng.uniform(-0.12, 0.02)
        _show(picture, seen, passer, rng.uniform(0, 2 * np.pi), pose, away, rng)
    elif hidden:
        seen.occlude(picture, rng)
    if rng.random() < 0.15:
        picture = streaked(picture, 1 + max(1, round(rng.uniform(0.01, 0.03) * height)))
    return seen.expose(picture, rng)


def visits(seed: int, who: int, cameras: int) -> list[int]:
    """The cameras in which a person appears: two at least, where there are two."""
    rng = _random(seed, _PERSON, who, 1)
    many = int(rng.integers(min(2, cameras), cameras + 1))
    return sorted(int(where) for where in rng.permutation(cameras)[:many])


def _random(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _pose(rng: np.random.Generator) -> dict:
    """What arms do while a person passes: nothing much, a telephone, a hand in a pocket."""
    habit = rng.random()
    side = str(rng.choice(("left", "right")))
    if habit < 0.1:
        return {f"{side} shoulder": (-0.5, 0, 0), f"{side} elbow": (-2.3, 0, 0)}
    if habit < 0.2:
        return {f"{side} shoulder": (-0.35, 0, 0), f"{side} elbow": (-1.5, 0, 0)}
    if habit < 0.3:
        sign = 1 if side == "left" else -1
        return {f"{side} shoulder": (0.25, 0, 0.25 * sign), f"{side} elbow": (-0.7, 0, 0)}
    return {}


def _show(picture, seen: Camera, who: Person, yaw: float, arms: dict, away, rng) -> None:
    """Draws a person into the picture, where a detector would have cut it out."""
    height, width = picture.shape[:2]
    phase, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.1)
    pose = walking(phase, pace * who.stride, swing=who.swing, stoop=who.stoop)
    for joint, angles in arms.items():
        pose[JOINTS[joint]] = angles
    pieces = who.outfit.dress(body(who.proportions))
    capsules = skeleton(who.proportions, pose).attach(pieces).turned(yaw, seen.pitch)

    left, bottom, right, top = capsules.box()
    tall = (top - bottom) * np.clip(rng.normal(1.07, 0.035), 0.97, 1.2)
    wide = np.clip(1.15 * (right - left), 0.42 * tall, 0.56 * tall)
    x = (left + right) / 2 + wide * (rng.normal(0, 0.045) - away[0] * height / width)
    y = (bottom + top) / 2 + tall * (rng.normal(0, 0.02) - away[1])
    window = (x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2)
    _shadow(picture, capsules, window)

    surface = render(capsules, _FINER * height, _FINER * width, window=window)
    colour = who.outfit.paint(surface) * lit(surface.normals, seen.light, seen.ambient)[:, None]
    layer = surface.picture(np.concatenate([colour, np.ones_like(colour[:, :1])], axis=1))
    layer = sum(layer[i::_FINER, j::_FINER] for i in range(_FINER) for j in range(_FINER))
    layer /= _FINER**2
    picture *= 1 - layer[..., 3:]
    picture += layer[..., :3]


def _shadow(picture: np.ndarray, capsules, window) -> None:
    """Soft and dark, below the feet."""
    height, width = picture.shape[:2]
    left, bottom, right, top = window
    foot, _, other, _ = capsules.box()
    low = capsules.box()[1]
    x = (left + (right - left) * (np.arange(width) + 0.5) / width - (foot + other) / 2) / 0.38
    y = (top - (top - bottom) * (np.arange(height) + 0.5) / height - low - 0.06) / 0.10
    dark = 0.45 * np.exp(-(x[None, :] ** 2) - y[:, None] ** 2)
    picture *= (1 - dark[..., None]).astype(np.float32)
