"""Encoders by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyreid.models.checkpoints import load_state, load_weights
from pyreid.models.encoder import Encoder, PartEncoder, StripeEncoder
from pyreid.models.ghost_norm import ghost_
from pyreid.models.resnet import SHAPES, ResNet, parse_name

logger = logging.getLogger(__name__)

# torchvision has no IBN-Net; these are its authors' files, each with the start of its SHA-256.
_IBN_NET = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/{}-{}.pth"
_IBN_NET_FILES = {
    "resnet18_ibn_a": "2f571257",
    "resnet34_ibn_a": "94bc1577",
    "resnet50_ibn_a": "d9d0bb7b",
    "resnet101_ibn_a": "59ea0ac6",
    "resnet18_ibn_b": "bc2f3c11",
    "resnet34_ibn_b": "04134c37",
    "resnet50_ibn_b": "9ca61e85",
    "resnet101_ibn_b": "c55f6dba",
}


def build_encoder(
    name: str | nn.Module = "resnet50",
    *,
    pooling: str = "average",
    embedding: int = 0,
    stripes: int = 0,
    stripe_embedding: int = 256,
    parts: int = 0,
    last_stride: int = 1,
    norm_group: int | None = None,
    weights: str | Path | None = None,
    size: tuple[int, int] = (256, 128),
) -> Encoder:
    """An encoder of images, on the CPU, in training mode.

    Methods need none of this: any module that maps images to (B, D) can be trained.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101", with "_ibn_a" or "_ibn_b" behind it for
            IBN-Net's variants; "small", a slim network for 64x32 images on a CPU; "timm:NAME", any model of
            timm; or a module that maps images to (B, C, h, w) maps or (B, C) features.
        pooling: "average" or "gem". A model of timm that pools in its own way does so with "average".
        embedding: width of a Linear before the neck; 0 for none.
        stripes: horizontal stripes that have a head each, `stripe_embedding` wide, beside the one of the
            whole image: a `StripeEncoder`, as SCL has it. Its backbone must give maps. 0 for none.
        parts: horizontal bands whose means are an appearance code beside the features: a `PartEncoder`, as
            GCL has it. Its backbone must give maps. 0 for none.
        last_stride: of the last stage; 1 keeps its map at H / 16 x W / 16. For names of ResNets only.
        norm_group: batch norm in training takes the statistics of so many consecutive images at a time.
        weights: a file, as for `load_weights`; "imagenet", downloaded once by torchvision's or timm's rules;
            None for random ones, the same after the same torch.manual_seed.
        size: (height, width) of the images, for models of timm that are made for one size.
    """
    if last_stride not in (1, 2):
        raise ValueError(f"build_encoder: last_stride must be 1 or 2, got {last_stride}")
    if stripes and parts:
        raise ValueError(
            f"build_encoder: stripes or parts must be 0, got stripes={stripes} and parts={parts}"
        )
    if isinstance(name, nn.Module):
        backbone = name
        channels = _channels(backbone, size, pooling)
    elif name.startswith("timm:"):
        backbone = _timm(
            name.removeprefix("timm:"), pooling, size, pretrained=weights == "imagenet"
        )
        channels = _channels(backbone, size, pooling)
    elif (parsed := parse_name(name)) is not None:
        shape, ibn = parsed
        backbone = ResNet(shape, ibn=ibn, last_stride=last_stride)
        channels = backbone.channels
    else:
        raise ValueError(
            f"build_encoder: name must be one of {', '.join(SHAPES)}, with or without _ibn_a or _ibn_b, "
            f"or timm:NAME, got {name!r}"
        )
    if stripes:
        encoder: Encoder = StripeEncoder(
            backbone,
            channels,
            stripes=stripes,
            stripe_embedding=stripe_embedding,
            pooling=pooling,
            embedding=embedding,
        )
    elif parts:
        encoder = PartEncoder(backbone, channels, bands=parts, pooling=pooling, embedding=embedding)
    else:
        encoder = Encoder(backbone, channels, pooling=pooling, embedding=embedding)
    if weights == "imagenet":
        if isinstance(name, nn.Module) or name.startswith("small"):
            raise ValueError(f'build_encoder: weights="imagenet" do not exist for {_shown(name)}')
        if not name.startswith("timm:"):
            url = _imagenet_url(name)
            logger.info(load_state(encoder, _download(url), url))
    elif weights is not None:
        logger.info(load_weights(encoder, weights))
    if norm_group is not None:
        ghost_(encoder, norm_group)
    return encoder


def build_part_encoder(
    name: str | nn.Module = "resnet50",
    *,
    embedding: int = 512,
    parts: int = 4,
    norm_group: int | None = None,
    weights: str | Path | None = None,
    size: tuple[int, int] = (256, 128),
) -> PartEncoder:
    """`build_encoder` of GCL's and JVTC's network of identities; their files fit the defaults."""
    if parts < 1:
        raise ValueError(f"build_part_encoder: parts must be at least 1, got {parts}")
    encoder = build_encoder(
        name,
        embedding=embedding,
        parts=parts,
        norm_group=norm_group,
        weights=weights,
        size=size,
    )
    assert isinstance(encoder, PartEncoder)
    return encoder


def _timm(name: str, pooling: str, size: tuple[int, int], *, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ImportError(f"build_encoder: timm:{name} takes timm: pip install timm") from None
    options: dict[str, Any] = {"num_classes": 0}
    if pooling != "average":
        options["global_pool"] = ""
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        raise ValueError(
            f"build_encoder: timm must know the model, got {name!r}"
            + (f" (it has {close})" if close else "")
        )
    known = timm.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size:
        options["img_size"] = size
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise OSError(_not_fetched(f"timm's model {name}", error)) from error


def _channels(backbone: nn.Module, size: tuple[int, int], pooling: str) -> int:
    """How wide the output is, by trying it."""
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    with torch.no_grad():
        parameter = next(backbone.parameters(), torch.zeros(()))
        output = backbone(parameter.new_zeros(2, 3, *size))
    for module, mode in modes:
        module.training = mode
    if not isinstance(output, torch.Tensor) or output.dim() not in (2, 4) or len(output) != 2:
        shown = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"build_encoder: the backbone must map (B, 3, H, W) images to (B, C, h, w) or (B, C), "
            f"got {shown} for B = 2"
        )
    if output.dim() == 2 and pooling != "average":
        raise ValueError(
            f'build_encoder: pooling must be "average" for a backbone that pools by itself, got {pooling!r}'
        )
    return output.shape[1]


def _imagenet_url(name: str) -> str:
    if name in _IBN_NET_FILES:
        return _IBN_NET.format(name, _IBN_NET_FILES[name])
    try:
        from torchvision.models import get_model_weights
    except ImportError:
        raise ImportError(
            'build_encoder: weights="imagenet" takes torchvision: pip install torchvision'
        ) from None
    # The papers' own; the newer recipe's features transfer differently.
    return get_model_weights(name)["IMAGENET1K_V1"].url


def _download(url: str) -> dict[str, Any]:
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise OSError(_not_fetched(url, error)) from error


def _not_fetched(what: str, error: Exception) -> str:
    return (
        f"build_encoder: the weights could not be fetched ({what}: {error}); "
        "fetch the file elsewhere and give its path as weights"
    )


def _shown(name: str | nn.Module) -> str:
    return name if isinstance(name, str) else f"a {type(name).__name__}"
