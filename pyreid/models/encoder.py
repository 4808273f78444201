"""From images to features: a backbone, pooling, an optional embedding, and the neck; beside it stripes, or
an appearance code."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize


class Encoder(nn.Module):
    """(B, 3, H, W) images -> (B, `dim`) features: the output of the neck, not normalised, in both modes.

    Besides images, (B, T, 3, H, W) clips of T frames, whose pooled vectors are averaged.

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
        features = self.backbone(images.flatten(0, -4))
        if features.dim() == 4:
            features = self.pool(features)
        return self._head(_over_time(features, images))

    def _head(self, features: torch.Tensor) -> torch.Tensor:
        # Batch norm of half-precision features, under autocast, would return half precision.
        return self.neck(self.embedding(features).to(self.neck.weight.dtype))


class StripeEncoder(Encoder):
    """Images -> (B, `dim`) features in `parts`: a global head, then one for each horizontal stripe (SCL).

    In training, the output of the heads as it is. In evaluation each part has unit length, times the root of
    its weight: `global_weight`, and for each of S stripes (1 - global_weight) / S. So rows have unit length,
    and their dot product is the weighted mean of the parts' cosines.

    The parts of an `Encoder`, its neck's bias learned, and
        stripes: for each a Linear and a batch norm, of the mean over h // S rows of the map. Rows that are
            left over at the bottom belong to none.
        global_weight: () buffer; it is kept with the weights.
    """

    global_weight: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        *,
        stripes: int,
        stripe_embedding: int,
        pooling: str = "average",
        embedding: int = 0,
    ):
        super().__init__(backbone, channels, pooling=pooling, embedding=embedding)
        for name, value in (("stripes", stripes), ("stripe_embedding", stripe_embedding)):
            if value < 1:
                raise ValueError(f"StripeEncoder: {name} must be at least 1, got {value}")
        self.neck.bias.requires_grad_(True)
        self.stripes = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, stripe_embedding), nn.BatchNorm1d(stripe_embedding))
            for _ in range(stripes)
        )
        self.parts = (self.dim, *[stripe_embedding] * stripes)
        self.dim = sum(self.parts)
        self.register_buffer("global_weight", torch.tensor(0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(images.flatten(0, -4))
        count = len(self.stripes)
        if maps.dim() != 4 or maps.shape[2] < count:
            raise ValueError(
                f"StripeEncoder: the backbone must give maps of at least {count} rows, one for each stripe, "
                f"got {tuple(maps.shape)}"
            )
        rows = maps.shape[2] // count
        bands = maps[:, :, : rows * count].unflatten(2, (count, rows))
        pooled = torch.cat([self.pool(maps)[:, None], bands.mean((3, 4), dtype=_wide(maps)).mT], 1)
        pooled = _over_time(pooled, images)
        parts = [self._head(pooled[:, 0])]
        for place, stripe in enumerate(self.stripes, 1):
            linear, norm = stripe.children()
            parts.append(norm(linear(pooled[:, place]).to(self.neck.weight.dtype)))
        if not self.training:
            share = (1 - self.global_weight) / count
            weights = [self.global_weight, *[share] * count]
            parts = [normalize(p) * w.sqrt() for p, w in zip(parts, weights, strict=True)]
        return torch.cat(parts, dim=1)


class PartEncoder(Encoder):
    """An `Encoder` that also tells what a person looks like: GCL's E_id, and the network of JVTC.

    Its backbone must give maps, and its neck's bias is learned.

    Args:
        bands: horizontal bands of the map, the means over which are the appearance code. Of h rows, band i
            has those from floor(i h / bands) to ceil((i + 1) h / bands), as adaptive pooling divides them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        *,
        bands: int = 4,
        pooling: str = "average",
        embedding: int = 512,
    ):
        super().__init__(backbone, channels, pooling=pooling, embedding=embedding)
        if bands < 1:
            raise ValueError(f"PartEncoder: bands must be at least 1, got {bands}")
        self.neck.bias.requires_grad_(True)
        self.bands = bands
        self.appearance_dim = channels * bands

    def appearance_and_embedding(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f, (B, `appearance_dim`), not normalised: for each channel of the map its means over the bands, top
        to bottom; and what `forward` returns, (B, `dim`). Of one pass through the backbone."""
        maps = self.backbone(images.flatten(0, -4))
        if maps.dim() != 4:
            raise ValueError(
                f"PartEncoder: the backbone must give maps, one mean is no part, got {tuple(maps.shape)}"
            )
        rows, bands = maps.shape[2], self.bands
        means = [
            maps[:, :, i * rows // bands : -(-(i + 1) * rows // bands)].mean(
                (2, 3), dtype=_wide(maps)
            )
            for i in range(bands)
        ]
        appearance = _over_time(torch.stack(means, dim=2).flatten(1), images)
        return appearance, self._head(_over_time(self.pool(maps), images))


def _over_time(pooled: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(B, ...) of images, or of (B T, ...) those of clips the means over their frames."""
    if images.dim() < 5:
        return pooled
    return pooled.unflatten(0, images.shape[:2]).mean(dim=1)


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
