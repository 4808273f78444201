"""What people wear and carry: outfits drawn from few colours, the shapes they add to a body, and their paint.

Colours are those of a street, most of them dark, so that many people share a coat or trousers with others
and only the whole outfit tells who it is. Bags, logos and prints have a side: the viewpoint matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyreid.people.body import Part, Piece, Point
from pyreid.people.render import Surface

COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.09, 0.09, 0.10),
    "charcoal": (0.24, 0.24, 0.26),
    "grey": (0.50, 0.50, 0.51),
    "silver": (0.74, 0.75, 0.76),
    "white": (0.92, 0.92, 0.90),
    "navy": (0.12, 0.16, 0.33),
    "blue": (0.17, 0.34, 0.68),
    "sky": (0.52, 0.70, 0.88),
    "denim": (0.28, 0.37, 0.52),
    "teal": (0.10, 0.45, 0.46),
    "green": (0.15, 0.42, 0.21),
    "lime": (0.62, 0.78, 0.22),
    "olive": (0.36, 0.37, 0.20),
    "khaki": (0.62, 0.56, 0.40),
    "beige": (0.80, 0.73, 0.60),
    "brown": (0.36, 0.24, 0.16),
    "orange": (0.88, 0.45, 0.13),
    "yellow": (0.93, 0.79, 0.23),
    "red": (0.77, 0.13, 0.15),
    "burgundy": (0.42, 0.09, 0.16),
    "pink": (0.90, 0.58, 0.66),
    "purple": (0.41, 0.23, 0.52),
}
# How often each is worn.
_TOPS = dict(
    zip(COLOURS, (14, 7, 7, 4, 12, 8, 6, 5, 3, 3, 4, 2, 3, 2, 4, 3, 3, 4, 7, 3, 5, 3), strict=True)
)
_BOTTOMS = {"black": 26, "charcoal": 10, "grey": 7, "navy": 14, "denim": 17, "sky": 4, "khaki": 6}
_BOTTOMS |= {"beige": 5, "white": 5, "brown": 4, "olive": 3, "red": 2, "burgundy": 2, "pink": 2}
_SHOES = {"black": 12, "white": 9, "brown": 5, "grey": 4, "red": 2, "blue": 2, "lime": 1}
_BAGS = {"black": 10, "brown": 5, "red": 3, "blue": 3, "grey": 3, "beige": 3, "pink": 2, "green": 2}
_BAGS |= {"orange": 2, "purple": 1, "white": 2}
_HAIR = {  # colours of their own, and how often
    (0.08, 0.07, 0.07): 11,
    (0.20, 0.13, 0.09): 8,
    (0.36, 0.23, 0.13): 5,
    (0.70, 0.54, 0.31): 3,
    (0.62, 0.61, 0.60): 2,
    (0.48, 0.20, 0.10): 1,
}
_SKIN = {
    (0.93, 0.77, 0.66): 5,
    (0.86, 0.66, 0.52): 6,
    (0.72, 0.51, 0.37): 3,
    (0.50, 0.33, 0.23): 2,
    (0.33, 0.22, 0.16): 2,
}

_ARMS = (Part.LEFT_UPPER_ARM, Part.RIGHT_UPPER_ARM)
_FOREARMS = (Part.LEFT_FOREARM, Part.RIGHT_FOREARM)
_THIGHS = (Part.LEFT_THIGH, Part.RIGHT_THIGH)
_SHINS = (Part.LEFT_SHIN, Part.RIGHT_SHIN)


def _table(*entries: tuple[Sequence[Part], Any], dtype: Any) -> np.ndarray:
    """(parts,): values by part, 0 where none is given."""
    table = np.zeros(len(Part), dtype=dtype)
    for parts, value in entries:
        table[list(parts)] = value
    return table


# Height of a joint above the waist when standing: where a texture is on a garment, not on a limb.
_LEVELS = _table(
    ((Part.HIPS,), -0.09),
    (_ARMS, 0.172),
    ((*_THIGHS, Part.HEM), -0.10),
    (_SHINS, -0.34),
    dtype=np.float32,
)
# To which side the outer seam of a leg is.
_OUTWARDS = _table(
    ((Part.LEFT_THIGH, Part.LEFT_SHIN), 1),
    ((Part.RIGHT_THIGH, Part.RIGHT_SHIN), -1),
    dtype=np.float32,
)


@dataclass(frozen=True)
class Cloth:
    """Two colours and how they are laid out; `scale` is that of stripes."""

    pattern: str
    first: np.ndarray  # (3,)
    second: np.ndarray  # (3,)
    scale: float = 12.0

    def colour(self, x: np.ndarray, level: np.ndarray, z: np.ndarray, torso: np.ndarray) -> Any:
        """(V,) coordinates on the garment -> (V, 3)."""
        other = _PATTERNS[self.pattern](x, level, z, self.scale)
        if self.pattern in _PRINTS:
            other = other & torso
        return np.stack([self.first, self.second]).astype(np.float32)[other.astype(np.intp)]


def _bars(values: np.ndarray, scale: float) -> np.ndarray:
    return (values * np.float32(scale)) % 1 < 0.5


_PATTERNS: dict[str, Any] = {
    "plain": lambda x, level, z, scale: np.zeros(len(x), dtype=bool),
    "stripes": lambda x, level, z, scale: _bars(level, scale),
    "pinstripes": lambda x, level, z, scale: _bars(x, scale),
    "checks": lambda x, level, z, scale: _bars(level, scale) ^ _bars(x, scale),
    "block": lambda x, level, z, scale: level > 0.10,
    "band": lambda x, level, z, scale: np.abs(level - 0.10) < 0.028,
    "sides": lambda x, level, z, scale: np.abs(x) > 0.075,
    "seams": lambda x, level, z, scale: np.zeros(len(x), dtype=bool),  # of legs only
    "front": lambda x, level, z, scale: (
        (np.abs(x) < 0.045) & (np.abs(level - 0.12) < 0.04) & (z > 0)
    ),
    "back": lambda x, level, z, scale: (
        (np.abs(x) < 0.055) & (np.abs(level - 0.11) < 0.05) & (z < 0)
    ),
    "badge": lambda x, level, z, scale: (
        (np.abs(x - 0.05) < 0.02) & (np.abs(level - 0.14) < 0.02) & (z > 0)
    ),
}
_PRINTS = ("front", "back", "badge", "sides")
_WORN = {"plain": 40, "stripes": 9, "pinstripes": 3, "checks": 6, "block": 8, "band": 6, "sides": 4}
_WORN |= {"front": 11, "back": 6, "badge": 4}


@dataclass(frozen=True)
class Outfit:
    skin: np.ndarray
    hair: np.ndarray
    hair_style: str  # bald, short, bob, long, ponytail, bun
    headwear: str  # none, cap, beanie, hood
    headwear_colour: np.ndarray
    top: Cloth
    sleeves: str  # long, short
    shirt: Cloth | None  # under an open top
    coat: float  # how far the top hangs over the thighs, of their length
    bulk: float  # thickness of the top, in statures
    bottom: Cloth
    bottom_kind: str  # trousers, shorts, skirt
    wide: float  # thickness of the bottom
    shoes: np.ndarray
    bag: str  # none, backpack, shoulder, hand
    bag_colour: np.ndarray
    bag_side: int  # 1 left, -1 right

    @staticmethod
    def draw(rng: np.random.Generator) -> Outfit:
        def colour(weights: dict) -> np.ndarray:
            key = _chosen(rng, weights)
            return (np.array(COLOURS.get(key, key)) + rng.normal(0, 0.012, 3)).clip(0.03, 0.97)

        def cloth(weights: dict, patterns: dict[str, int]) -> Cloth:
            first, second = colour(weights), colour(_TOPS)
            if np.abs(first - second).max() < 0.25:
                second = np.array(COLOURS["white" if first.mean() < 0.5 else "charcoal"])
            return Cloth(_chosen(rng, patterns), first, second, float(rng.uniform(9, 16)))

        sleeves = _chosen(rng, {"long": 6, "short": 5})
        opened = sleeves == "long" and rng.random() < 0.35
        kind = _chosen(rng, {"trousers": 14, "shorts": 4, "skirt": 3})
        trims = {"plain": 1} if opened else _WORN
        return Outfit(
            skin=colour(_SKIN),
            hair=colour(_HAIR),
            hair_style=_chosen(
                rng, {"short": 9, "bald": 1, "bob": 3, "long": 4, "ponytail": 3, "bun": 1}
            ),
            headwear=_chosen(
                rng, {"none": 14, "cap": 2, "beanie": 1, "hood": 1 if sleeves == "long" else 0}
            ),
            headwear_colour=colour(_TOPS),
            top=cloth(_TOPS, trims),
            sleeves=sleeves,
            shirt=cloth(_TOPS, {"plain": 4, "stripes": 1}) if opened else None,
            coat=float(rng.uniform(0.5, 1.1)) if sleeves == "long" and rng.random() < 0.2 else 0.0,
            bulk=float(
                rng.uniform(0.006, 0.018) if sleeves == "long" else rng.uniform(0.004, 0.010)
            ),
            bottom=cloth(
                _BOTTOMS, {"plain": 10, "seams": 2, "checks": 1 if kind == "skirt" else 0}
            ),
            bottom_kind=kind,
            wide=float(rng.uniform(0.003, 0.016)),
            shoes=colour(_SHOES),
            bag=_chosen(rng, {"none": 9, "backpack": 5, "shoulder": 5, "hand": 3}),
            bag_colour=colour(_BAGS),
            bag_side=int(rng.choice((-1, 1))),
        )

    def dress(self, bare: list[Piece]) -> list[Piece]:
        """The pieces of a body, with clothes over them and what is carried."""
        cover = {Part.TORSO: self.bulk, Part.HIPS: max(self.bulk, self.wide)}
        cover |= dict.fromkeys(_ARMS, self.bulk)
        cover |= dict.fromkeys(_FOREARMS, self.bulk if self.sleeves == "long" else 0.0)
        if self.bottom_kind != "skirt":
            cover |= dict.fromkeys(_THIGHS, self.wide)
        if self.bottom_kind == "trousers":
            cover |= dict.fromkeys(_SHINS, self.wide)
        worn = []
        for piece in bare:
            more = cover.get(piece.part, 0.0)
            first, last = piece.radii
            worn.append(piece._replace(radii=(first + more, last + more)))
        thigh = max(piece.radii[0] for piece in worn if piece.part in _THIGHS)
        return worn + self._head() + self._hem(thigh) + self._carried()

    def _head(self) -> list[Piece]:
        pieces = []

        def add(part: Part, start: Point, end: Point, *radii: float, both=False):
            (x, y, z), (u, v, w), (first, last) = start, end, radii
            for sign in (1, -1) if both else (1,):
                ends = (sign * x, y, z), (sign * u, v, w)
                pieces.append(Piece(part, "head", *ends, (first, last)))

        style = self.hair_style
        if style != "bald":
            add(Part.HAIR, (0, 0.094, -0.010), (0, 0.084, -0.013), 0.0555, 0.054)
        if style in ("bob", "long"):
            add(Part.HAIR, (0.038, 0.09, -0.014), (0.041, 0.03, -0.012), 0.022, 0.018, both=True)
            add(Part.HAIR, (0, 0.08, -0.025), (0, 0.025, -0.026), 0.048, 0.042)
        if style == "long":
            add(Part.HAIR, (0.022, 0.06, -0.03), (0.024, -0.085, -0.058), 0.036, 0.026, both=True)
        if style == "ponytail":
            add(Part.HAIR, (0, 0.095, -0.066), (0, 0.0, -0.082), 0.021, 0.013)
        if style == "bun":
            add(Part.HAIR, (0, 0.128, -0.045), (0, 0.134, -0.05), 0.026, 0.026)
        if self.headwear in ("cap", "beanie"):
            add(Part.HAT, (0, 0.103, -0.006), (0, 0.097, -0.008), 0.0575, 0.0575)
        if self.headwear == "cap":
            for y, z, radius in ((0.100, 0.056, 0.012), (0.096, 0.074, 0.010)):
                add(Part.HAT, (-0.02, y, z), (0.02, y, z), radius, radius)
        if self.headwear == "hood":
            add(Part.HAT, (0, 0.086, -0.022), (0, 0.012, -0.022), 0.066, 0.060)
        return pieces

    def _hem(self, thigh: float) -> list[Piece]:
        """Skirts and coats: they hang from the hips, wider than the `thigh`, and swing with it."""
        length = 0.24 * max(self.coat, 0.9 if self.bottom_kind == "skirt" else 0.0)
        if not length:
            return []
        wide = max(0.072, thigh + 0.006)
        pieces = []
        for side, sign in (("left", 1), ("right", -1)):
            for x, end, shrunk in ((0.0, length, 0.0), (-0.03, 0.92 * length, 0.003)):
                ends = (x * sign, 0.0, 0.0), (x * sign, -end, 0.004)
                pieces.append(Piece(Part.HEM, f"{side} hip", *ends, (wide - shrunk, wide - shrunk)))
        return pieces

    def _carried(self) -> list[Piece]:
        pieces = []

        def add(joint: str, start: Point, end: Point, first: float, last: float | None = None):
            pieces.append(
                Piece(Part.BAG, joint, start, end, (first, first if last is None else last))
            )

        side, sign = ("left", 1) if self.bag_side > 0 else ("right", -1)
        if self.bag == "backpack":
            back = -0.085 - self.bulk
            for x in (-0.045, 0.045):
                add("chest", (x, 0.165, back), (x, 0.01, back - 0.012), 0.042, 0.050)
            add("chest", (-0.035, 0.035, back - 0.05), (0.035, 0.035, back - 0.05), 0.034)
        elif self.bag == "shoulder":
            x = (0.118 + self.bulk) * sign
            for y in (-0.01, -0.055):
                add("pelvis", (x, y, -0.045), (x, y, 0.055), 0.030)
        elif self.bag == "hand":
            for y in (-0.13, -0.175):
                add(f"{side} wrist", (0, y, -0.045), (0, y, 0.06), 0.026, 0.028)
            for z in (-0.03, 0.045):
                add(f"{side} wrist", (0, -0.055, 0.008), (0, -0.12, z), 0.005)
        return pieces

    def paint(self, surface: Surface) -> np.ndarray:
        """(V, 3) float32: the colour of what is seen, before light falls on it."""
        parts = surface.parts
        x, y, z = surface.coordinates.T
        level = y + _LEVELS[parts]

        def of(*group: Part) -> np.ndarray:
            return _table((group, True), dtype=bool)[parts]

        torso, hips, hem, head = of(Part.TORSO), of(Part.HIPS), of(Part.HEM), of(Part.HEAD)
        legs, front = of(*_THIGHS, *_SHINS), z > 0

        base = np.tile(self.skin, (len(Part), 1))
        base[[Part.LEFT_FOOT, Part.RIGHT_FOOT]] = self.shoes
        base[Part.HAIR], base[Part.BAG] = self.hair, self.bag_colour
        base[Part.HAT] = self.top.first if self.headwear == "hood" else self.headwear_colour
        colour = base.astype(np.float32)[parts]

        def wear(cloth: Cloth, where: np.ndarray) -> None:
            at = np.flatnonzero(where)
            colour[at] = cloth.colour(x[at], level[at], z[at], torso[at])

        if self.bottom_kind == "skirt":
            wear(self.bottom, hips | hem)
        else:
            covered = legs & (level > -0.31) if self.bottom_kind == "shorts" else legs
            wear(self.bottom, hips | covered)
            if self.bottom.pattern == "seams":
                outer = covered & (_OUTWARDS[parts] * x > 0.9 * np.hypot(x, z))
                colour[outer] = self.bottom.second
        arms = of(*_ARMS, *_FOREARMS)
        if self.sleeves == "short":
            arms &= level > 0.08
        hanging = (hips | hem) if self.coat else hips & (level > -0.035 - 3 * self.bulk)
        wear(self.top, torso | arms | hanging)
        if self.shirt is not None:
            opening = 0.020 + 0.12 * np.maximum(0.12 - level, 0)
            wear(self.shirt, (torso | hanging) & front & (np.abs(x) < opening))
        colour *= _folds(x, level, z)[:, None]
        if self.headwear != "hood":
            colour[torso & (level > 0.185) & front & (np.abs(x) < 0.03)] = self.skin

        if self.hair_style != "bald":
            colour[head & (y > 0.07 + 0.75 * z)] = self.hair
        face = head & (z > 0.02)
        eyes = face & (np.abs(np.abs(x) - 0.019) < 0.007) & (np.abs(y - 0.072) < 0.005)
        colour[eyes] = self.skin * 0.3
        mouth = face & (np.abs(x) < 0.012) & (np.abs(y - 0.034) < 0.003)
        colour[mouth] = self.skin * (0.75, 0.5, 0.5)

        strap = self.bag_colour * 0.8
        if self.bag == "backpack":
            colour[torso & (np.abs(np.abs(x) - 0.066) < 0.011) & (z > -0.02) & (level > 0.05)] = (
                strap
            )
        elif self.bag == "shoulder":  # from the other shoulder down to the bag
            across = self.bag_side * x * 0.82 + (level - 0.08) * 0.57
            colour[(torso | hips) & (np.abs(across) < 0.011)] = strap
        return colour


def _folds(x: np.ndarray, level: np.ndarray, z: np.ndarray) -> np.ndarray:
    """(V,): how bright the folds of cloth are."""
    waves = np.sin(55 * level + 20 * x) * np.sin(38 * z - 30 * x + 9 * level)
    return 1 + np.float32(0.055) * waves


def _chosen(rng: np.random.Generator, weights: dict) -> Any:
    """A key, as often as its weight says."""
    shares = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
