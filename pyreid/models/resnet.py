"""Residual networks up to the last feature map: ResNet (He et al.) and IBN-Net (Pan et al.).

Parameters have torchvision's names, and IBN-Net's where it adds layers, so published weights load by name.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn


class Shape(NamedTuple):
    """What tells one residual network from another."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)


SHAPES = {
    "resnet18": Shape((2, 2, 2, 2), bottleneck=False),
    "resnet34": Shape((3, 4, 6, 3), bottleneck=False),
    "resnet50": Shape((3, 4, 6, 3), bottleneck=True),
    "resnet101": Shape((3, 4, 23, 3), bottleneck=True),
    # For 64x32 images on a CPU. With a finer stem (3x3, not pooled) it learned worse, at twice the cost.
    "small": Shape((1, 1, 1, 1), bottleneck=False, widths=(32, 64, 128, 256)),
}


def parse_name(name: str) -> tuple[Shape, str] | None:
    """resnet50_ibn_a: (its shape, "a"); the second is "" without instance norm. None: no such network."""
    found = re.fullmatch(r"(\w+?)(?:_ibn_([ab]))?", name)
    if found is None or found[1] not in SHAPES:
        return None
    return SHAPES[found[1]], found[2] or ""


class SplitNorm(nn.Module):
    """IBN-a's layer: instance norm for the first half of the channels, batch norm for the others."""

    def __init__(self, channels: int):
        super().__init__()
        self.split = [channels // 2, channels - channels // 2]
        self.IN = nn.InstanceNorm2d(self.split[0], affine=True)
        self.BN = nn.BatchNorm2d(self.split[1])

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        instance, batch = maps.split(self.split, dim=1)
        return torch.cat([self.IN(instance), self.BN(batch)], dim=1)


class Block(nn.Module):
    """A residual block, of two 3x3 convolutions or (bottleneck) 1x1, 3x3 and 1x1."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool, ibn: str):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        first_norm = SplitNorm if ibn == "a" else nn.BatchNorm2d
        if bottleneck:
            self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn1 = first_norm(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
            self.bn1 = first_norm(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
        self.bottleneck = bottleneck
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.IN = nn.InstanceNorm2d(outputs, affine=True) if ibn == "b" else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = self.relu(self.bn1(self.conv1(maps)))
        maps = self.bn2(self.conv2(maps))
        if self.bottleneck:
            maps = self.bn3(self.conv3(self.relu(maps)))
        maps += shortcut
        return self.relu(maps if self.IN is None else self.IN(maps))


class ResNet(nn.Module):
    """(B, 3, H, W) images -> (B, `channels`, H / 16, W / 16) map of the last stage; a `last_stride` of 2
    halves it once more, as for classification.

    `ibn`: "a" has a SplitNorm first in every block of layer1 to layer3; "b" has instance norm in the stem
    and after the last sum of layer1 and of layer2; "" has neither.
    """

    def __init__(self, shape: Shape, *, ibn: str = "", last_stride: int = 1):
        super().__init__()
        first = shape.widths[0]
        self.conv1 = nn.Conv2d(3, first, 7, 2, padding=3, bias=False)
        self.bn1: nn.Module
        self.bn1 = nn.InstanceNorm2d(first, affine=True) if ibn == "b" else nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.channels = first

        def layer(number: int, stride: int) -> nn.Sequential:
            blocks = []
            count, width = shape.blocks[number - 1], shape.widths[number - 1]
            for place in range(count):
                here = (ibn == "a" and number < 4) or (
                    ibn == "b" and number < 3 and place == count - 1
                )
                blocks.append(
                    Block(
                        self.channels,
                        width,
                        stride if place == 0 else 1,
                        bottleneck=shape.bottleneck,
                        ibn=ibn if here else "",
                    )
                )
                self.channels = 4 * width if shape.bottleneck else width
            return nn.Sequential(*blocks)

        self.layer1 = layer(1, 1)
        self.layer2 = layer(2, 2)
        self.layer3 = layer(3, 2)
        self.layer4 = layer(4, last_stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(maps))))
