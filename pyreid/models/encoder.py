"""From images to features: a backbone, pooling, an optional embedding, and the neck."""

from __future__ import annotations

import torch
from torch import nn


class Encoder(nn.Module):
    """(B, 3, H, W) images -> (B, `dim`) features: the output of the neck, not normalised, in both modes.

    Parts, in the order they apply:
        backbone: images -> (B, C, h, w) maps, or (B, C) features where it pools by itself.
        pool: maps -> (B, C), in float32 under autocast; nothing for features.
        embedding: a Linear, or nothing.
        neck: batch norm whose bias stays where it is (zero, or a checkpoint's).
    """

    def __init__(
        self, backbone: nn.Module, channels: int, *, pooling: str = "average", embedding: int = 0
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"Encoder: pooling must be {' or '.join(POOLINGS)}, got {pooling!r}")
        if embedding < 0:
            raise ValueError(f"Encoder: embedding must be 0 (none) or a width, got {embedding}")
        self.backbone = backbone
        self.pool = POOLINGS[pooling]()
        self.embedding: nn.Module = nn.Identity()
        if embedding:
            self.embedding = nn.Linear(channels, embedding)
            nn.init.kaiming_normal_(self.embedding.weight, mode="fan_out")
            nn.init.zeros_(self.embedding.bias)
        self.dim = embedding or channels
        self.neck = nn.BatchNorm1d(self.dim)
        self.neck.bias.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images)
        if features.dim() == 4:
            features = self.pool(features)
        # Batch norm of half-precision features, under autocast, would return half precision.
        return self.neck(self.embedding(features).to(self.neck.weight.dtype))


class Average(nn.Module):
    """(B, C, H, W) -> (B, C): the mean over the map."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean((2, 3), dtype=_wide(maps))


class GeM(nn.Module):
    """(B, C, H, W) -> (B, C): the generalised mean over the map, with an exponent that is learned.

    Values below `eps` count as `eps`.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), p))
        self.eps = eps

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        powers = maps.to(_wide(maps)).clamp(min=self.eps).pow(self.p)
        return powers.mean((2, 3)).pow(1 / self.p)


POOLINGS: dict[str, type[nn.Module]] = {"average": Average, "gem": GeM}


def _wide(maps: torch.Tensor) -> torch.dtype:
    return torch.promote_types(maps.dtype, torch.float32)
