"""GCL's generator of a person in another pose, and the discriminator it is trained against (Chen et al.).

The generator draws what the appearance code f of a photo tells, in the pose that the grey picture of a body
(a mesh) tells. `width` scales all channels. Released: 16, and 32 for the discriminator, on 256x128 images;
with f of 8192 that makes 380,544 parameters in the structure encoder, 13,000,131 in the decoder and 1,025,571
in the discriminator. On a CPU 4 to 8 will do, at 64x32: H and W need only be multiples of 4, and where a
border is wider than a small picture's map, mirroring goes on from the other side.

Under autocast maps are in its type, but all norms compute in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

BLOCKS = (
    4  # residual blocks of each network; in the decoder each has a slice of the appearance code
)
_SLOPE = 0.2


class StructureEncoder(nn.Module):
    """(B, 1, H, W) pictures of bodies in [-1, 1] -> (B, `channels`, H / 4, W / 4), channels = 8 width.

    Four convolutions, four residual blocks, and what is seen around each place at dilations 3, 6 and 9
    (ASPP); instance norm, without parameters, behind every convolution.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        _at_least_1("StructureEncoder", "width", width)
        self.channels = 8 * width
        self.stem = nn.Sequential(
            _normed(1, width, 3, stride=2),
            _normed(width, 2 * width, 3),
            _normed(2 * width, 2 * width, 3),
            _normed(2 * width, 4 * width, 3, stride=2),
        )
        self.blocks = nn.Sequential(*[ResidualBlock(4 * width, normed=True) for _ in range(BLOCKS)])
        self.around = nn.ModuleList(
            [_normed(4 * width, 2 * width, 1, active=False)]
            + [
                nn.Sequential(
                    _normed(4 * width, 2 * width, 1),
                    _normed(2 * width, 2 * width, 3, dilation=dilation, active=False),
                )
                for dilation in (3, 6, 9)
            ]
        )
        self.fuse = _normed(self.channels, self.channels, 1, active=False)
        _kaiming(self)

    def forward(self, mesh: torch.Tensor) -> torch.Tensor:
        if mesh.dim() != 4 or mesh.shape[1] != 1 or mesh.shape[2] % 4 or mesh.shape[3] % 4:
            raise ValueError(
                "StructureEncoder: mesh must have shape (B, 1, H, W) with H and W multiples of 4, got "
                f"{tuple(mesh.shape)}"
            )
        if mesh.shape[2] * mesh.shape[3] < 32:
            raise ValueError(
                f"StructureEncoder: mesh must be at least 8x4, for its norms, got {tuple(mesh.shape)}"
            )
        maps = self.blocks(self.stem(mesh))
        return self.fuse(torch.cat([branch(maps) for branch in self.around], dim=1))


