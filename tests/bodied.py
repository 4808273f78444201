"""Photos with pictures of bodies, and the least encoder that GCL is content with."""

import numpy as np
import torch
from torch import nn

from pyreid import models
from pyreid.data import ImageArrays, MeshArrays, MeshedImages, ReidData

SIZE = (16, 8)


def part_encoder(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 12, 4, 4), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 1)
    )
    return models.build_part_encoder(backbone, embedding=8, size=SIZE)


def data(people=6, images=4):
    """Photos, flat colours with noise, with their body pictures; the same to test with."""
    rng = np.random.default_rng(0)
    ids = np.arange(people).repeat(images)
    colours = rng.integers(0, 255, (people, 4, 1, 3))
    pixels = np.repeat(np.repeat(colours, 4, 1), 8, 2)[ids] + rng.integers(
        -9, 9, (len(ids), *SIZE, 3)
    )
    pixels = pixels.clip(0, 255).astype(np.uint8)
    photos = ImageArrays(pixels, None, ids, np.arange(len(ids)) % 2)
    bodies = rng.integers(0, 255, (len(ids), 8, *SIZE)).astype(np.uint8)
    meshed = MeshedImages(photos, MeshArrays(bodies, photos.names))
    return ReidData(
        "flat", meshed, photos.select(slice(0, None, 2)), photos.select(slice(1, None, 2))
    )
