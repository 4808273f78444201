"""How good features are: extraction, retrieval by the papers' protocol, and clusters against known ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from pyreid import distributed, ops
from pyreid.data import Frames, Images, ReidData, Tracklets
from pyreid.data.batches import images_in_order
from pyreid.data.transforms import make
from pyreid.progress import Progress

Precision = Literal["float32", "bfloat16", "float16"]
Distances = Callable[..., Mapping[str, torch.Tensor]]

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHOWN_RANKS = (1, 5, 10)
_MOST_FRAMES = 900  # of a tracklet
_DISTANCES = 2**26  # between queries and gallery, held at a time


@torch.no_grad()
def extract(
    encoder: nn.Module,
    images: Images,
    *,
    height: int,
    width: int,
    batch_size: int = 256,
    flip: bool = False,
    device: torch.device | str | None = None,
    workers: int = 0,
    precision: Precision = "float32",
    progress: str | None = None,
) -> torch.Tensor:
    """The features of N images, in their order: (N, D) float32 of unit length, on the encoder's device.

    Under torch.distributed every process calls this, encodes its share, and gets all rows.

    Args:
        encoder: maps (B, 3, height, width) to (B, D), and (1, T, 3, height, width), for Tracklets, to (1, D).
            It is in eval mode meanwhile; afterwards each of its modules is in the mode it was in.
        images: resized and normalised, nothing else. Of a tracklet all frames take part, of very long ones
            900.
        flip: the mean of the features of an image and of its mirror image. Takes twice as long.
        device: where images are sent. Default: where the encoder's parameters are.
        workers: processes that load images; 0: this one does.
        precision: other than float32, that of autocast. Results are float32 anyway.
        progress: what to call this in a progress bar. Default: there is none.
    """
    if precision not in _AUTOCAST:
        raise ValueError(
            f"extract: precision must be one of {', '.join(_AUTOCAST)}, got {precision!r}"
        )
    if not len(images):
        raise ValueError("extract: images must hold at least one image, got none")
    if device is None:
        held = next(encoder.parameters(), None)
        device = held.device if held is not None else "cpu"
    device = torch.device(device)
    share = distributed.share(len(images))
    # A process without a share encodes an image all the same: it must know D when rows are gathered.
    rows = share or range(1)
    transform: Any = make("plain", height, width)
    if isinstance(images, Tracklets):  # of any lengths: one after another
        transform, batch_size = Frames(transform, _MOST_FRAMES, exactly=False), 1
    loaded = images_in_order(
        images.select(np.arange(rows.start, rows.stop)),
        transform=transform,
        batch_size=batch_size,
        workers=workers,
    )
    parts = []
    autocast = torch.autocast(device.type, _AUTOCAST[precision], precision != "float32")
    with (
        _evaluating(encoder),
        Progress(progress or "", len(rows), unit="images", quiet=progress is None) as bar,
    ):
        for batch in loaded:
            batch = batch.to(device, non_blocking=True)
            with autocast:
                features = _encoded(encoder, batch)
                if flip:
                    features = (features + _encoded(encoder, batch.flip(-1))) / 2
            parts.append(normalize(features))
            bar.advance(len(batch))
    features = distributed.gather_rows(torch.cat(parts)[: len(share)])
    # Looked at once, at the end, by every process: none is left waiting for one that has failed.
    if not (finite := features.isfinite().all(dim=1)).all():
        row = int(finite.logical_not().nonzero()[0])
        hint = "" if precision == "float32" else f"; precision is {precision}, try float32"
        raise ValueError(
            f"extract: features must be finite, got NaN or infinity for {images.names[row]} "
            f"(row {row}, {int((~finite).sum())} rows in all){hint}"
        )
    return features


def _encoded(encoder: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    features = encoder(batch)
    if not isinstance(features, torch.Tensor):
        raise ValueError(
            f"extract: encoder must return a tensor (B, D), got {type(features).__name__}"
        )
    if features.ndim != 2 or len(features) != len(batch):
        raise ValueError(
            f"extract: encoder must map {tuple(batch.shape)} to ({len(batch)}, D), "
            f"got {tuple(features.shape)}"
        )
    return features.float()


@contextmanager
def _evaluating(encoder: nn.Module) -> Iterator[None]:
    """Each module's own mode is put back: parts of an encoder may have been frozen in eval mode."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class CameraPairs(NamedTuple):
    """Retrieval from the gallery images of one camera, for the queries of one camera."""

    cameras: np.ndarray  # (C,) those of queries or gallery, ascending
    mAP: np.ndarray  # (C, C) float64, query camera x gallery camera; NaN where no query has a match
    rank1: np.ndarray  # likewise
    valid: np.ndarray  # (C, C) int64: the queries that have a match


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. Arrays are on the CPU, in the order of the queries."""

    ranking: ops.Ranking
    reranked: ops.Ranking | None
    camera_pairs: CameraPairs
    same_camera: bool = False  # whether images of the query's own camera count
    by_distance: Mapping[str, ops.Ranking] = field(default_factory=dict)  # of a method's own

    @property
    def mAP(self) -> float:
        return self.ranking.mAP

    @property
    def rank1(self) -> float:
        return float(self.ranking.cmc[0])

    def summary(self) -> str:
        """A table, in percent."""
        return summary({"": self})

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None stands where a number is not defined."""
        pairs = self.camera_pairs
        return {
            **_ranking_dict(self.ranking),
            "same_camera": self.same_camera,
            "reranked": None if self.reranked is None else _ranking_dict(self.reranked),
            "by_distance": {name: _ranking_dict(found) for name, found in self.by_distance.items()},
            "camera_pairs": {
                "cameras": pairs.cameras.tolist(),
                "mAP": [[_known(value) for value in row] for row in pairs.mAP.tolist()],
                "rank1": [[_known(value) for value in row] for row in pairs.rank1.tolist()],
                "valid": pairs.valid.tolist(),
            },
        }


