"""GCL's three stages, one after another: each a run of its own, in a folder of its own.

    1. the encoder learns from photos alone, by another method: JVTC, as published
    2. the generator learns to turn people, from the encoder as it is
    3. both learn

Each begins with what the one before has ended with, and can be stopped and gone on with like any run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyreid.data import MeshedImages, ReidData
from pyreid.methods import GCL, METHODS
from pyreid.methods import gcl as _gcl
from pyreid.models import load_weights
from pyreid.train import Result, Training, check_output, fit

STAGES = (1, 2, 3)
BESIDE = ("generator", "discriminator")  # files of a stage, NAME.pt


class Stage(NamedTuple):
    """A stage that has been trained, or stopped."""

    method: Any
    result: Result


def train_stages(
    encoder: torch.nn.Module,
    data: ReidData,
    config: _gcl.Config | None = None,
    *,
    stages: Sequence[int] = STAGES,
    warmup: Any = "jvtc",
    trainings: Mapping[int, Training] | None = None,
    generator: torch.nn.Module | None = None,
    discriminator: torch.nn.Module | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[int, Stage]:
    """Trains an encoder by GCL.

    Args:
        encoder: as `models.build_part_encoder` makes them. A first stage of 2 or 3 begins with the files of
            the one before in `output`, if they are there; else with this as it is.
        data: its training images are MeshedImages.
        config: of stages 2 and 3; its `stage` does not count.
        stages: which, in order.
        warmup: the method of stage 1, by name or Config.
        trainings: by stage; default: the method's recipe.
        generator, discriminator: what stage 2, or 3 if it is the first, begins with; default: new ones.
        output: a folder, for stage1, stage2 and stage3.
        resume: go on with what is there: with stages that have come to their end, straight to the next.
        settings: more to write to each config.json.

    Returns:
        each stage's method and what `fit` returned; the last may have been stopped.
    """
    config = config or _gcl.Config()
    if not stages or list(stages) != sorted({*stages} & {*STAGES}):
        raise ValueError(f"train_stages: stages must be some of 1, 2, 3 in order, got {stages}")
    if not isinstance(data.train, MeshedImages) and (*stages,) != (1,):
        raise ValueError("train_stages: data must have MeshedImages to train on")
    folders = {
        stage: None if output is None else Path(output) / f"stage{stage}" for stage in STAGES
    }
    for stage in stages:
        if (folder := folders[stage]) is not None:
            check_output(folder, resume)
    others = {"generator": generator, "discriminator": discriminator}
    found: dict[int, Stage] = {}
    for stage in stages:
        training = (trainings or {}).get(stage) or Training(**recipe(stage, warmup))
        torch.manual_seed(training.seed)
        on = data
        method: Any
        if stage == 1:
            method = _class_of(warmup)(encoder, None if isinstance(warmup, str) else warmup)
            if isinstance(data.train, MeshedImages):
                on = replace(data, train=data.train.photos)
        else:
            joint: Any = str(stage)
            method = GCL(encoder, replace(config, stage=joint), **others)
            if stage == stages[0]:
                _take_over(method, folders[stage - 1], others)
        result = fit(
            method,
            None,
            on,
            training,
            output=folders[stage],
            resume=resume,
            settings={**(settings or {}), "stage": str(stage)},
        )
        found[stage] = Stage(method, result)
        if result.stopped:
            break
        encoder = result.encoder
        if stage > 1:
            others = dict(method.beside)
    return found


def recipe(stage: int, warmup: Any = "jvtc", preset: str | None = None) -> dict[str, Any]:
    """The released options of `Training` for a stage, on a data set or in general."""
    if stage == 1:
        cls = _class_of(warmup)
        return cls.recipe | cls.recipe_presets.get(preset, {})
    return GCL.generator_recipe if stage == 2 else GCL.recipe


def _class_of(warmup: Any) -> Any:
    if isinstance(warmup, str):
        return METHODS[warmup]
    return next(cls for cls in METHODS.values() if isinstance(warmup, cls.Config))


def _take_over(method: GCL, folder: Path | None, given: Mapping[str, Any]) -> None:
    """Into the networks, the weights that the stage before has left, where none were given."""
    if folder is None or not (folder / "last.pt").exists():
        return
    load_weights(method.encoder, folder / "last.pt")
    for name, network in method.beside.items():
        if given[name] is None and (folder / f"{name}.pt").exists():
            load_weights(network, folder / f"{name}.pt")
