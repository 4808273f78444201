"""The floors (native modules), and all that pyreid knows of array libraries."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

# --- floors ---------------------------------------------------------------------------------------


@functools.cache
def cpu_variant() -> str:
    """Name of the build of the CPU floor that suits this machine (PYREID_CPU overrides it)."""
    chosen = os.environ.get("PYREID_CPU")
    if chosen:
        return chosen
    level = importlib.import_module("pyreid._cpu").get("instruction_level")
    for candidate in range(level, 1, -1):
        name = f"_cpu_v{candidate}"
        if importlib.util.find_spec(f"pyreid.{name}"):
            return name
    return "_cpu"


@functools.cache
def cpu() -> ModuleType:
    return importlib.import_module(f"pyreid.{cpu_variant()}")


@functools.cache
def cuda() -> ModuleType:
    reason = cuda_error()
    if reason is not None:
        raise RuntimeError(
            f"pyreid: these arrays live in CUDA memory, but there is no CUDA floor: {reason}. "
            "`python -m pyreid.info` shows what is here"
        )
    return importlib.import_module("pyreid._cuda")


@functools.cache
def cuda_error() -> str | None:
    """Why the CUDA floor cannot be used, or None."""
    try:
        importlib.import_module("pyreid._cuda")
    except ImportError as error:
        if importlib.util.find_spec("pyreid._cuda") is not None:
            return f"it was built but failed to load ({error})"
        try:
            build = importlib.import_module("pyreid._build")
        except ImportError:
            return "it was not built"
        return f"it was not built ({build.NO_CUDA_REASON})"
    return None


_emulator: ModuleType | None = None  # stands in for the CPU floor while emulated() is on

SCHEDULES = ("in_order", "reversed", "shuffled")


@contextlib.contextmanager
def emulated(schedule: str = "in_order", seed: int = 0):
    """Runs ops on CPU arrays through the CUDA kernels, executed thread by thread on the CPU (tests)."""
    global _emulator
    module = importlib.import_module("pyreid._emulated")
    module.set("schedule", SCHEDULES.index(schedule))
    module.set("seed", seed)
    before, _emulator = _emulator, module
    try:
        yield module
    finally:
        _emulator = before


# --- array libraries ------------------------------------------------------------------------------

try:  # private, but an order of magnitude quicker than building a torch.cuda.Stream to ask it
    _torch_stream = torch._C._cuda_getCurrentRawStream
except AttributeError:

    def _torch_stream(device: int) -> int:
        return torch.cuda.current_stream(device).cuda_stream


class _HasShape(Protocol):
    @property
    def shape(self) -> Any: ...


Array = TypeVar("Array", bound=_HasShape)  # of torch, CuPy or NumPy: what comes in is what goes out


def is_torch(array: Any) -> bool:
    return isinstance(array, torch.Tensor)


def is_cupy(array: Any) -> bool:
    return type(array).__module__.split(".", 1)[0] == "cupy"


def on_cuda(array: Any) -> bool:
    if is_torch(array):
        return array.is_cuda
    return is_cupy(array)


def floor(array: Any) -> tuple[ModuleType, int]:
    """The native module for the device of `array`, and that device's current stream."""
    if is_torch(array):
        if array.is_cuda:
            return cuda(), _torch_stream(array.get_device())
    elif is_cupy(array):
        return cuda(), importlib.import_module("cupy").cuda.get_current_stream(array.device.id).ptr
    return _emulator or cpu(), 0


def namespace(array: Any) -> ModuleType:
    """The library of `array`, for functions that torch, CuPy and NumPy call alike."""
    if is_torch(array):
        return torch
    return importlib.import_module("cupy") if is_cupy(array) else np


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array of the library and on the device of `like`."""
    if is_torch(like):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if is_cupy(like):
        cupy = importlib.import_module("cupy")
        with like.device:
            return cupy.empty(shape, dtype)
    return np.empty(shape, dtype)


def widened_half(array: Any) -> Any:
    """A float16 or bfloat16 array as float32; anything else as it is."""
    if str(getattr(array, "dtype", None)).removeprefix("torch.") not in ("float16", "bfloat16"):
        return array
    return array.float() if is_torch(array) else array.astype("float32")


def allocator(like: Any):
    """A function of a shape and a dtype that returns an uninitialised array beside `like`."""
    return functools.partial(empty, like)


def to_numpy(array: Any) -> np.ndarray:
    """Waits for the device."""
    if is_torch(array):
        return array.detach().cpu().numpy()
    return array.get() if is_cupy(array) else np.asarray(array)


def from_numpy(like: Any, values: np.ndarray) -> Any:
    """`values` in the library and on the device of `like`."""
    if is_torch(like):
        return torch.from_numpy(values).to(like.device)
    if is_cupy(like):
        with like.device:
            return importlib.import_module("cupy").asarray(values)
    return values


def scratch(like: Any):
    """A function of a number of bytes that returns scratch memory beside `like`."""
    return lambda size: empty(like, (size,), "uint8")


# --- debugging ------------------------------------------------------------------------------------

_debug = False


class Debug(contextlib.AbstractContextManager):
    def __init__(self, enabled: bool):
        global _debug
        self.before, _debug = _debug, enabled

    def __exit__(self, *_) -> None:
        global _debug
        _debug = self.before


def checks_values(array: Any) -> bool:
    """Whether values of `array` that the native floor would skip in silence are to be looked at."""
    return _debug and (on_cuda(array) or _emulator is not None)


def check_range(op: str, name: str, array: Any, low: float, high: float, *, closed: bool) -> None:
    """Under debug(), a ValueError for a value of a CUDA array outside [low, high) or [low, high].

    On the CPU the native floor checks this itself, always.
    """
    if not checks_values(array) or 0 in array.shape:
        return
    smallest, largest = array.min().item(), array.max().item()
    if smallest < low or largest > high or (not closed and largest == high):
        bad = smallest if smallest < low else largest
        bracket = "]" if closed else ")"
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}{bracket}, got {bad}")


def check_norms(op: str, name: str, norms: Any) -> None:
    """Under debug(), a ValueError for a row of a CUDA array `name` whose norm is not finite; likewise."""
    if not checks_values(norms):
        return
    found = to_numpy(norms)
    (bad,) = np.nonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(
            f"{op}: {name} must have rows of finite norm, got {found[bad[0]]} in row {bad[0]}"
        )
