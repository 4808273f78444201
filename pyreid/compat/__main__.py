"""`python -m pyreid.compat PROJECT SCRIPT [ARGS...]`: a script as it is, on our ops."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from pyreid.compat import patch, projects


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pyreid.compat",
        description="Runs a training script, unmodified, on pyreid's ops.",
        epilog=f"Projects: {', '.join(projects())}.",
    )
    parser.add_argument("--dense", action="store_true", help="hand on N x N arrays, as theirs")
    parser.add_argument("--quiet", action="store_true", help="do not say what is replaced")
    parser.add_argument("--package", metavar="NAME", help="of a fork with the project's modules")
    parser.add_argument("project")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(arguments)
    try:
        how = {"sparse": not options.dense, "quiet": options.quiet, "package": options.package}
        patched = patch(options.project, **how)
    except ValueError as error:
        parser.error(str(error))
    before = sys.argv[:], sys.path[:]
    sys.argv = [options.script, *options.args]
    sys.path[0:0] = [str(Path(options.script).resolve().parent)]
    try:
        runpy.run_path(options.script, run_name="__main__")
    finally:
        if not patched.reached and not options.quiet:
            print(
                f"pyreid.compat: the script imported nothing of {patched.project} that is replaced",
                file=sys.stderr,
            )
        patched.undo()
        sys.argv, sys.path[:] = before


if __name__ == "__main__":
    main()
