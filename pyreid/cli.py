"""The command `pyreid`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Commands with options of their own, made from dataclasses that take a while to import.
_TRAINING = {
    "train": "an encoder learns from images without labels",
    "eval": "how well an encoder finds people again",
    "extract": "features of images, to a file",
    "visualize": "ranked lists, curves, clusters and maps, as pictures",
    "synth": "made-up people, as a data set on disk",
    "mesh": "pictures of the bodies in photos, for GCL's generator",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pyreid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what was built, what is here, whether they fit")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="time the ops against what else one would run")
    bench.add_argument("ops", nargs="*", metavar="OP", help="which ops (default: all)")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer sizes, shorter runs: two minutes")
    size.add_argument("--full", action="store_true", help="all sizes (the default)")
    bench.add_argument("--device", choices=["cpu", "cuda"], help="default: all that are here")
    bench.add_argument("--json", metavar="FILE", help="also write the figures, case by case")
    bench.add_argument("--html", metavar="FILE", help="also write a page, with pictures")
    bench.add_argument("--compare", metavar="OLD.json", help="exit 1 if ours is slower than then")
    bench.add_argument(
        "--resume", action="store_true", help="keep what the file of --json has, measure the rest"
    )
    bench.add_argument(
        "--limit", type=float, metavar="SECONDS", help="begin no case later than that"
    )
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train on made-up people, on the CPU, in minutes")
    demo.add_argument(
        "-o", "--output", metavar="DIR", default="runs/demo", help="default: %(default)s"
    )
    demo.add_argument(
        "--method", choices=["ice", "scl", "gcl"], default="ice", help="default: %(default)s"
    )
    demo.set_defaults(run=_demo)

    for name, text in _TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)

    cluster = commands.add_parser("cluster", help="pseudo labels of a file of features")
    cluster.add_argument("features", metavar="FEATURES", help=".npy, .npz, .pt or .mat")
    _add_output(cluster, "LABELS")
    _add_key(cluster, "--key", "the features")
    _add_key(cluster, "--cameras-key", "the cameras, for --variant ca-jaccard")
    _add_key(cluster, "--ids-key", "the true ids, to compare the clusters with")
    _add_sets(cluster, k1=30, variant="spcl")
    cluster.add_argument(
        "--eps", type=_numbers, default=(0.6,), help="in (0, 1], or several: 0.4,0.5 (default: 0.6)"
    )
    cluster.add_argument("--min-samples", type=int, default=4, help="default: %(default)s")
    cluster.set_defaults(run=_on_files)

    rerank = commands.add_parser("rerank", help="re-ranked distances of two files of features")
    rerank.add_argument("queries", metavar="QUERIES", help=".npy, .npz, .pt or .mat")
    rerank.add_argument("gallery", metavar="GALLERY", help="likewise; may be the same file")
    _add_output(rerank, "DISTANCES")
    _add_key(rerank, "--queries-key", "the features of the queries")
    _add_key(rerank, "--gallery-key", "the features of the gallery")
    _add_sets(rerank, k1=20, variant="zhong")
    rerank.add_argument(
        "--lambda",
        dest="lambda_value",
        type=float,
        default=0.3,
        help="weight of the distance itself, in [0, 1] (default: %(default)s)",
    )
    rerank.set_defaults(run=_on_files)

    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in _TRAINING:
        return _train(arguments.command, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.run(arguments)


def _add_output(parser, metavar) -> None:
    parser.add_argument("-o", "--output", metavar=metavar, required=True, help=".npy or .npz")


def _add_key(parser, flag, what) -> None:
    parser.add_argument(flag, metavar="NAME", help=f"the array in the file that holds {what}")


def _add_sets(parser, *, k1, variant) -> None:
    parser.add_argument("--k1", type=int, default=k1, help="default: %(default)s")
    parser.add_argument("--k2", type=int, default=6, help="default: %(default)s")
    parser.add_argument(
        "--variant", default=variant, help="see help(ops.jaccard_graph) (default: %(default)s)"
    )
    parser.add_argument("--normalize", action="store_true", help="make rows unit length first")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers with commas between them, got {text!r}"
        ) from None


def _info(arguments) -> int:
    from pyreid import info

    return info.main(["--json"] if arguments.json else [])


def _bench(arguments) -> int:
    try:
        from pyreid.benchmarks import run, timing
    except ImportError as error:
        sys.exit(f"pyreid bench: the benchmarks cannot be loaded: {error}")
    known = run.op_names()
    if unknown := set(arguments.ops) - set(known):
        sys.exit(f"pyreid bench: OP must be one of {', '.join(known)}, got {', '.join(unknown)}")
    devices = [arguments.device] if arguments.device else timing.devices()
    if not set(devices) <= set(timing.devices()):
        sys.exit("pyreid bench: --device cuda: torch sees no CUDA device")
    try:
        return run.run(
            arguments.ops or known,
            devices,
            quick=arguments.quick,
            json_file=arguments.json,
            html_file=arguments.html,
            compare_file=arguments.compare,
            resume=arguments.resume,
            limit=arguments.limit,
        )
    except (ValueError, OSError) as error:
        print(f"pyreid bench: {error}", file=sys.stderr)
        return 2


def _demo(arguments) -> int:
    from pyreid import demo

    return demo.main(arguments.output, arguments.method)


def _train(command, rest) -> int:
    try:
        from pyreid.commands import meshes, training
    except ImportError as error:
        print(f"pyreid {command}: {error}; pip install 'pyreid[train]'", file=sys.stderr)
        return 2
    return meshes.main(rest) if command == "mesh" else training.main(command, rest)


def _on_files(arguments) -> int:
    from pyreid.commands import features

    try:
        return getattr(features, arguments.command)(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"pyreid {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
