"""Other libraries as contenders: which are here, in what versions, with as many threads as ours."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyreid import get_num_threads

# What a contender's name says -> the distributions that may be it. The first that is here counts.
LIBRARIES = {
    "faiss-cpu": ("faiss-cpu",),
    "scikit-learn": ("scikit-learn",),
    "SciPy": ("scipy",),
    "NumPy": ("numpy",),
    "torch": ("torch",),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "cuVS": ("cuvs-cu13", "cuvs-cu12", "cuvs"),
    "cuML": ("cuml-cu13", "cuml-cu12", "cuml"),
}
_MODULES = {"faiss-cpu": "faiss", "scikit-learn": "sklearn", "SciPy": "scipy"}


def versions() -> dict[str, str]:
    found = {}
    for library, names in LIBRARIES.items():
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(library, importlib.metadata.version(name))
    return found


def libraries_of(contender: str) -> list[str]:
    """Those whose speed a contender's is; a contender that names none is torch's."""
    named = [name for name in LIBRARIES if re.search(rf"(?<!\w){name}(?!\w)", contender)]
    return named or ["torch"]


def with_versions(contender: str, known: Mapping[str, str]) -> str:
    """A contender's name, with the versions of the libraries it names."""
    for library in LIBRARIES:
        if library in known:
            contender = re.sub(
                rf"(?<![\w.]){library}(?![\w.])", f"{library} {known[library]}", contender
            )
    return contender


def are_here(*libraries: str) -> bool:
    modules = [_MODULES.get(name, name.lower()) for name in libraries]
    return all(importlib.util.find_spec(module) is not None for module in modules)


@functools.cache
def set_threads() -> None:
    """scikit-learn's, SciPy's, NumPy's and faiss's loops and products: as many as ours."""
    threads = get_num_threads()
    if are_here("faiss-cpu"):
        import faiss

        faiss.omp_set_num_threads(threads)
    if importlib.util.find_spec("threadpoolctl"):  # comes with scikit-learn
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)


def compiled(
    device: str, baselines: Mapping[str, Callable[..., Any]], *, wanted: bool = True
) -> dict[str, Any]:
    """On CUDA, and where wanted, torch functions as torch.compile makes them, beside themselves."""
    if device == "cpu" or not wanted:
        return dict(baselines)
    return dict(baselines) | {
        f"{name}, torch.compile": _Compiled(call) for name, call in baselines.items()
    }


class _Compiled:
    """Compiled when first called, for the sizes of that call. What was compiled for other sizes is forgotten:
    beyond some sizes of one function, torch would no longer compile, and not say so."""

    def __init__(self, call: Callable[..., Any]):
        self._call, self._made = call, None

    def __call__(self, *arguments: Any) -> Any:
        if self._made is None:
            torch.compiler.reset()
            self._made = torch.compile(self._call, dynamic=False)
        return self._made(*arguments)


def searches(device: str, k: int) -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """Exact search by inner product: (queries, rows) -> scores and rows, both (B, k), best first."""
    found = {}
    if device == "cpu" and are_here("faiss-cpu"):
        found["faiss-cpu"] = functools.partial(_faiss, k=k)
    if device == "cuda" and are_here("cuVS", "CuPy"):
        found["cuVS"] = functools.partial(_cuvs, k=k)
    if device == "cuda" and are_here("CuPy"):
        found["CuPy"] = functools.partial(_cupy, k=k)
    return found


def _faiss(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import faiss

    set_threads()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows.numpy())
    scores, found = index.search(queries.numpy(), k)
    return torch.from_numpy(scores), torch.from_numpy(found)


def _cuvs(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import cupy
    from cuvs.neighbors import brute_force

    index = brute_force.build(cupy.from_dlpack(rows), metric="inner_product")
    scores, found = brute_force.search(index, cupy.from_dlpack(queries), k)
    return torch.from_dlpack(cupy.asarray(scores)), torch.from_dlpack(cupy.asarray(found))


def _cupy(queries: torch.Tensor, rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import cupy

    own, panels = cupy.from_dlpack(rows), []
    for panel in queries.split(1024):
        scores = cupy.from_dlpack(panel) @ own.T
        best = cupy.argpartition(-scores, k, axis=1)[:, :k]
        order = cupy.argsort(-cupy.take_along_axis(scores, best, axis=1), axis=1)
        best = cupy.take_along_axis(best, order, axis=1)
        panels.append((cupy.take_along_axis(scores, best, axis=1), best))
    scores, found = (cupy.concatenate(parts) for parts in zip(*panels, strict=True))
    return torch.from_dlpack(scores), torch.from_dlpack(found)
