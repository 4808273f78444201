"""Kernels and trainers for unsupervised person re-identification.

`from pyreid import ops` is where to start. Importing `pyreid` itself loads nothing and prints nothing.
"""

try:
    from pyreid._build import VERSION as __version__
except ModuleNotFoundError:
    raise ImportError(
        "pyreid is not built in this folder: run `pip install -e .` (or `make build`) there, or start "
        "Python elsewhere to get the installed one"
    ) from None

__all__ = ["__version__", "debug", "get_num_threads", "set_num_threads"]


def debug(enabled: bool = True):
    """Checks array values that CUDA ops otherwise skip in silence, such as a row out of range.

    Each such check waits for the device. Takes effect at once; as a context manager, ends with its block:
    `with pyreid.debug(): ...`.
    """
    from pyreid import _native

    return _native.Debug(enabled)


def set_num_threads(threads: int) -> None:
    """Sets how many CPU threads an op may use (default: OMP_NUM_THREADS, else the usable cores)."""
    from pyreid import _native

    if threads < 1:
        raise ValueError(f"set_num_threads: threads must be at least 1, got {threads}")
    _native.cpu().set("threads", threads)


def get_num_threads() -> int:
    """How many CPU threads an op may use."""
    from pyreid import _native

    return _native.cpu().get("threads")
