"""CMC, AP and INP as torchreid counts them, and those who have its code: fast-reid, reid-strong-baseline."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pyreid.ops import ranking

_TRIALS = 10


class Ranked(NamedTuple):
    cmc: np.ndarray  # (R,) float32
    ap: np.ndarray  # (V,) float32, of the queries that have a match, in their order
    inp: np.ndarray  # (V,) float32


def ranked(
    where: str,
    distmat: Any,
    pids: tuple[Any, Any],
    camids: tuple[Any, Any],
    max_rank: int,
    *,
    single_shot: bool = False,
) -> Ranked:
    """`ops.evaluate_ranking` by these projects' conventions.

    Every id is a person, -1 too, where the op knows junk. `max_rank` is at most the size of the gallery.
    Distances become float32, as in the projects' own Cython. AssertionError where no query has a match.

    Args:
        distmat: (Q, G), array or tensor. pids, camids: of queries and of the gallery, arrays, tensors or
            lists of any integers.
        single_shot: CMC by CUHK03's first protocol, the mean of ten trials in each of which the gallery has
            one image per person, drawn by NumPy's global generator: the same draws, in the same order, as
            the projects' own loops take. AP and INP are of the whole gallery.
    """
    distance = _distances(where, distmat)
    count, size = distance.shape
    people = _numbered(where, "pids", pids, (count, size))
    cameras = _numbered(where, "camids", camids, (count, size))
    longest = min(max_rank, size)
    if not (count and size):
        raise AssertionError(f"{where}: no query has a match in the gallery")
    ids = tuple(_beside(distance, numbers) for numbers in (*people, *cameras))
    first, ap, inp = ranking.matches(None, None, ids, distance, longest)
    valid = _numpy(first) > 0
    if not valid.any():
        raise AssertionError(f"{where}: no query has a match in the gallery")
    if single_shot:
        cmc = _single_shot(_numpy(distance), people, cameras, valid, longest)
    else:
        cmc = _numpy(ranking.summary(first, ap, inp, longest).cmc)
    return Ranked(cmc, _numpy(ap)[valid], _numpy(inp)[valid])


def _single_shot(
    distance: np.ndarray, people: tuple, cameras: tuple, valid: np.ndarray, max_rank: int
) -> np.ndarray:
    total = np.zeros(0)
    for query in np.flatnonzero(valid):
        order = np.argsort(distance[query], kind="stable")
        own = people[1][order] == people[0][query]
        order = order[~own | (cameras[1][order] != cameras[0][query])]
        _, begin, person, images = np.unique(
            people[1][order], return_index=True, return_inverse=True, return_counts=True
        )
        nearest = np.argsort(begin)  # persons as they appear, which is how they are drawn
        places = np.argsort(
            person, kind="stable"
        )  # of a person's images in the order, all together
        starts = np.cumsum(images) - images
        drawn = np.random.randint(0, np.broadcast_to(images[nearest], (_TRIALS, len(images))))
        drawn = places[starts[nearest] + drawn]  # (trials, persons)
        mine = people[1][order[begin[nearest]]] == people[0][query]
        ranks = (drawn < drawn[:, mine]).sum(axis=1)
        hits = np.bincount(ranks, minlength=len(images))[:max_rank].cumsum() / _TRIALS
        total = total + hits if len(total) else hits
    return (total / valid.sum()).astype(np.float32)


def _distances(where: str, distmat: Any) -> Any:
    if isinstance(distmat, torch.Tensor):
        distmat = distmat.detach().float().contiguous()
    else:
        distmat = np.ascontiguousarray(distmat, np.float32)
    if distmat.ndim != 2:
        raise ValueError(f"{where}: distmat must have shape (Q, G), got {tuple(distmat.shape)}")
    return distmat


def _numbered(
    where: str, name: str, sides: tuple[Any, Any], sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of queries and gallery as int64 from 0 on."""
    arrays = []
    for side, prefix, size in zip(sides, "qg", sizes, strict=True):
        array = _numpy(side) if isinstance(side, torch.Tensor) else np.asarray(side)
        if array.shape != (size,):
            raise ValueError(
                f"{where}: {prefix}_{name} must have shape ({size},), got {array.shape}"
            )
        arrays.append(array)
    _, codes = np.unique(np.concatenate(arrays), return_inverse=True)
    return codes[: sizes[0]].astype(np.int64), codes[sizes[0] :].astype(np.int64)


def _beside(distance: Any, numbers: np.ndarray) -> Any:
    if isinstance(distance, torch.Tensor):
        return torch.from_numpy(numbers).to(distance.device)
    return numbers


def _numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
