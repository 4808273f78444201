"""The fixture `library`: every array library on every floor that this machine has; the rest skip. And
`processes`, to start some."""

import contextlib
import importlib.util
import multiprocessing
import os
import sys
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from hypothesis import settings

from pyreid import _native

settings.register_profile("pyreid", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("pyreid")


class Library:
    """Arrays of one library on one floor: there and back."""

    def __init__(self, name, to, back, floor="cpu"):
        self.name, self._to, self.back, self.floor = name, to, back, floor

    def __call__(self, array, dtype=None):
        """A copy of `array` (NumPy), as this library's; `dtype` by name, "bfloat16" included."""
        return self._to(np.asarray(array), dtype)

    @property
    def half_precisions(self):
        return ("float16", "bfloat16") if self.name.startswith("torch") else ("float16",)


def _torch_on(device):
    def to(array, dtype):
        tensor = torch.tensor(array, device=device)
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def back(tensor):
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()

    return to, back


def _numpy(array, dtype):
    return np.array(array, dtype=dtype or array.dtype)


def _cupy(array, dtype):
    import cupy

    return cupy.array(array, dtype=dtype or array.dtype)


def _no_cuda():
    if _native.cuda_error() is not None:
        return f"no CUDA floor: {_native.cuda_error()}"
    return None if torch.cuda.is_available() else "no CUDA device here"


def _make(name):
    """The library called `name`, or skips with the reason."""
    kind, place = name.split("-", 1)
    if place in ("cuda", "cuda:1") and (reason := _no_cuda()):
        pytest.skip(reason)
    if kind == "cupy" and not importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is not installed")
    if place == "emulated" and not importlib.util.find_spec("pyreid._emulated"):
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    if kind == "torch":
        return Library(name, *_torch_on("cpu" if place == "emulated" else place), floor=place)
    if kind == "cupy":
        return Library(name, _cupy, lambda array: array.get(), floor="cuda")
    return Library(name, _numpy, np.asarray, floor=place)


HOST = ["numpy-cpu", "torch-cpu"]
DEVICE = ["torch-cuda", "cupy-cuda"]
EMULATED = [f"numpy-emulated-{schedule}" for schedule in _native.SCHEDULES]


@pytest.fixture(params=HOST + EMULATED + DEVICE)
def library(request):
    kind, place, *schedule = request.param.split("-")
    made = _make(f"{kind}-{place}")
    with _native.emulated(*schedule, seed=1) if schedule else contextlib.nullcontext():
        yield made


@pytest.fixture(params=["torch-cpu", "torch-emulated", "torch-cuda"])
def torch_library(request):
    """The floors as torch sees them, for autograd, compilation and the like."""
    made = _make(request.param)
    with _native.emulated() if made.floor == "emulated" else contextlib.nullcontext():
        yield made


@pytest.fixture
def cuda():
    """A CUDA device with the CUDA floor, or a skip that says what is missing."""
    if reason := _no_cuda():
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture
def emulator():
    if not importlib.util.find_spec("pyreid._emulated"):
        pytest.skip("the emulator is not built (PYREID_EMULATED=1)")
    with _native.emulated() as module:
        yield module


@pytest.fixture(scope="session")
def processes():
    """Processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "test_scl"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context
