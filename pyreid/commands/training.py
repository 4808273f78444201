"""`pyreid train`, `eval`, `extract`, `visualize`, `synth`: a network learns, is judged and looked at."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pyreid import (
    distributed,
    evaluation,
    files,
    meshes,
    models,
    options,
    people,
    pictures,
    report,
    stages,
    train,
)
from pyreid.data import (
    ANGLES,
    MeshedImages,
    ReidData,
    open_csv,
    open_data,
    open_folder,
    open_meshes,
    transforms,
)
from pyreid.methods import GCL, METHODS, SCL
from pyreid.options import option

_INTERRUPTED = 130  # as shells have it


@dataclasses.dataclass(frozen=True)
class Network:
    """The encoder and what it begins with."""

    encoder: str = option(
        "resnet50", "resnet18, resnet34, resnet50, their _ibn_a, small, or timm:NAME"
    )
    pooling: Literal["average", "gem"] = option("average", "of the last map")
    embedding: int = option(0, "features of a linear layer behind the pooling; 0: no such layer")
    stripes: int = option(0, "stripes with heads of their own beside the global one, for SCL")
    stripe_embedding: int = option(256, "features of the head of a stripe")
    parts: int = option(0, "bands of an appearance code beside the features, for GCL")
    norm_group: int | None = option(None, "images whose statistics a batch norm shares; none: all")
    weights: str = option("imagenet", "a file to begin with; imagenet (is downloaded), or random")

    def build(self) -> torch.nn.Module:
        return models.build_encoder(
            self.encoder,
            pooling=self.pooling,
            embedding=self.embedding,
            stripes=self.stripes,
            stripe_embedding=self.stripe_embedding,
            parts=self.parts,
            norm_group=self.norm_group,
            weights=None if self.weights == "random" else self.weights,
        )


def main(command: str, argv: list[str]) -> int:
    try:
        return {
            "train": _train,
            "eval": _eval,
            "extract": _extract,
            "visualize": _visualize,
            "synth": _synth,
        }[command](argv)
    except KeyboardInterrupt:
        print(f"pyreid {command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        print(f"pyreid {command}: {error}", file=sys.stderr)
        return 2


# --- train


def _train(argv: list[str]) -> int:
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", choices=list(METHODS))
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(argv)
    settings = {} if known.config is None else options.read(known.config)
    name = known.method or settings.get("method_name", "ice")
    if name not in METHODS:
        raise ValueError(
            f"{known.config}: method_name must be one of {', '.join(METHODS)}, got {name!r}"
        )
    method = METHODS[name]

    parser = argparse.ArgumentParser(
        prog="pyreid train",
        description="Train an encoder on images that nobody has labelled.",
        epilog="Options of other methods: pyreid train --method NAME --help",
    )
    parser.add_argument(
        "--method", choices=list(METHODS), default=name, help="default: %(default)s"
    )
    parser.add_argument("--config", metavar="FILE", help="options from a config.json; flags win")
    parser.add_argument("--preset", metavar="DATA", help="the released options for a data set")
    parser.add_argument("-o", "--output", metavar="DIR", help="default: runs/METHOD-DATA")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    _add_data(parser, required=not settings.get("data"))
    parser.add_argument("--test-data", metavar="DIR", help="evaluate on another data set")
    options.add_arguments(parser, Network, "network")
    options.add_arguments(parser, train.Training, "training")
    options.add_arguments(parser, method.Config, f"{name}", skip=("stage",))
    if name == "gcl":
        _add_stages(parser, settings)
    arguments = parser.parse_args(argv)

    where = str(known.config)
    config, recipe = method.Config(), dict(method.recipe)
    if arguments.preset:
        config = method.Config.preset(arguments.preset)
        recipe |= method.recipe_presets.get(arguments.preset, {})
    config = options.replace(config, settings.get("method", {}), where)
    config = options.from_arguments(config, arguments)
    trained = options.replace(train.Training(**recipe), settings.get("training", {}), where)
    trained = options.from_arguments(trained, arguments)
    network = options.replace(Network(**method.encoder_options), settings.get("network", {}), where)
    network = options.from_arguments(network, arguments)
    source = _source(arguments) or settings["data"]

    _join_processes(trained.device)
    if arguments.output:
        train.check_output(Path(arguments.output), arguments.resume)
    data = _open(source, trained)
    if arguments.test_data:
        other = open_data(arguments.test_data)
        data = dataclasses.replace(data, query=other.query, gallery=other.gallery)
    output = Path(arguments.output or Path("runs") / f"{name}-{data.name}")
    if name == "gcl":
        return _train_stages(arguments, settings, config, network, source, data, output)
    if distributed.rank() == 0:
        print(data.summary(), flush=True)
    torch.manual_seed(trained.seed)
    result = train.fit(
        config,
        network.build(),
        data,
        trained,
        output=output,
        resume=arguments.resume,
        settings={"method_name": name, "network": options.to_dict(network), "data": source},
    )
    results = {"before training": result.before, "after": result.evaluation}
    found = {name: each for name, each in results.items() if each}
    page = _report(
        output,
        f"{name} on {data.name}",
        result.encoder,
        data,
        trained,
        results=found,
        labels=result.labels,
        history=result.history,
        settings={
            "method": options.to_dict(config),
            "training": options.to_dict(trained),
            "network": options.to_dict(network),
        },
    )
    if distributed.rank() == 0:
        if found:
            print(evaluation.summary(found))
        print(f"weights: {output / 'last.pt'}\nlabels:  {output / 'labels.csv'}\nreport:  {page}")
        if result.stopped:
            print(
                f"interrupted; to go on: pyreid train --config {output / 'config.json'} "
                f"--output {output} --resume"
            )
    return _INTERRUPTED if result.stopped else 0


def _add_stages(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> None:
    group = parser.add_argument_group(
        "stages", "Options of training hold for each stage that is run; the defaults are its own."
    )
    group.add_argument(
        "--stage",
        dest="stages",  # not the option of a GCL by itself
        choices=["all", *map(str, stages.STAGES)],
        default=settings.get("stage", "all"),
        help="1: the encoder, by --warmup; 2: the generator; 3: both (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        choices=[name for name in METHODS if name != "gcl"],
        default=settings.get("warmup", "jvtc"),
        help="the method of stage 1 (default: %(default)s)",
    )
    group.add_argument(
        "--meshes",
        metavar="PATH",
        default=settings.get("meshes"),
        help="body pictures of the training images: as released, or as `pyreid mesh` makes them; those of "
        "--people are known",
    )
    for name in stages.BESIDE:
        group.add_argument(f"--{name}", metavar="FILE", help="weights to begin with")


def _train_stages(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    config: Any,
    network: Network,
    source: dict[str, Any],
    data: ReidData,
    output: Path,
) -> int:
    """GCL: stages in folders of their own, and one page."""
    preset = arguments.preset or settings.get("preset")
    warmup = METHODS[arguments.warmup]
    first = warmup.Config.preset(preset) if preset in warmup.Config.presets else warmup.Config()
    wanted = stages.STAGES if arguments.stages == "all" else (int(arguments.stages),)
    trainings = {}
    for stage in wanted:
        trained = train.Training(**stages.recipe(stage, first, preset))
        trained = options.replace(trained, settings.get("training", {}), str(arguments.config))
        trainings[stage] = options.from_arguments(trained, arguments)
    last = trainings[wanted[-1]]
    before = output / f"stage{wanted[0] - 1}" / "last.pt"
    if wanted[0] > 1 and before.exists():
        if vars(arguments).get("weights", "random") not in ("imagenet", "random"):
            raise ValueError(
                f"--weights: {before} is what the stage would begin with; name another --output"
            )
        network = dataclasses.replace(network, weights="random")
    torch.manual_seed(last.seed)
    encoder = network.build()
    beside = {}
    for name, given in ((name, getattr(arguments, name)) for name in stages.BESIDE):
        if given is not None:
            beside[name] = getattr(GCL(encoder, config), name)
            print(models.load_weights(beside[name], given))
    if wanted != (1,):
        data = dataclasses.replace(data, train=_bodied(arguments, source, data, last))
    described = {
        "method_name": "gcl",
        "stage": arguments.stages,
        "warmup": arguments.warmup,
        "preset": preset,
        "meshes": arguments.meshes and os.path.abspath(arguments.meshes),
        "network": options.to_dict(network),
        "data": source,
    }
    if distributed.rank() == 0:
        print(data.summary(), flush=True)
        output.mkdir(parents=True, exist_ok=True)
        given = [settings.get("training", {}), _given(train.Training, arguments)]
        whole = described | {
            "method": options.to_dict(config),
            "training": {**given[0], **given[1]},
        }
        with files.replacing(output / "config.json") as file:
            file.write((json.dumps(whole, indent=2) + "\n").encode())
    found = stages.train_stages(
        encoder,
        data,
        config,
        stages=wanted,
        warmup=first,
        trainings=trainings,
        output=output,
        resume=arguments.resume,
        settings=described,
        **beside,
    )
    stage, (method, result) = list(found.items())[-1]
    results: dict[str, Any] = {f"before stage {wanted[0]}": found[wanted[0]].result.before}
    results |= {f"stage {number}": each.result.evaluation for number, each in found.items()}
    results = {name: each for name, each in results.items() if each}
    drawn = []
    if isinstance(data.train, MeshedImages) and distributed.rank() == 0 and stage > 1:
        drawn.append(_view_sheet(method, data.train, last))
    page = _report(
        output,
        f"gcl on {data.name}",
        result.encoder,
        data.stills(),
        last,
        results=results,
        labels=result.labels,
        history=result.history,
        more=drawn,
        settings={
            "method": options.to_dict(config),
            **{
                f"training, stage {number}": options.to_dict(each)
                for number, each in trainings.items()
            },
            "network": options.to_dict(network),
        },
    )
    if distributed.rank() == 0:
        if results:
            print(evaluation.summary(results))
        folder = output / f"stage{stage}"
        print(f"weights: {folder / 'last.pt'}\nreport:  {page}")
        if result.stopped:
            print(
                f"interrupted; to go on: pyreid train --config {output / 'config.json'} "
                f"--output {output} --resume"
            )
    return _INTERRUPTED if result.stopped else 0


def _given(cls: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a dataclass that were given on the command line."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _bodied(
    arguments: argparse.Namespace, source: dict[str, Any], data: ReidData, training: train.Training
) -> MeshedImages:
    """The training images with their body pictures."""
    if arguments.meshes:
        bodies = open_meshes(arguments.meshes, data.train)
    elif "people" in source and not source.get("tracklets"):
        bodies = meshes.people_meshes(
            people.People(ids=source["people"], height=training.height, width=training.width)
        )
    else:
        raise ValueError(
            "--meshes: stages 2 and 3 take pictures of bodies, one for each training image and angle: "
            "`pyreid mesh` makes them"
        )
    return MeshedImages(data.train, bodies)


def _view_sheet(method: GCL, images: MeshedImages, training: train.Training) -> report.Picture:
    """Some of the training images, turned."""
    rows = np.linspace(0, len(images) - 1, min(8, len(images))).astype(int)
    size = training.height, training.width
    chosen: list[Any] = [images[row][0] for row in rows]
    view: Any = transforms.make("plain", *size)
    poses = [transforms.MeshView(*size, (turn,)) for turn in range(len(ANGLES))]
    device = next(method.parameters()).device
    generated, cycled = method.render(
        torch.stack([view(image.photo) for image in chosen]).to(device),
        torch.stack([torch.stack([pose(image) for pose in poses]) for image in chosen]).to(device),
    )
    sheet = pictures.view_grid(
        [image.photo for image in chosen],
        transforms.pixels(generated),
        transforms.pixels(cycled),
        angles=ANGLES,
    )
    return report.Picture("Generated views", "Training images, turned", sheet)


def _join_processes(device: str) -> None:
    """One of several processes, where torchrun has started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_distributed():
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        torch.distributed.init_process_group("nccl" if cuda else "gloo")


