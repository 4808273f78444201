"""Pairs of rows with a distance, as a sparse matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyreid import _native


class Graph(NamedTuple):
    """Compressed sparse rows; columns ascend within a row. Pairs that are not stored are at distance 1, or,
    if there is a max_distance below 1, somewhere beyond it."""

    indptr: Any  # (N + 1,) int64: row i is entries indptr[i], ..., indptr[i + 1] - 1
    indices: Any  # (entries,) int32
    distances: Any  # (entries,) float32
    shape: tuple[int, int]
    max_distance: float | None = None

    def to_scipy(self) -> Any:
        """As a scipy.sparse.csr_matrix. An entry with distance 0 stays an entry."""
        from scipy.sparse import csr_matrix

        parts = [_native.to_numpy(x) for x in (self.distances, self.indices, self.indptr)]
        return csr_matrix(tuple(parts), shape=self.shape)
