"""The views of an image that the methods train on, with the parameters of the released code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from pyreid.data.meshes import ANGLES, MeshedImage

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, by channel
STD = (0.229, 0.224, 0.225)

_MEAN = np.array(MEAN, np.float32).reshape(3, 1, 1)
_STD = np.array(STD, np.float32).reshape(3, 1, 1)


@dataclass(frozen=True)
class View:
    """PIL image -> (3, height, width) float32, normalised by ImageNet's mean and standard deviation.

    In order: resized (bicubic); shifted by up to `pad` pixels, what comes in from outside is black; mirrored
    with probability `flip`; blurred with probability `blur`, by a Gaussian of 0.1 to 2 pixels; normalised; a
    rectangle of up to `erased` of the view filled with probability `erase`.

    Lengths in pixels are those at 256 x 128, and change in proportion with the size of the view. Randomness
    comes from torch's global generator alone.
    """

    height: int
    width: int
    pad: float = 0
    flip: float = 0
    blur: float = 0
    erase: float = 0
    erased: float = 0.4

    def __call__(self, image: Image.Image) -> torch.Tensor:
        image = self.resized(image)
        random = self.pad or self.flip or self.blur or self.erase
        down, right, flip, blur, sigma, erase = torch.rand(6).tolist() if random else [1.0] * 6
        if self.pad:
            image = self._shifted(image, down, right)
        if flip < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if blur < self.blur:
            radius = (0.1 + 1.9 * sigma) * self.height / 256
            image = image.filter(ImageFilter.GaussianBlur(radius))
        # NumPy's loops: on so few numbers, torch's team of threads costs more than it saves.
        view = np.empty((3, self.height, self.width), np.float32)
        view[:] = np.asarray(image).transpose(2, 0, 1)
        view /= 255
        view -= _MEAN
        view /= _STD
        if erase < self.erase:
            _erase(view, self.erased)
        return torch.from_numpy(view)

    def resized(self, image: Image.Image) -> Image.Image:
        """The image in RGB and at the view's size: what may be shared by views of one size."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.size == (self.width, self.height):
            return image
        return image.resize((self.width, self.height), Image.Resampling.BICUBIC)

    def _shifted(self, image: Image.Image, down: float, right: float) -> Image.Image:
        high, wide = round(self.pad * self.height / 256), round(self.pad * self.width / 128)
        top = int(down * (2 * high + 1)) - high
        left = int(right * (2 * wide + 1)) - wide
        return image.crop((left, top, left + self.width, top + self.height))


@dataclass(frozen=True)
class MeshView:
    """MeshedImage -> (1, height, width) float32 in [-1, 1]: one of its body pictures, resized (bicubic). The
    background is 1.

    Args:
        turns: which of them, by k of `ANGLES[k]` degrees; of several, one by torch's global generator.
    """

    height: int
    width: int
    turns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.turns or not set(self.turns) <= set(range(len(ANGLES))):
            raise ValueError(f"MeshView: turns must be some of 0 to 7, got {self.turns}")

    def __call__(self, image: MeshedImage) -> torch.Tensor:
        several = len(self.turns) > 1
        turn = self.turns[int(torch.randint(len(self.turns), ())) if several else 0]
        picture = image.turned(turn)
        if picture.size != (self.width, self.height):
            picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        view = np.asarray(picture, np.float32)[None] / np.float32(127.5) - 1
        return torch.from_numpy(view)


_VIEWS: dict[str, dict[str, float]] = {
    "strong": {"pad": 10, "flip": 0.5, "blur": 0.5, "erase": 0.6},
    "standard": {"pad": 10, "flip": 0.5, "erase": 0.5},
    "erased": {"flip": 0.5, "erase": 0.5, "erased": 0.2},
    "mirrored": {"flip": 0.5},
    "weak": {},
    "plain": {},
}


_MESH_VIEWS = {
    "mesh": (0,),
    "turned mesh": tuple(range(1, 8)),
    "turned mesh to 270": tuple(range(1, 7)),
}


def make(name: str, height: int, width: int) -> View | MeshView:
    """The view that is called `name`: "strong" and "weak" (ICE), "standard" (SpCL, Cluster Contrast),
    "erased" (JVTC), "mirrored" (SCL) or "plain" (what is evaluated: resized and normalised, as "weak" is);
    and of MeshedImages, "mesh" (as in the photo), "turned mesh" (by 45 to 315 degrees) or "turned mesh to
    270" (as GCL's released code draws it)."""
    if name not in _VIEWS and name not in _MESH_VIEWS:
        known = ", ".join([*_VIEWS, *_MESH_VIEWS])
        raise ValueError(f"make: name must be one of {known}, got {name!r}")
    if height < 1 or width < 1:
        raise ValueError(f"make: height and width must be positive, got {height} and {width}")
    if name in _MESH_VIEWS:
        return MeshView(height, width, _MESH_VIEWS[name])
    return View(height, width, **_VIEWS[name])


def pixels(images: torch.Tensor) -> np.ndarray:
    """(..., H, W, 3) uint8 of normalised (..., 3, H, W) images: what `View` has made is undone."""
    coloured = images.detach().float().cpu().numpy() * _STD + _MEAN
    rounded = (255 * coloured).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(rounded, -3, -1))


def _erase(view: np.ndarray, most: float) -> None:
    """Fills a rectangle of 2 % to `most` of the view, its height 0.3 to 3.33 times its width, with ImageNet's
    mean: the numbers themselves, in a view that is already normalised, as in the released code."""
    height, width = view.shape[1:]
    for _ in range(100):
        share, aspect, down, right = torch.rand(4).tolist()
        area = (0.02 + (most - 0.02) * share) * height * width
        aspect = 0.3 + (1 / 0.3 - 0.3) * aspect
        high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if high < height and wide < width:
            top = int(down * (height - high + 1))
            left = int(right * (width - wide + 1))
            view[:, top : top + high, left : left + wide] = _MEAN
            return