def as_dict(result: Evaluation | Mapping[str, Any]) -> Mapping[str, Any]:
    """An Evaluation as plain values; plain values as they are."""
    return result.to_dict() if isinstance(result, Evaluation) else result


def summary(results: Mapping[str, Evaluation | Mapping[str, Any]]) -> str:
    """A table of several evaluations by name, in percent, for people to read."""
    names = [f"rank-{rank}" for rank in _SHOWN_RANKS]
    table = [("", "mAP", *names, "mINP", "queries")]
    for name, values, _ in lines_of(results):
        numbers = [values["mAP"], *(values[f"rank{rank}"] for rank in _SHOWN_RANKS), values["mINP"]]
        counts = f"{values['valid']:,} of {values['queries']:,}"
        table.append((name, *("-" if x is None else f"{100 * x:.1f}" for x in numbers), counts))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    texts = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]
    if any(not values["valid"] for _, values, _ in lines_of(results)):
        texts.append(
            "no query has a match; without same_camera, those of its own camera do not count"
        )
    return "\n".join(texts)


def lines_of(
    results: Mapping[str, Evaluation | Mapping[str, Any]],
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """(name, values, again) of every ranking there is; those of the same features by another distance (a
    method's own, re-ranked) follow the plain one."""
    for name, result in results.items():
        values = as_dict(result)
        yield name, values, False
        for distance, found in values.get("by_distance", {}).items():
            yield f"{name}, {distance}" if name else distance, found, True
        if values.get("reranked"):
            yield f"{name}, re-ranked" if name else "re-ranked", values["reranked"], True


def evaluate(
    query_features: torch.Tensor,
    gallery_features: torch.Tensor,
    query: Images,
    gallery: Images,
    *,
    rerank: bool = False,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    same_camera: bool = False,
    distances: Distances | None = None,
    max_rank: int = 50,
) -> Evaluation:
    """CMC, mAP and mINP by the single-query protocol (see `ops.evaluate_ranking`): gallery images with both
    the id and the camera of the query, and those with id -1, are left out.

    Args:
        query_features, gallery_features: (Q, D) and (G, D) unit rows, in the order of `query` and `gallery`.
        rerank: also rank by k-reciprocal re-ranking (`ops.rerank`), with `k1`, `k2` and `lambda_value`. Takes
            an array of (Q, G) float32.
        same_camera: images of the query's own camera count too: for sets whose cameras are not known.
        distances: a method's own: of the features and cameras of queries and gallery (Q, D), (G, D), (Q,),
            (G,), and of `query_frames` (Q,) and `gallery_frames` (G,) if it has such arguments, gives (Q, G)
            distances by name. The ranking of each is in `by_distance`.
        max_rank: the length of the CMC.
    """
    for name, features, images in (
        ("query_features", query_features, query),
        ("gallery_features", gallery_features, gallery),
    ):
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"evaluate: {name} must have shape ({len(images)}, D), got {tuple(features.shape)}"
            )
    device = query_features.device
    query_ids, gallery_ids, query_cameras, gallery_cameras = (
        torch.from_numpy(column).to(device)
        for column in (query.ids, gallery.ids, query.cameras, gallery.cameras)
    )
    seen_by = query_cameras, gallery_cameras
    if same_camera:
        query_cameras = torch.full_like(query_cameras, -1)  # a camera that no gallery image has

    def ranked(rows: Any, columns: Any, ranks: int, distance: torch.Tensor | None = None) -> Any:
        found = ops.evaluate_ranking(
            query_features[rows] if distance is None else None,
            gallery_features[columns] if distance is None else None,
            query_ids=query_ids[rows],
            gallery_ids=gallery_ids[columns],
            query_cameras=query_cameras[rows],
            gallery_cameras=gallery_cameras[columns],
            distance=distance,
            max_rank=ranks,
        )
        return found._replace(cmc=found.cmc.cpu(), ap=found.ap.cpu(), valid=found.valid.cpu())

    every = slice(None)
    ranking = ranked(every, every, max_rank)
    reranked = None
    if rerank:
        distance = ops.rerank(query_features, gallery_features, k1, k2, lambda_value)
        reranked = ranked(every, every, max_rank, distance)

    parts: dict[str, list[ops.Ranking]] = {}
    if distances is not None:
        timed = "query_frames" in inspect.signature(distances).parameters
        when = [torch.from_numpy(images.frames).to(device) for images in (query, gallery)]
        some = max(_DISTANCES // max(len(gallery), 1), 1)  # queries at a time
        for first in range(0, len(query), some):
            block = slice(first, first + some)
            beside = {"query_frames": when[0][block], "gallery_frames": when[1]} if timed else {}
            own = distances(
                query_features[block], gallery_features, seen_by[0][block], seen_by[1], **beside
            )
            for name, found in own.items():
                parts.setdefault(name, []).append(ranked(block, every, max_rank, found))
    by_distance = {name: _joined(found) for name, found in parts.items()}

    cameras = np.union1d(query.cameras, gallery.cameras)
    rows_of = [torch.from_numpy(np.flatnonzero(query.cameras == c)).to(device) for c in cameras]
    columns_of = [
        torch.from_numpy(np.flatnonzero(gallery.cameras == c)).to(device) for c in cameras
    ]
    pairs = CameraPairs(
        cameras,
        np.full((len(cameras),) * 2, np.nan),
        np.full((len(cameras),) * 2, np.nan),
        np.zeros((len(cameras),) * 2, np.int64),
    )
    for j, columns in enumerate(columns_of):
        for i, rows in enumerate(rows_of):
            if not len(rows) or not len(columns):
                continue
            found = ranked(rows, columns, 1)
            pairs.mAP[i, j], pairs.rank1[i, j] = found.mAP, found.cmc[0]
            pairs.valid[i, j] = int(found.valid.sum())
    return Evaluation(ranking, reranked, pairs, same_camera, by_distance)


def _joined(parts: Sequence[ops.Ranking]) -> ops.Ranking:
    """The ranking of all queries from those of some at a time."""
    valid = torch.cat([part.valid for part in parts])
    total = int(valid.sum())

    def mean(name: str) -> Any:
        if not total:
            return getattr(parts[0], name)
        weighted = ((int(part.valid.sum()), getattr(part, name)) for part in parts)
        return sum(count * value for count, value in weighted if count) / total

    ap = torch.cat([part.ap for part in parts])
    return ops.Ranking(mean("cmc"), mean("mAP"), mean("mINP"), ap, valid)


def extract_data(
    encoder: nn.Module,
    data: ReidData,
    subsets: Sequence[str] = ("train", "query", "gallery"),
    *,
    progress: bool = False,
    **extraction: Any,
) -> dict[str, torch.Tensor]:
    """The features of those of the `subsets` that a data set has, by name; `extraction` as for `extract`."""
    return {
        name: extract(encoder, images, progress=name if progress else None, **extraction)
        for name, images in data.subsets.items()
        if name in subsets and len(images)
    }


def evaluate_data(
    encoder: nn.Module,
    data: ReidData,
    *,
    rerank: bool = False,
    same_camera: bool = False,
    distances: Distances | None = None,
    progress: bool = False,
    **extraction: Any,
) -> Evaluation:
    """Query and gallery of a data set: `extract` (with `height`, `width` and what else there is), then
    `evaluate`."""
    query, gallery = data.query, data.gallery
    if query is None or gallery is None or not len(query) or not len(gallery):
        raise ValueError(f"evaluate_data: data must have query and gallery images, got {data.name}")
    found = extract_data(encoder, data, ("query", "gallery"), progress=progress, **extraction)
    return evaluate(
        found["query"],
        found["gallery"],
        query,
        gallery,
        rerank=rerank,
        same_camera=same_camera,
        distances=distances,
    )


def cluster_quality(labels: Any, ids: Any) -> dict[str, int | float | None]:
    """What clusters look like, and how well they are those of known ids.

    Args:
        labels: (N,) clusters; -1 where a sample is in none.
        ids: (N,) identities; -1 where not known. Samples without one count in the first line below only.

    Returns:
        images, clusters, outliers, largest: counts. If no id is known, there is nothing else.
        pair_precision: of the pairs of samples in one cluster, the share that are of one id.
        pair_recall: of the pairs of samples of one id, outliers too, the share that are in one cluster.
        ari, nmi, purity: among samples in a cluster: adjusted Rand index, normalised mutual information, and
            the share of samples whose id is the most frequent of their cluster.
        None where there are no such pairs or samples.
    """
    labels, ids = (
        np.ascontiguousarray(x.cpu() if isinstance(x, torch.Tensor) else x, np.int64)
        for x in (labels, ids)
    )
    if labels.shape != ids.shape or labels.ndim != 1:
        raise ValueError(
            f"cluster_quality: labels and ids must have the same shape (N,), "
            f"got {labels.shape} and {ids.shape}"
        )
    sizes = np.unique(labels[labels >= 0], return_counts=True)[1]
    counts: dict[str, int | float | None] = {
        "images": len(labels),
        "clusters": len(sizes),
        "outliers": int((labels < 0).sum()),
        "largest": int(sizes.max(initial=0)),
    }
    known = ids >= 0
    if not known.any():
        return counts
    labels, ids = labels[known], ids[known]
    shared, clustered, same = (int((x - 1).sum()) for x in ops.cluster_overlap(labels, ids))
    quality: dict[str, int | float | None] = {
        "pair_precision": shared / clustered if clustered else None,
        "pair_recall": shared / same if same else None,
    }
    inside = labels >= 0
    if not inside.any():
        return {**counts, **quality, "ari": None, "nmi": None, "purity": None}
    try:
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    except ImportError:
        raise ImportError("cluster_quality takes scikit-learn: pip install scikit-learn") from None
    labels, ids = labels[inside], ids[inside]
    pairs, members = np.unique(np.stack([labels, ids]), axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))  # sorted by label
    return {
        **counts,
        **quality,
        "ari": float(adjusted_rand_score(ids, labels)),
        "nmi": float(normalized_mutual_info_score(ids, labels)),
        "purity": float(np.maximum.reduceat(members, starts).sum() / len(labels)),
    }


def _ranking_dict(ranking: ops.Ranking) -> dict[str, Any]:
    cmc = [_known(value) for value in ranking.cmc.tolist()]
    shown = {f"rank{rank}": cmc[rank - 1] if rank <= len(cmc) else None for rank in _SHOWN_RANKS}
    return {
        "mAP": _known(ranking.mAP),
        **shown,
        "mINP": _known(ranking.mINP),
        "queries": len(ranking.ap),
        "valid": int(ranking.valid.sum()),
        "cmc": cmc,
    }


def _known(value: float) -> float | None:
    return None if value != value else value
