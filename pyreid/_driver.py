"""What the CUDA driver says about this machine, read from the driver itself: no torch, no toolkit.

The build reads this file by its path, so it imports nothing but the standard library.
"""

import ctypes
from typing import NamedTuple

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class Device(NamedTuple):
    """One GPU: its name and compute capability, (9, 0) for an H100."""

    name: str
    capability: tuple[int, int]


class Driver(NamedTuple):
    """The CUDA version a driver supports, (13, 0), its own release if known, and its GPUs."""

    cuda: tuple[int, int]
    release: str | None
    devices: tuple[Device, ...]
    error: str | None  # why the devices could not be listed


def query() -> Driver | None:
    """The driver here, or None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    cuda = (version.value // 1000, version.value % 1000 // 10)
    code = library.cuInit(0)
    error = None if code in (0, _NO_DEVICE) else f"the driver failed to start (cuInit: {code})"
    devices = _devices(library) if code == 0 else ()
    return Driver(cuda, _release(), devices, error)


def _devices(library: ctypes.CDLL) -> tuple[Device, ...]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    return tuple(_device(library, ordinal) for ordinal in range(count.value))


def _device(library: ctypes.CDLL, ordinal: int) -> Device:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(handle), ordinal)
    library.cuDeviceGetName(name, len(name), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    return Device(name.value.decode(), (attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)))


def _release() -> str | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0:
        return None
    known = library.nvmlSystemGetDriverVersion(text, len(text)) == 0
    library.nvmlShutdown()
    return text.value.decode() if known else None
