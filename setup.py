"""Builds the native modules; all else is in pyproject.toml. How: build_tools/native.py."""

import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        "pyreid: building needs setuptools 77 or newer, and this is "
        f"{setuptools.__version__}. Build with isolation (plain pip install .), or run: "
        "pip install -U setuptools pybind11 ninja"
    )

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import native  # noqa: E402
import toolkit  # noqa: E402


class BuildNative(build_ext):
    """Which modules there are is decided when they are built, so the one declared is a stand-in."""

    def run(self):
        try:
            plan = toolkit.plan(os.environ, toolkit.load_driver(), sys.path)
            for line in summary(plan):
                print(f"pyreid: {line}", flush=True)
            modules = native.build(plan, os.environ)
        except toolkit.ToolkitError as error:
            raise SystemExit(f"pyreid: {error}") from None
        package = ROOT / "pyreid" if self.inplace else Path(self.build_lib) / "pyreid"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob(f"_*{native.SUFFIX}"):
            stale.unlink()
        self.installed = [package / file.name for file in modules.values()]
        for file, target in zip(modules.values(), self.installed, strict=True):
            shutil.copyfile(file, target)
        record = package / "_build.py"
        record.write_text(build_record(self.distribution.get_version(), plan, list(modules)))
        self.installed.append(record)

    def get_outputs(self):
        return [str(path) for path in self.installed]

    def get_output_mapping(self):
        return {}


def summary(plan):
    yield from plan.notes
    if plan.nvcc is None:
        yield f"building without CUDA: {plan.reason}."
        return
    names = [f"sm_{name}" for name in plan.architectures.sass]
    names += [f"PTX {name}" for name in plan.architectures.ptx]
    yield f"CUDA by nvcc {plan.nvcc.release} ({plan.nvcc.source}) for {', '.join(names)}"


def build_record(version, plan, modules):
    """pyreid/_build.py. It holds no time and no path: the same input gives the same file."""
    cuda = plan.nvcc is not None
    values = {
        "VERSION": version,
        "MODULES": tuple(modules),
        "CPU_VARIANTS": tuple(name for name in modules if name.startswith("_cpu")),
        "FLOORS": tuple(name for name in ("cpu", "cuda", "emulated") if f"_{name}" in modules),
        "COMPILER": native.compiler_release(os.environ),
        "CUDA_VERSION": plan.nvcc.release if cuda else None,
        "NVCC_SOURCE": plan.nvcc.source if cuda else None,
        "CUDA_SASS": plan.architectures.sass if cuda else (),
        "CUDA_PTX": plan.architectures.ptx if cuda else (),
        "NO_CUDA_REASON": plan.reason,
    }
    lines = ['"""What this build of pyreid holds. Written by setup.py."""', ""]
    return "\n".join([*lines, *(f"{name} = {value!r}" for name, value in values.items())]) + "\n"


setuptools.setup(
    ext_modules=[setuptools.Extension("pyreid._cpu", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
