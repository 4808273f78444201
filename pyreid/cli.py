"""The command `pyreid`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pyreid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what was built, what is here, whether they fit")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="time the ops against what else one would run")
    bench.add_argument("ops", nargs="*", metavar="OP", help="which ops (default: all)")
    bench.add_argument("--quick", action="store_true", help="fewer sizes, shorter runs")
    bench.add_argument("--device", choices=["cpu", "cuda"], help="default: all that are here")
    bench.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="the ops at work on made-up data, on the CPU")
    demo.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


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
    run.run(arguments.ops or known, devices, quick=arguments.quick, json_file=arguments.json)
    return 0


def _demo(arguments) -> int:
    from pyreid import demo

    return demo.main()


if __name__ == "__main__":
    sys.exit(main())
