"""Weights of published systems, and our own, in and out of encoders, GCL's generator and discriminator.

| layout | tensors are called | written by |
|---|---|---|
| pyreid | `backbone.conv1.weight`, `embedding.*`, `neck.*`, `pool.p` | `save_weights` |
| base | `base.0.weight`, `feat.*`, `feat_bn.*`, `gap.p` | ICE, SpCL, Cluster Contrast |
| flat | `conv1.weight`, `feat.*`, `feat_bn.*`, `fc.*` | JVTC, GCL's identity encoder, torchvision, IBN-Net |
| backbone | what its module calls them | timm, a module of one's own |
| scl | `CNN.conv1.weight`, `avg_pooling.*`, `local_pooling.*` | SCL |
| gen | `enc_content.*`, `dec.*`, `mlp_w1.*` | GCL, of its generator |
| dis | `cnns.*` | GCL, of its discriminator |
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from pyreid import files
from pyreid.models.encoder import Encoder, GeM, StripeEncoder
from pyreid.models.generator import BLOCKS, Discriminator, Generator
from pyreid.models.teacher import Teacher

# Where each layout keeps what the encoder has; the first prefix that fits renames a tensor.
_LAYOUTS: dict[str, dict[str, str]] = {
    "pyreid": {"": ""},
    "backbone": {"": "backbone."},
    "base": {
        "base.0.": "backbone.conv1.",
        "base.1.": "backbone.bn1.",
        "base.4.": "backbone.layer1.",
        "base.5.": "backbone.layer2.",
        "base.6.": "backbone.layer3.",
        "base.7.": "backbone.layer4.",
        "feat.": "embedding.",
        "feat_bn.": "neck.",
        "gap.": "pool.",
    },
    "flat": {
        "conv1.": "backbone.conv1.",
        "bn1.": "backbone.bn1.",
        "layer": "backbone.layer",
        "feat.": "embedding.",
        "feat_bn.": "neck.",
    },
    "scl": {
        "CNN.": "backbone.",
        "avg_pooling.embeding.": "embedding.",
        "avg_pooling.embeding_bn.": "neck.",
        "local_pooling.local_conv_list.": "stripes.",
    },
}
# What our names become in files that others read, and (gen, dis) are in theirs: a prefix each, then, with a
# dot before it, whatever stands further inside.
_OURS: dict[str, dict[str, str]] = {
    "id": {"embedding.": "feat.", "neck.": "feat_bn.", "backbone.": ""},
    "gen": {
        "structure.stem.": "enc_content.model.",
        "structure.blocks.": "enc_content.model.4.model.",
        "structure.around.0.": "enc_content.model.5.conv1.",
        "structure.around.1.": "enc_content.model.5.conv6.",
        "structure.around.2.": "enc_content.model.5.conv12.",
        "structure.around.3.": "enc_content.model.5.conv18.",
        "structure.fuse.": "enc_content.model.5.fuse.",
        "decoder.blocks.": "dec.model.1.model.",
        "decoder.enlarge.0.": "dec.model.3.",
        "decoder.enlarge.1.": "dec.model.5.",
        **{f"decoder.paint.{i}.": f"dec.model.{6 + i}." for i in range(3)},
        **{
            f"decoder.{own}.{block}.{2 * layer}.": f"mlp_{letter}{block + 1}.model.{layer}.fc."
            for own, letter in (("weights", "w"), ("biases", "b"))
            for block in range(BLOCKS)
            for layer in range(3)
        },
        ".first.": ".model.0.",
        ".second.": ".model.1.",
        ".norm.weight": ".norm.gamma",
        ".norm.bias": ".norm.beta",
    },
    "dis": {"scales.": "cnns.", ".first.": ".model.0.", ".second.": ".model.1."},
}
# Buffers of the released generator's adaptive norms, which are never used.
_IDLE = re.compile(r"dec\.model\.1\.model\.\d\.model\.[01]\.norm\.running_(mean|var)")
_SYSTEMS = {
    "pyreid": "pyreid",
    "base": "ICE, SpCL or Cluster Contrast",
    "flat": "torchvision, IBN-Net, JVTC or GCL",
    "scl": "SCL",
    "gen": "GCL's generator",
    "dis": "GCL's discriminator",
    "backbone": "the backbone's own names",
    "own names": "the module's own names",
}


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did. Names are the module's, those of `unexpected` the file's."""

    source: str
    layout: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the module alone: they keep their values
    unexpected: tuple[str, ...]  # in the file alone: not used
    epoch: int | None  # that the file tells of

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        parts = [f"{self.source} ({_SYSTEMS[self.layout]}{epoch}): {len(self.matched)} tensors"]
        if self.missing:
            parts.append(f"not in the file: {_listed(self.missing)}")
        if self.unexpected:
            parts.append(f"not used: {_listed(self.unexpected)}")
        return "; ".join(parts)