# --- a trained network


def _eval(argv: list[str]) -> int:
    parser = _parser("eval", "How well a network finds the images of a person among others.")
    parser.add_argument("--rerank", action="store_true", help="also after k-reciprocal re-ranking")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args(argv)
    encoder, training = _trained(arguments)
    data = _open(_source(arguments), training)
    print(data.summary(), flush=True)
    found = evaluation.evaluate_data(
        encoder,
        data,
        rerank=arguments.rerank,
        same_camera=data.one_camera,
        distances=_distances(encoder, Path(arguments.weights)),
        progress=True,
        flip=training.flip,
        **training.extraction,
    )
    print(found.summary())
    if arguments.json:
        with files.replacing(Path(arguments.json)) as file:
            file.write((json.dumps(found.to_dict(), indent=2) + "\n").encode())
    return 0


def _extract(argv: list[str]) -> int:
    parser = _parser(
        "extract", "Unit features of images, for `pyreid cluster`, `rerank` and others."
    )
    parser.add_argument("-o", "--output", metavar="FEATURES", required=True, help=".npy or .npz")
    parser.add_argument("--subset", choices=["train", "query", "gallery"], default="train")
    arguments = parser.parse_args(argv)
    files.check_output(Path(arguments.output))
    encoder, training = _trained(arguments)
    data = _open(_source(arguments), training)
    images = getattr(data, arguments.subset)
    if images is None:
        raise ValueError(f"--subset: {data.name} has no {arguments.subset} images")
    features = evaluation.extract(
        encoder, images, flip=training.flip, progress="features", **training.extraction
    )
    files.write(
        Path(arguments.output),
        "features",
        features.cpu().numpy(),
        names=np.array(images.names),
        ids=images.ids,
        cameras=images.cameras,
    )
    print(f"{len(images)} images, {features.shape[1]} features each: {arguments.output}")
    return 0


