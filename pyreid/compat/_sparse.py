"""What stands in for an N x N array of distances on its way to DBSCAN: a sparse graph that NumPy's functions
take, and a DBSCAN that takes it."""

from __future__ import annotations

import copy
import importlib
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from pyreid import _native, ops


class SparseDistance:
    """A `Graph` of all pairs nearer than 1 in the place of the (N, N) float32 array: nothing is lost.

    `DBSCAN` of this module and `ops.dbscan` take it as it is; so does the rule that GCL, MMT and JVTC have
    for eps, written with `np.triu`, `np.nonzero` and `np.sort`. Whatever else asks for an array gets the
    dense one, at its cost: `np.asarray(distance)`, `distance[rows]`, other functions of NumPy.
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, graph: ops.Graph):
        self.graph = graph
        # What ops read of a graph.
        self.indptr, self.indices, self.distances = graph.indptr, graph.indices, graph.distances
        self.shape = graph.shape
        self.max_distance = graph.max_distance

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the graph."""
        return sum(_native.to_numpy(part).nbytes for part in self.graph[:3])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        pairs = len(self.indices)
        return f"SparseDistance(shape={self.shape}, {pairs} pairs, {self.nbytes / 1e6:.1f} MB)"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("SparseDistance: copy must not be False: a dense array is made")
        self._refuse_if_cut()
        rows, columns, values = self._entries()
        dense = np.ones(self.shape, np.float32)
        dense[rows, columns] = values
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.triu and args[0] is self and (*args[1:], *kwargs.values()) == (1,):
            return _UpperTriangle(self)
        return _on_arrays(function, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        try:
            row = operator.index(key)
        except TypeError:
            return np.asarray(self)[key]
        self._refuse_if_cut()
        row = range(len(self))[row]
        first, last = (int(self.indptr[place]) for place in (row, row + 1))
        dense = np.ones(len(self), np.float32)
        dense[_native.to_numpy(self.indices[first:last])] = _native.to_numpy(
            self.distances[first:last]
        )
        return dense

    def numpy(self) -> SparseDistance:
        """Itself: MMT's scripts expect a tensor, and call this before NumPy's functions."""
        return self

    def _refuse_if_cut(self) -> None:
        if self.max_distance is not None and self.max_distance < 1:
            raise ValueError(
                f"SparseDistance: max_distance must be None for a dense array, got {self.max_distance}"
            )

    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr, columns, values = (_native.to_numpy(part) for part in self.graph[:3])
        return np.repeat(np.arange(len(self)), np.diff(indptr)), columns, values


class _UpperTriangle:
    """np.triu(distance, 1), of which `triangle[np.nonzero(triangle)]` is all that is wanted."""

    def __init__(self, whole: SparseDistance):
        self.whole = whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        dense = np.triu(np.asarray(self.whole), 1)
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.nonzero:
            return _NonZero(self)
        return _on_arrays(function, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, _NonZero) and key.triangle is self:
            return _Values(self)
        return np.asarray(self)[key]


class _NonZero:
    """The places of a triangle's entries that are not 0, to index it with; as a tuple, those of the dense."""

    def __init__(self, triangle: _UpperTriangle):
        self.triangle = triangle

    def __iter__(self) -> Any:
        return iter(np.nonzero(np.asarray(self.triangle)))


class _Values:
    """`triangle[np.nonzero(triangle)]`, or that sorted, of which the first few are all that is wanted."""

    dtype = np.dtype(np.float32)
    ndim = 1

    def __init__(self, triangle: _UpperTriangle):
        self.triangle = triangle
        self.ascending = False
        triangle.whole._refuse_if_cut()
        rows, columns, values = triangle.whole._entries()
        values = values[columns > rows]
        count = len(triangle.whole)
        self._ones = count * (count - 1) // 2 - len(values)  # pairs that are not stored
        self._stored = values[values != 0]

    @property
    def size(self) -> int:
        return len(self._stored) + self._ones

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)

    def __len__(self) -> int:
        return self.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.ascending:
            dense = self[: self.size]
        else:
            dense = np.asarray(self.triangle)
            dense = dense[np.nonzero(dense)]
        return dense if dtype is None else dense.astype(dtype, copy=False)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.sort and args[0] is self:
            ordered = copy.copy(self)
            ordered.ascending = True
            return ordered
        return _on_arrays(function, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        if not (self.ascending and isinstance(key, slice) and (key.step or 1) > 0):
            return np.asarray(self)[key]
        start, stop, step = key.indices(self.size)
        smallest = self._stored
        if 0 < stop < len(smallest):
            smallest = np.partition(smallest, stop - 1)
        ones = np.ones(max(stop - len(smallest), 0), np.float32)
        return np.concatenate([np.sort(smallest[:stop]), ones])[start::step]


def _on_arrays(function: Callable, args: Any, kwargs: Any) -> Any:
    def dense(value: Any) -> Any:
        if isinstance(value, (SparseDistance, _UpperTriangle, _Values)):
            return np.asarray(value)
        return type(value)(map(dense, value)) if type(value) in (list, tuple) else value

    return function(*dense(tuple(args)), **{name: dense(value) for name, value in kwargs.items()})


class DBSCAN:
    """scikit-learn's DBSCAN, whose constructor and results it has, on `ops.dbscan` for precomputed distances:
    an (N, N) array, or a SparseDistance. Labels are scikit-learn's, number for number. Anything else goes to
    scikit-learn.

    Attributes after `fit`: labels_ (N,) int64, core_sample_indices_.
    """

    def __init__(
        self,
        eps: float = 0.5,
        *,
        min_samples: int = 5,
        metric: Any = "euclidean",
        metric_params: dict | None = None,
        algorithm: str = "auto",
        leaf_size: int = 30,
        p: float | None = None,
        n_jobs: int | None = None,
    ):
        self.eps = eps
        self.min_samples = min_samples
        self.metric = metric
        self.metric_params = metric_params
        self.algorithm = algorithm
        self.leaf_size = leaf_size
        self.p = p
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DBSCAN:
        distance = self._distance(X) if sample_weight is None else None
        if distance is None:
            # By the module that defines it: the other name may be ours.
            theirs = importlib.import_module("sklearn.cluster._dbscan").DBSCAN
            fitted = theirs(**self.get_params()).fit(X, y, sample_weight=sample_weight)
            self.labels_, self._core = fitted.labels_, fitted.core_sample_indices_
            return self
        self.labels_ = _native.to_numpy(ops.dbscan(distance, float(self.eps), self.min_samples))
        self._core, self._fitted = None, distance
        if not isinstance(distance, SparseDistance):
            _ = self.core_sample_indices_  # now: a dense array is not to be kept for it
        return self

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> np.ndarray:
        return self.fit(X, y, sample_weight).labels_

    @property
    def core_sample_indices_(self) -> np.ndarray:
        if self._core is None:
            near = self._neighbours(self._fitted)
            self._core = np.flatnonzero(near >= self.min_samples)
            del self._fitted
        return self._core

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        names = ("eps", "min_samples", "metric", "metric_params", "algorithm", "leaf_size", "p")
        return {name: getattr(self, name) for name in (*names, "n_jobs")}

    def set_params(self, **params: Any) -> DBSCAN:
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"DBSCAN: parameter must be one of its own, got {name!r}")
            setattr(self, name, value)
        return self

    def _distance(self, X: Any) -> Any:
        """What ops.dbscan takes, or None: scikit-learn's."""
        if self.metric != "precomputed":
            if isinstance(X, SparseDistance):
                raise ValueError(
                    f"DBSCAN: metric must be 'precomputed' for distances, got {self.metric!r}"
                )
            return None
        if isinstance(X, SparseDistance):
            # From 1 on, pairs that the graph does not store are neighbours, too.
            return X if self.eps < 1 else np.asarray(X)
        plain = isinstance(X, np.ndarray) and X.dtype in (np.float32, np.float64)
        return np.ascontiguousarray(X) if plain else None

    def _neighbours(self, distance: Any) -> np.ndarray:
        if not isinstance(distance, SparseDistance):
            eps = distance.dtype.type(self.eps)
            blocks = (distance[first : first + 1024] for first in range(0, len(distance), 1024))
            counts = [np.count_nonzero(block <= eps, axis=1) for block in blocks]
            return np.concatenate([np.zeros(0, np.int64), *counts])
        rows, columns, values = distance._entries()
        size = len(distance)
        near = np.bincount(rows[values <= np.float32(self.eps)], minlength=size)
        itself = np.bincount(rows[rows == columns], minlength=size)
        return near + (itself == 0)
