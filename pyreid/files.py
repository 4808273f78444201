"""Feature files: .npy, .npz, .pt and .mat in, .npy and .npz out."""

from __future__ import annotations

import contextlib
import os
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

READABLE = (".npy", ".npz", ".pt", ".pth", ".mat")
WRITABLE = (".npy", ".npz")

# What extractors call the features, for a file that holds several matrices.
_ANY = ("features", "feature", "feats", "feat", "embeddings")
FEATURES = (*_ANY, "gallery_f", "gf")
QUERIES = (*_ANY, "query_f", "qf", "queries")
GALLERY = (*_ANY, "gallery_f", "gf", "gallery")

_ROWS = 4096  # looked at together for values that are not finite


def read(path: Path) -> dict[str, Any]:
    """The arrays of a file (NumPy's, or tensors of a .pt) by key; "" is that of a bare array.

    Nothing in a file is executed: pickled objects are passed over in an .npz, refused in a .pt.
    """
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ValueError(f"{path}: name must end in {_either(READABLE)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if suffix == ".mat":
            found = _read_mat(path)
        elif suffix in (".npy", ".npz"):
            found = _read_numpy(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: must hold tensors only (torch.load with weights_only=True refuses it), or is corrupt"
        ) from None
    except ImportError:
        raise
    except Exception as error:  # readers differ in what a damaged file makes them raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason or "pickled" in reason:
            reason = "pickled objects are not read"
        raise ValueError(f"{path}: is corrupt or no {suffix} file: {reason}") from None
    arrays = dict(found.items()) if isinstance(found, dict) else {"": found}
    return {str(key): array for key, array in arrays.items() if _is_array(array)}


def matrix(path: Path, arrays: dict[str, Any], key: str | None, names: tuple[str, ...]) -> Any:
    """The (N, D) features among the `arrays` of a file, as a tensor: those called `key`; else the only matrix
    of floats, or the only one of `names`. float64 becomes float32; all values are finite."""
    if key is None:
        floats = {name: a for name, a in arrays.items() if _is_float(a) and len(a.shape) == 2}
        if "" in arrays or len(arrays) == 1:
            key = next(iter(arrays))
        elif len(floats) == 1:
            key = next(iter(floats))
        elif not floats:
            raise ValueError(f"{path}: must hold a matrix of floats, got {_listed(arrays)}")
        elif len(known := [name for name in names if name in floats]) != 1:
            raise ValueError(f"{path}: holds several matrices, name a key: {_listed(floats)}")
        else:
            key = known[0]
    array = _chosen(path, arrays, key)
    label = f"{path}: {key or 'the array'}"
    if len(array.shape) != 2:
        raise ValueError(f"{label} must have shape (N, D), got {tuple(array.shape)}")
    if not _is_float(array):
        raise ValueError(f"{label} must be of floats, got {array.dtype}")
    array = _tensor(array)
    array = (array.float() if array.dtype == torch.float64 else array).contiguous()
    for first in range(0, len(array), _ROWS):
        finite = array[first : first + _ROWS].isfinite().all(dim=1)
        if not finite.all():
            row = first + int(finite.logical_not().nonzero()[0])
            raise ValueError(f"{label} must be finite, got NaN or infinity in row {row}")
    return array


def ids(path: Path, arrays: dict[str, Any], key: str) -> Any:
    """The whole numbers called `key`, one per row, as an int64 tensor."""
    array = _tensor(_chosen(path, arrays, key)).flatten()
    whole = array.to(torch.int64)
    if not torch.equal(whole.to(array.dtype), array):
        raise ValueError(f"{path}: {key} must hold whole numbers, got others")
    return whole


def check_output(path: Path) -> None:
    """What would keep `write` from writing, before the long work."""
    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"{path}: name must end in {_either(WRITABLE)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path}: the folder {path.parent} cannot be written to")


def write(path: Path, name: str, array: np.ndarray, **more: Any) -> None:
    """`array` as .npy; or as .npz under `name`, `more` beside it. What was at `path` stays until all of the
    new file is on disk."""
    check_output(path)
    arrays: dict[str, Any] = {name: array, **more}
    with replacing(path) as file:
        if path.suffix.lower() == ".npy":
            np.save(file, array)
        else:
            np.savez(file, **arrays)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write what shall be at `path`; what was there stays until all of it is on disk."""
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_numpy(path: Path) -> Any:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    arrays = {}
    with loaded:
        for key in loaded.files:
            try:
                arrays[key] = loaded[key]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
    return arrays


def _read_mat(path: Path) -> Any:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ImportError(f"{path}: reading .mat files takes SciPy: pip install scipy") from None
    try:
        return loadmat(path, squeeze_me=True)  # MATLAB has no vectors, only narrow matrices
    except NotImplementedError:
        raise ValueError("it is of MATLAB 7.3; save it with -v7") from None


def _is_array(array: Any) -> bool:
    return isinstance(array, torch.Tensor) or (
        isinstance(array, np.ndarray) and array.dtype.kind in "fiub"
    )


def _is_float(array: Any) -> bool:
    if isinstance(array, torch.Tensor):
        return array.dtype.is_floating_point
    return array.dtype.kind == "f" and array.dtype.itemsize <= 8


def _tensor(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach()
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def _chosen(path: Path, arrays: dict[str, Any], key: str) -> Any:
    if key not in arrays:
        raise ValueError(f"{path}: has no key {key!r}, only {_listed(arrays)}")
    return arrays[key]


def _listed(arrays: dict[str, Any]) -> str:
    shown = (f"{key or 'a bare array'} {tuple(array.shape)}" for key, array in arrays.items())
    return ", ".join(shown) or "no array"


def _either(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
