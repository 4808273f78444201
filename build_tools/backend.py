"""The build backend: setuptools, and nvcc as a package where it is needed.

pip asks a backend what a build requires before it makes the build's environment. So a machine
with g++ and pip alone gets the CUDA kernels too.
"""

import os
import shutil

import native
import toolkit
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *nvcc_packages()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *nvcc_packages()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with native.locked(toolkit.ROOT / "build" / ".lock"):
        # setuptools packs all it finds in build/lib*, also what an earlier build left there.
        for folder in (toolkit.ROOT / "build").glob("lib*"):
            shutil.rmtree(folder)
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with native.locked(toolkit.ROOT / "build" / ".lock"):
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def nvcc_packages() -> list[str]:
    try:
        return toolkit.requirements(os.environ, toolkit.load_driver())
    except toolkit.ToolkitError as error:
        raise SystemExit(f"pyreid: {error}") from None