def _visualize(argv: list[str]) -> int:
    parser = _parser(
        "visualize", "Ranked lists, curves, clusters and maps of features, as pictures."
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="a folder for them")
    parser.add_argument("--rerank", action="store_true", help="also after k-reciprocal re-ranking")
    parser.add_argument("--map", choices=["pca", "tsne"], default="pca", help="default: pca")
    arguments = parser.parse_args(argv)
    encoder, training = _trained(arguments)
    data = _open(_source(arguments), training)
    page = _report(
        Path(arguments.output),
        f"{Path(arguments.weights).name} on {data.name}",
        encoder,
        data,
        training,
        rerank=arguments.rerank,
        method=arguments.map,
        separately=True,
    )
    print(f"report: {page}")
    return 0


def _report(
    folder: Path,
    title: str,
    encoder: torch.nn.Module,
    data: ReidData,
    training: train.Training,
    *,
    results: dict[str, Any] | None = None,
    labels: Any = None,
    rerank: bool = False,
    method: Literal["pca", "tsne"] = "pca",
    separately: bool = False,
    more: Sequence[report.Picture] = (),
    **known: Any,
) -> Path:
    """The page of a network: all processes take part in its features, the first writes."""
    features = evaluation.extract_data(
        encoder, data, progress=True, flip=training.flip, **training.extraction
    )
    if distributed.rank() == 0:
        data = data.stills()
        if not results and data.query and data.gallery:
            found = evaluation.evaluate(
                features["query"],
                features["gallery"],
                data.query,
                data.gallery,
                rerank=rerank,
                same_camera=data.one_camera,
            )
            print(found.summary())
            results = {"": found}
        drawn = report.draw(data, features, labels, same_camera=data.one_camera, method=method)
        drawn += more
        if separately:
            report.save(folder, drawn)
        report.write_report(folder, title=title, results=results, data=data, drawn=drawn, **known)
    return folder / "report.html"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pyreid {command}", description=description)
    parser.add_argument(
        "weights", metavar="WEIGHTS", help="last.pt or best.pt of a run, or another's checkpoint"
    )
    _add_data(parser, required=True)
    options.add_arguments(parser, Network, "network", skip=("weights",))
    options.add_arguments(parser, train.Training, "passes", skip=_OF_LEARNING)
    return parser


