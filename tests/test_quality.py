"""SSIM against its formula pixel by pixel, and FID as torchmetrics has it."""

import sys
import types

import numpy as np
import pytest
import torch

from pyreid.quality import fid, ssim


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_the_formula(a, b):
    """(H, W): of one channel, every window by itself."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    a, b = (np.pad(x, 5, mode="reflect") for x in (a, b))
    result = np.empty((a.shape[0] - 10, a.shape[1] - 10))
    for i, j in np.ndindex(result.shape):
        x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
        both = (window * (x - mean_x) * (y - mean_y)).sum()
        result[i, j] = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
        result[i, j] /= (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    return result


def test_ssim_is_its_formula():
    a, b = pictures(2, 3, 12, 7, seed=1), pictures(2, 3, 12, 7, seed=2)
    b = 0.6 * a + 0.4 * b
    expected = np.stack(
        [
            np.mean([by_the_formula(x, y) for x, y in zip(*pair, strict=True)], axis=0)
            for pair in zip(a.numpy(), b.numpy(), strict=True)
        ]
    )
    np.testing.assert_allclose(ssim(a, b), expected.mean((1, 2)), rtol=1e-9)
    mask = pictures(2, 12, 7, seed=3) > 0.5
    inside = [one[where].mean() for one, where in zip(expected, mask.numpy(), strict=True)]
    np.testing.assert_allclose(ssim(a, b, mask), inside, rtol=1e-9)
    assert ssim(a, b, torch.zeros_like(mask)).isnan().all()


def test_ssim_of_the_same_is_one_and_of_others_less():
    a = pictures(3, 3, 16, 8)
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))
    blurred = a.mean((2, 3), keepdim=True).expand_as(a)
    assert (ssim(blurred, a) < 0.5).all()
    torch.testing.assert_close(ssim(blurred, a), ssim(a, blurred))
    with pytest.raises(ValueError, match=r"at least 6 x 6, got \(3, 3, 16, 5\)"):
        ssim(a[..., :5], a[..., :5])


def test_fid_is_torchmetrics(monkeypatch):
    """Of a stand-in for it, which knows what it is given."""
    given = []

    class FrechetInceptionDistance:
        def __init__(self, feature):
            self.feature = feature

        def update(self, images, real):
            given.append((images.dtype, int(images.max()), real, self.feature(images).shape))

        def compute(self):
            return torch.tensor(2.5)

    name = "torchmetrics.image.fid"
    module = types.ModuleType(name)
    module.FrechetInceptionDistance = FrechetInceptionDistance
    for parent in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    network = torch.nn.Flatten()
    batches = [torch.full((2, 3, 8, 8), 2.0), pictures(1, 3, 8, 8)]
    assert fid(batches, batches[:1], network) == 2.5
    assert [each[0] for each in given] == [torch.uint8] * 3
    assert [each[2] for each in given] == [True, True, False]
    assert given[0][1] == 255
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        fid(batches, batches, network)