class Decoder(nn.Module):
    """(s, f) -> (B, 3, H, W) images, in the space of normalised photos and without bounds.

    Four residual blocks in which f sets mean and deviation of each channel (AdaIN), then twice: enlarged to
    double size, convolved, and normed over the whole picture.

    Args:
        appearance_dim: width of f, a multiple of 4: each residual block has a slice of its own.
        width: s has 8 width channels.
        slices: "channel" cuts f, which is flattened channel by channel, into four runs: each tells all four
            bands of a quarter of the channels, as GCL was released. "stripe" gives each block one band of the
            image; f must have four then.
    """

    def __init__(self, appearance_dim: int, width: int = 16, *, slices: str = "channel"):
        super().__init__()
        _at_least_1("Decoder", "width", width)
        if appearance_dim < 1 or appearance_dim % BLOCKS:
            raise ValueError(
                f"Decoder: appearance_dim must be a multiple of {BLOCKS}, got {appearance_dim}"
            )
        if slices not in ("channel", "stripe"):
            raise ValueError(f'Decoder: slices must be "channel" or "stripe", got {slices!r}')
        self.appearance_dim = appearance_dim
        self.slices = slices
        channels = 8 * width
        sizes = (appearance_dim // BLOCKS, 32 * width, 32 * width, 2 * channels)
        self.blocks = nn.ModuleList(AdaptiveBlock(channels) for _ in range(BLOCKS))
        self.weights = nn.ModuleList(_perceptron(sizes) for _ in range(BLOCKS))
        self.biases = nn.ModuleList(_perceptron(sizes) for _ in range(BLOCKS))
        self.enlarge = nn.ModuleList(
            ConvBlock(inputs, inputs // 2, 5, norm=PictureNorm(inputs // 2))
            for inputs in (channels, channels // 2)
        )
        self.paint = nn.Sequential(
            ConvBlock(2 * width, 2 * width, 3),
            ConvBlock(2 * width, 2 * width, 3),
            ConvBlock(2 * width, 3, 1, active=False),
        )
        _kaiming(self)

    def forward(self, structure: torch.Tensor, appearance: torch.Tensor) -> torch.Tensor:
        if appearance.shape != (len(structure), self.appearance_dim):
            raise ValueError(
                f"Decoder: appearance must have shape ({len(structure)}, {self.appearance_dim}), got "
                f"{tuple(appearance.shape)}"
            )
        if self.slices == "channel":
            parts = appearance.unflatten(1, (BLOCKS, -1)).unbind(1)
        else:
            parts = appearance.unflatten(1, (-1, BLOCKS)).unbind(2)
        maps = structure
        for part, block, weight, bias in zip(
            parts, self.blocks, self.weights, self.biases, strict=True
        ):
            maps = block(maps, weight(part), bias(part))
        for convolution in self.enlarge:
            maps = convolution(F.interpolate(maps, scale_factor=2.0))
        return self.paint(maps)


class Generator(nn.Module):
    """(B, 1, H, W) meshes and (B, D) appearance codes -> (B, 3, H, W) images.

    `structure` and `decoder` may be called one by one, where several images have the same pose.
    """

    def __init__(self, appearance_dim: int, width: int = 16, *, slices: str = "channel"):
        super().__init__()
        self.structure = StructureEncoder(width)
        self.decoder = Decoder(appearance_dim, width, slices=slices)

    def forward(self, mesh: torch.Tensor, appearance: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.structure(mesh), appearance)


class Discriminator(nn.Module):
    """(B, 3, H, W) images -> for each scale a (B, 1, h, w) map that is to tell photos (1) from others (0).

    The first scale's map has H / 4 x W / 4 places; every further one sees the picture at half the size of the
    one before, rounded up. Pictures may be of any size, but scales that are left with a few places add
    little: with three, give 64x32 or more.
    """

    def __init__(self, width: int = 32, scales: int = 3):
        super().__init__()
        _at_least_1("Discriminator", "width", width)
        _at_least_1("Discriminator", "scales", scales)
        self.scales = nn.ModuleList(
            nn.Sequential(
                ConvBlock(3, width, 1),
                ConvBlock(width, width, 3),
                ConvBlock(width, width, 3, stride=2),
                ConvBlock(width, width, 3),
                ConvBlock(width, 2 * width, 3, stride=2),
                *[ResidualBlock(2 * width, normed=False) for _ in range(BLOCKS)],
                nn.Conv2d(2 * width, 1, 1),
            )
            for _ in range(scales)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.scales[0](images)]
        for scale in self.scales[1:]:
            images = F.avg_pool2d(images, 3, 2, padding=1, count_include_pad=False)
            maps.append(scale(images))
        return maps


class ConvBlock(nn.Module):
    """A convolution of the mirrored picture, what norms it, and a leaky ReLU unless told otherwise."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm: nn.Module | None = None,
        active: bool = True,
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, dilation=dilation)
        self.border = dilation * (size // 2)
        self.norm = norm
        self.active = active

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = self.conv(mirrored(maps, self.border))
        if self.norm is not None:
            maps = self.norm(maps)
        return F.leaky_relu_(maps, _SLOPE) if self.active else maps


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to what they were given; nothing behind the sum."""

    def __init__(self, channels: int, *, normed: bool):
        super().__init__()
        block = _normed if normed else ConvBlock
        self.first = block(channels, channels, 3)
        self.second = block(channels, channels, 3, active=False)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + self.second(self.first(maps))


class AdaptiveBlock(nn.Module):
    """A residual block whose two norms have weights and biases from elsewhere: (B, 2 C), the first
    convolution's first."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = ConvBlock(channels, channels, 3, active=False)
        self.second = ConvBlock(channels, channels, 3, active=False)

    def forward(self, maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        weights, biases = weight.chunk(2, dim=1), bias.chunk(2, dim=1)
        inner = F.leaky_relu_(instance_norm(self.first(maps), weights[0], biases[0]), _SLOPE)
        return maps + instance_norm(self.second(inner), weights[1], biases[1])


class InstanceNorm(nn.Module):
    """Each picture's channels to mean 0 and variance 1; no parameters, no running statistics."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return instance_norm(maps)


class PictureNorm(nn.Module):
    """Each picture as a whole to mean 0 and (unbiased) deviation 1, then a weight and a bias by channel."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
        std, mean = torch.std_mean(wide, (1, 2, 3), keepdim=True)
        weight = self.weight[:, None, None] / (std + self.eps)
        return torch.addcmul(self.bias[:, None, None], wide - mean, weight)


def instance_norm(
    maps: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(B, C, H, W) maps, each channel of each picture to mean 0 and (biased) variance 1, times weight plus
    bias, (B, C) or neither: AdaIN."""
    wide = torch.promote_types(maps.dtype, torch.float32)
    # Also where they do nothing: of maps in half precision, the statistics would be of the weight's type.
    weight = maps.new_ones(maps.shape[:2], dtype=wide) if weight is None else weight.to(wide)
    bias = torch.zeros_like(weight) if bias is None else bias.to(wide)
    # A batch norm of one picture with B C channels: a third of the time of means and products one by one.
    flat = maps.reshape(1, -1, *maps.shape[2:])
    flat = F.batch_norm(flat, None, None, weight.flatten(), bias.flatten(), training=True, eps=eps)
    return flat.view(maps.shape)


def mirrored(maps: torch.Tensor, border: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, H + 2 border, W + 2 border): mirrored at the outermost pixels, which are not
    repeated, and again at the mirrored ones where the border is wider than the picture.

    On CUDA torch sums its gradient in any order, unless told to use_deterministic_algorithms."""
    if border == 0:
        return maps
    if border < min(maps.shape[2:]):
        return F.pad(maps, (border,) * 4, mode="reflect")
    for dim in (2, 3):
        size = maps.shape[dim]
        place = torch.arange(-border, size + border, device=maps.device)
        place = place.remainder(max(1, 2 * size - 2))
        maps = maps.index_select(dim, torch.minimum(place, (2 * size - 2 - place).abs()))
    return maps


def _normed(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    active: bool = True,
) -> ConvBlock:
    norm = InstanceNorm()
    return ConvBlock(
        inputs, outputs, size, stride=stride, dilation=dilation, norm=norm, active=active
    )


def _perceptron(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(_SLOPE, inplace=True)]
    return nn.Sequential(*layers[:-1])


def _kaiming(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(child.weight)
            assert child.bias is not None
            nn.init.zeros_(child.bias)


def _at_least_1(where: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {value}")