def load_weights(module: nn.Module, path: str | Path, *, head: bool = True) -> Loaded:
    """Reads a checkpoint into `module`, in place; nothing in the file is executed.

    An `Encoder` takes every layout above but the last two: a bare dictionary of tensors, or one under
    "state_dict" or GCL's "id"; with or without "module."; of SpCL's two sets of batch norms the target
    domain's. All of the backbone must be there and fit; where the file has a neck, pooling and embedding must
    be the file's. A `Generator` and a `Discriminator` take GCL's file of theirs, all of it. These two and any
    other module take a file of their own names. `module` may be wrapped for data parallelism, compiled, or a
    Teacher.

    Args:
        path: what torch.save wrote, or .safetensors.
        head: False loads the backbone alone.
    """
    path = Path(path)
    state, epoch = _read(path)
    return load_state(module, state, str(path), epoch=epoch, head=head)


def save_weights(module: nn.Module, path: str | Path, *, layout: str = "pyreid") -> None:
    """Writes the tensors of `module`, without what wraps it; .safetensors by that name, else by torch.save.
    What was at `path` stays until all of the new file is on disk.

    Args:
        layout: "pyreid"; "gcl", what GCL's own code reads, of a `Generator` (its gen_*.pt), a `Discriminator`
            (dis_*.pt) or an `Encoder` (id_*.pt); "jvtc", what GCL and JVTC read an `Encoder` from to begin
            with, also as GCL's model_best.pth.
    """
    path = Path(path)
    state: dict[str, Any] = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in _unwrapped(module).state_dict().items()
    }
    if layout != "pyreid":
        state = _released(_unwrapped(module), state, path, layout)
    with files.replacing(path) as file:
        if path.suffix == ".safetensors":
            file.write(_safetensors(path).torch.save(state))
        else:
            torch.save(state, file)


def load_state(
    module: nn.Module,
    state: dict[str, torch.Tensor],
    source: str,
    *,
    epoch: int | None = None,
    head: bool = True,
) -> Loaded:
    """`load_weights` of tensors that have been read already; `source` is what errors and the report call
    them."""
    module = _unwrapped(module)
    own = module.state_dict()
    if not any(name in own for name in state):
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): state[name] for name in state}
    part = _part(module)
    if isinstance(module, Encoder):
        layout = _layout(state, own)
        names = _names(state, layout)
        if not any(name.startswith("backbone.") and name in own for name in names.values()):
            raise ValueError(
                f"{source}: must hold the weights of a backbone like the encoder's, got "
                f"{_listed(tuple(state))}"
            )
        if not (
            head and _has_head_of(module, {names[key]: state[key] for key in names}, layout, source)
        ):
            names = {key: name for key, name in names.items() if name.startswith("backbone.")}
    elif part is not None and not any(name in own for name in state):
        layout = part
        state = {key: state[key] for key in state if not _IDLE.fullmatch(key)}
        ours = {_their_name(name, part): name for name in own}
        names = {key: ours[key] for key in state if key in ours}
    else:
        layout = "own names"
        names = {key: key for key in state}

    matched = {}
    for key, name in names.items():
        if name not in own:
            continue
        tensor = state[key]
        if tensor.dim() == 4 and own[name].dim() == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # a Linear that was written as a convolution
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{source}: {name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
            )
        matched[name] = tensor
    if not matched:
        raise ValueError(f"{source}: must hold weights of the module, got {_listed(tuple(state))}")
    # Files of early torch versions do not count batches, and nothing of ours reads the count.
    missing = tuple(
        name for name in own if name not in matched and not name.endswith("num_batches_tracked")
    )
    unexpected = tuple(key for key in state if names.get(key) not in matched)
    lacking, strange = missing, unexpected
    if isinstance(module, Encoder):
        lacking = tuple(name for name in missing if name.startswith("backbone."))
        strange = tuple(key for key in unexpected if names.get(key, "").startswith("backbone."))
    if layout == "backbone":
        strange = ()  # a classifier has any name
    if layout != "own names":
        kind = "encoder" if part == "id" else type(module).__name__.lower()
        for rule, wrong in (("must have", lacking), ("must not have", strange)):
            if wrong:
                raise ValueError(
                    f"{source}: {rule} {_listed(wrong)}, to be of the {kind}'s kind of network"
                )
    module.load_state_dict(matched, strict=False)
    return Loaded(source, layout, tuple(matched), missing, unexpected, epoch)