_PASS = ("height", "width", "precision", "test_batch", "workers", "device", "channels_last", "flip")
_OF_LEARNING = tuple(
    field.name for field in dataclasses.fields(train.Training) if field.name not in _PASS
)


def _trained(arguments: argparse.Namespace) -> tuple[torch.nn.Module, train.Training]:
    """The network of a file of weights, made as the config.json beside it has it, where there is one."""
    path = Path(arguments.weights)
    settings, beside = _beside(path)
    network = options.replace(Network(), settings.get("network", {}), str(beside))
    training = options.replace(train.Training(), settings.get("training", {}), str(beside))
    network = options.from_arguments(network, argparse.Namespace(**_without_weights(arguments)))
    training = options.from_arguments(training, arguments)
    encoder = dataclasses.replace(network, weights="random").build()
    loaded = models.load_weights(encoder, path)
    print(loaded)
    encoder.to(train.device_of(training.device))
    return encoder.eval(), training


def _beside(weights: Path) -> tuple[dict[str, Any], Path]:
    """The settings of the run that a file of weights is of, if they are there, and where."""
    path = weights.parent / "config.json"
    return options.read(path) if path.exists() else {}, path


def _distances(encoder: torch.nn.Module, weights: Path) -> evaluation.Distances | None:
    """SCL's test distances, for a network with stripes."""
    if not isinstance(encoder, models.StripeEncoder):
        return None
    settings, path = _beside(weights)
    config = SCL.Config(global_weight=float(encoder.global_weight))
    if settings.get("method_name") == "scl":
        config = options.replace(config, settings.get("method", {}), str(path))
    return SCL(encoder, config).distances


