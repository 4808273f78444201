"""How good generated pictures are: SSIM to the true one where it is known, FID where it is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import conv2d, pad

_REACH, _SIGMA = 5, 1.5  # of the window, in pixels
_STEADY = (0.01**2, 0.03**2)  # of the quotients, for pictures in [0, 1]


def ssim(
    pictures: torch.Tensor, truth: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) the structural similarity of pictures to what they should be (Wang et al., 2004): the mean over
    pixels and channels of what windows of 11 x 11, a Gaussian of 1.5 pixels, have in common. 1 is the same.

    Args:
        pictures, truth: (B, 3, H, W) in [0, 1], at least 6 x 6; beyond their edges they are mirrored.
        mask: (B, H, W) bool, the pixels whose mean it is, such as a silhouette's; default: all. NaN where it
            is empty.
    """
    if pictures.shape != truth.shape or pictures.dim() != 4 or min(pictures.shape[2:]) <= _REACH:
        raise ValueError(
            "ssim: pictures and truth must both have shape (B, 3, H, W), at least 6 x 6, got "
            f"{tuple(pictures.shape)} and {tuple(truth.shape)}"
        )
    a, b = pictures.double(), truth.double()
    mean_a, mean_b, square_a, square_b, product = (
        _smoothed(each) for each in (a, b, a * a, b * b, a * b)
    )
    variance = (square_a - mean_a**2).clamp(min=0) + (square_b - mean_b**2).clamp(min=0)
    covariance = product - mean_a * mean_b
    first, second = _STEADY
    alike = (2 * mean_a * mean_b + first) * (2 * covariance + second)
    alike = alike / ((mean_a**2 + mean_b**2 + first) * (variance + second))
    by_pixel = alike.mean(dim=1).flatten(1)
    if mask is None:
        return by_pixel.mean(dim=1)
    inside = mask.to(by_pixel).flatten(1)
    return (by_pixel * inside).sum(dim=1) / inside.sum(dim=1)


def fid(
    real: Iterable[torch.Tensor],
    generated: Iterable[torch.Tensor],
    network: torch.nn.Module | int = 2048,
) -> float:
    """The Fréchet distance between the features of photos and of generated pictures (Heusel et al., 2017), by
    torchmetrics. It means something for thousands of each, and between runs with the same network.

    Args:
        real, generated: batches (B, 3, H, W) in [0, 1].
        network: of the features, (B, 3, H, W) uint8 -> (B, D): one of your own, such as an encoder that
            normalises by itself; or a width of the Inception network that torchmetrics downloads.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise ImportError("fid: takes torchmetrics: pip install torchmetrics") from None
    metric: Any = FrechetInceptionDistance(feature=network)
    for batches, are_real in ((real, True), (generated, False)):
        for batch in _bytes(batches):
            metric.update(batch, real=are_real)
    return float(metric.compute())


def _bytes(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for batch in batches:
        yield (batch.clamp(0, 1) * 255).round().to(torch.uint8)


def _smoothed(pictures: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W): each pixel the Gaussian mean around it."""
    place = torch.arange(-_REACH, _REACH + 1, device=pictures.device, dtype=pictures.dtype)
    taps = torch.exp(-0.5 * (place / _SIGMA) ** 2)
    taps = taps / taps.sum()
    wide = pad(pictures, (_REACH,) * 4, mode="reflect").flatten(0, 1)[:, None]
    across = conv2d(wide, taps.view(1, 1, 1, -1))
    return conv2d(across, taps.view(1, 1, -1, 1)).view_as(pictures)