def _layout(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> str:
    if "base.0.weight" in state:
        return "base"
    if any(key.startswith("CNN.") for key in state):
        return "scl"
    if any(key in own for key in state):
        return "pyreid"
    return "flat" if "conv1.weight" in state else "backbone"


def _names(state: dict[str, torch.Tensor], layout: str) -> dict[str, str]:
    """The encoder's name of each of the file's that the layout has a place for."""
    names = {}
    for key in state:
        prefix = next((prefix for prefix in _LAYOUTS[layout] if key.startswith(prefix)), None)
        if prefix is not None and ".BN_S." not in key:
            name = _LAYOUTS[layout][prefix] + key.removeprefix(prefix)
            names[key] = name.replace(".BN_T.", ".")
    return names


def _part(module: nn.Module) -> str | None:
    """Which of GCL's networks it is, as GCL calls them."""
    parts = {Generator: "gen", Discriminator: "dis", Encoder: "id"}
    return next((part for kind, part in parts.items() if isinstance(module, kind)), None)


def _their_name(name: str, part: str) -> str:
    for ours, theirs in _OURS[part].items():
        if ours.startswith("."):
            name = name.replace(ours, theirs)
        elif name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return name


def _released(
    module: nn.Module, state: dict[str, torch.Tensor], path: Path, layout: str
) -> dict[str, Any]:
    """`state` as the released code reads it."""
    if layout not in ("gcl", "jvtc"):
        raise ValueError(f'{path}: layout must be "pyreid", "gcl" or "jvtc", got {layout!r}')
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: {layout} reads what torch.save writes, not .safetensors")
    part = _part(module)
    if part is None or (layout == "jvtc" and part != "id"):
        raise ValueError(f"{path}: {layout} has no layout of a {type(module).__name__}")
    if strange := tuple(name for name in state if name.startswith(("stripes.", "pool."))):
        raise ValueError(f"{path}: {layout} has no place for {_listed(strange)}")
    theirs = {_their_name(name, part): tensor for name, tensor in state.items()}
    if part == "gen":
        for name in tuple(theirs):
            if name.startswith("dec.model.1.") and name.endswith(".conv.bias"):
                norm = name.removesuffix("conv.bias") + "norm.running_"
                theirs[norm + "mean"] = torch.zeros_like(theirs[name])
                theirs[norm + "var"] = torch.ones_like(theirs[name])
    return theirs if layout == "jvtc" else {part: theirs}


def _has_head_of(
    encoder: Encoder, state: dict[str, torch.Tensor], layout: str, source: str
) -> bool:
    """Whether the file's neck belongs to features that the encoder makes; raises where that is no choice."""
    if not any(name.startswith("neck.") for name in state):
        return True
    width = len(state["embedding.weight"]) if "embedding.weight" in state else 0
    own_width = encoder.embedding.out_features if isinstance(encoder.embedding, nn.Linear) else 0
    pooling = "gem" if "pool.p" in state else "average"
    own_pooling = "gem" if isinstance(encoder.pool, GeM) else "average"
    own_stripes = len(encoder.parts) - 1 if isinstance(encoder, StripeEncoder) else 0
    stripes = len({name.split(".")[1] for name in state if name.startswith("stripes.")})
    if own_stripes and stripes not in (0, own_stripes):
        raise ValueError(
            f"{source}: stripes must be {stripes}, as the file has them, got {own_stripes} "
            "(head=False loads the backbone alone)"
        )
    if (width, pooling) == (own_width, own_pooling):
        return True
    if (
        layout == "scl" and not own_stripes
    ):  # it cannot have all of the heads, and may do without any
        return False
    option, file_has, own_has = (
        ("embedding", width, own_width) if width != own_width else ("pooling", pooling, own_pooling)
    )
    raise ValueError(
        f"{source}: {option} must be {file_has}, as the file's neck was trained with, got {own_has} "
        "(head=False loads the backbone alone)"
    )


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, DataParallel | DistributedDataParallel | Teacher):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = inner
        else:
            return module


def _read(path: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """The tensors of a file by name, and its epoch."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        safetensors = _safetensors(path)
        try:
            return safetensors.torch.load(path.read_bytes()), None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: is corrupt or no .safetensors file: {error}") from None
    found = _load_safely(path)
    epoch = None
    if isinstance(found, dict):
        if isinstance(found.get("epoch"), int | np.integer):
            epoch = int(found["epoch"])
        found = next(
            (found[key] for key in ("state_dict", "id", "gen", "dis") if key in found), found
        )
    state = {}
    if isinstance(found, dict):
        state = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ValueError(f"{path}: must hold a dictionary of tensors, got none")
    return state, epoch


def _load_safely(path: Path) -> Any:
    """torch.load of tensors, and of the numpy numbers that trainers keep beside them (a best mAP)."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = {type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")}
    # numpy moved its inner module; a file tells which numpy wrote it.
    allowed: list[Any] = [
        np.dtype,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        *numbers,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = f"got {culprit[1]}" if culprit else "or is corrupt"
        raise ValueError(f"{path}: must hold tensors and numbers only, {got}; not loaded") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: is corrupt or no file of weights: {reason}") from None


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            f"{path}: .safetensors files take safetensors: pip install safetensors"
        ) from None
    return safetensors


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