def _without_weights(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "weights"}


# --- images


def _add_data(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("images, one of")
    several = group.add_mutually_exclusive_group(required=required)
    several.add_argument(
        "--data",
        metavar="DIR",
        help="Market-1501, DukeMTMC-reID, MSMT17, MARS or others, as unpacked",
    )
    several.add_argument(
        "--images", metavar="DIR", help="a folder of crops of people, no ids needed"
    )
    several.add_argument("--csv", metavar="FILE", help="a table with the columns path, id, camera")
    several.add_argument("--people", type=int, metavar="N", help="N made-up people to train on")
    group.add_argument(
        "--tracklets", action="store_true", help="with --people: four frames of each at a time"
    )
    group.add_argument(
        "--camera-pattern", metavar="REGEX", help="with --images: its group is the camera in a path"
    )
    group.add_argument(
        "--id-pattern", metavar="REGEX", help="with --images: likewise the person, to report on"
    )


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """The images that were asked for, as config.json holds them."""
    patterns = {
        name: getattr(arguments, name)
        for name in ("camera_pattern", "id_pattern")
        if getattr(arguments, name)
    }
    if patterns and not arguments.images:
        raise ValueError("--camera-pattern and --id-pattern: only with --images")
    for kind in ("data", "images", "csv", "people"):
        if (value := getattr(arguments, kind)) is not None:
            if kind == "people":
                return {kind: value, **({"tracklets": True} if arguments.tracklets else {})}
            return {kind: os.path.abspath(value), **patterns}
    return {}


def _open(source: dict[str, Any], training: train.Training) -> ReidData:
    if "data" in source:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the summary says the same, and is printed
            return open_data(source["data"])
    if "csv" in source:
        return open_csv(source["csv"])
    if "images" in source:
        return open_folder(
            source["images"],
            camera=source.get("camera_pattern"),
            identity=source.get("id_pattern"),
        )
    size = {"ids": source["people"], "height": training.height, "width": training.width}
    if source.get("tracklets"):
        return people.people_tracklets(**size)
    return people.people_data(**size)


def _synth(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pyreid synth",
        description="Made-up people in front of made-up cameras, as a data set in Market-1501's layout.",
    )
    parser.add_argument("output", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--sheet", metavar="FILE", help="also a picture of some of them")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw (default: 0)")
    options.add_arguments(parser, people.People, "people")
    arguments = parser.parse_args(argv)
    config = options.from_arguments(people.People(), arguments)
    people.write_market(arguments.output, config, workers=arguments.workers)
    print(open_data(arguments.output).summary())
    if arguments.sheet:
        people.contact_sheet(config).save(arguments.sheet)
        print(f"sheet: {arguments.sheet}")
    return 0
