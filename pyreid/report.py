"""A run in one page: report.html holds its pictures in itself, and needs neither network nor scripts."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pyreid import page, pictures
from pyreid._build import VERSION
from pyreid.data import ReidData
from pyreid.evaluation import Evaluation, as_dict, lines_of

SECTIONS = (
    *("Results", "Training", "Retrieval", "Generated views", "Clusters", "Features", "Cost"),
    "What was run",
)

_QUERIES: tuple[tuple[pictures.Queries, str], ...] = (
    ("random", "Some queries"),
    ("worst", "The hardest queries"),
)
_ORDERS: tuple[tuple[pictures.Order, str], ...] = (
    ("largest", "The largest clusters"),
    ("impure", "The clusters with most images of another id"),
)
_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "pillow", "matplotlib")
_SCALES = (1.0, 0.8, 0.6, 0.45, 0.3)  # of pictures, tried in turn until the page is small enough
_PHOTOS = 100_000  # bytes beyond which a sheet of photographs is better off as JPEG


class Picture(NamedTuple):
    """A matplotlib figure or a PIL image, and where it belongs in a report."""

    section: str  # one of SECTIONS
    title: str
    image: Any
    caption: str = ""


def draw(
    data: ReidData,
    features: Mapping[str, torch.Tensor],
    labels: Any = None,
    *,
    distance: torch.Tensor | None = None,
    same_camera: bool = False,
    method: pictures.Method = "pca",
    seed: int = 0,
) -> list[Picture]:
    """The pictures that images and their features allow: ranked lists from query and gallery, clusters from
    the training images and their labels, maps of the features of the training images, or else of the gallery.

    Args:
        features: (N, D) unit rows by subset, as `extract_data` returns them; any may be missing.
        labels: (N,) clusters of the training images, -1 where in none.
        distance: (Q, G), to rank by, such as the re-ranked one.
        same_camera: as for `evaluate`.
        method: of the maps, as for `pictures.feature_map`.
        seed: for the choice of queries and points.
    """
    drawn: list[Picture] = []
    if data.query is not None and data.gallery is not None and {"query", "gallery"} <= {*features}:
        for rows, title in _QUERIES:
            try:
                sheet = pictures.ranked_list(
                    data.query,
                    data.gallery,
                    features["query"],
                    features["gallery"],
                    rows=rows,
                    seed=seed,
                    distance=distance,
                    same_camera=same_camera,
                )
            except pictures.NothingToShow:
                break
            caption = "Left the query, then the gallery images nearest to it, best first."
            drawn.append(Picture("Retrieval", title, sheet, caption))
    if labels is not None:
        labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
        for order, title in _ORDERS:
            try:
                sheet = pictures.cluster_montage(data.train, labels, data.train.ids, order=order)
            except pictures.NothingToShow:
                break
            drawn.append(Picture("Clusters", title, sheet))

    subset = next((name for name in ("train", "gallery") if name in features), None)
    if subset is None or len(features[subset]) < 3:
        return drawn
    images = data.subsets[subset]
    groups = [("id", images.ids, 10), ("camera", images.cameras, 16)]
    if subset == "train" and labels is not None:
        groups.append(("cluster", labels, 10))
    for name, values, most in groups:
        if len(np.unique(values[values >= 0])) > 1:
            image = pictures.feature_map(
                features[subset], values, name=name, most=most, method=method, seed=seed
            )
            drawn.append(Picture("Features", f"{subset.capitalize()} images by {name}", image))
    return drawn


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    results: Mapping[str, Evaluation | Mapping[str, Any]] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    drawn: Iterable[Picture] = (),
    data: ReidData | None = None,
    clusters: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    date: str | None = None,
    max_bytes: int = 3_000_000,
) -> Path:
    """Writes `report.html` to a folder (made if it is not there), and returns its path. What is not given, or
    empty, leaves no section.

    Args:
        title: such as "ice on market1501".
        results: evaluations, or their `to_dict()`, by name, in order: "before training", "after", say.
        history: a dict per epoch, as for `pictures.training_curves`; and "seconds", by stage.
        drawn: more pictures, such as `draw` makes.
        data: for the table of its subsets.
        clusters: what `cluster_quality` says of the last clusters. Default: the last that `history` has.
        seconds: by stage. Default: the sums over `history`.
        settings: values by name, by group: {"method": {...}, "training": {...}}.
        environment: what it ran on. Default: `versions()`.
        date: default: now.
        max_bytes: pictures are made smaller until the page is, as far as they can still be read.
    """
    plain = {name: as_dict(result) for name, result in (results or {}).items()}
    every = [*_plots(plain, history), *drawn]
    for picture in every:
        if picture.section not in SECTIONS:
            raise ValueError(
                f"write_report: section must be one of {', '.join(SECTIONS)}, got {picture.section!r}"
            )
    if clusters is None:
        clusters = next(
            (line["clusters"] for line in reversed(history) if line.get("clusters")), {}
        )
    if seconds is None:
        seconds = _sums(line.get("seconds") or {} for line in history)

    blocks: dict[str, list[str]] = {name: [] for name in SECTIONS}
    blocks["Results"] += _results(plain)
    blocks["Clusters"] += _clusters(clusters)
    blocks["Cost"] += _cost(seconds, len(history))
    blocks["What was run"] += _run(data, settings or {}, environment or versions())
    date = time.strftime("%Y-%m-%d %H:%M") if date is None else date
    tiles = _tiles(plain, clusters, seconds, len(history))
    words = len(page.whole(title, date, tiles, blocks))
    for picture, (kind, content, width) in zip(
        every, _encoded([p.image for p in every], max_bytes - words), strict=True
    ):
        blocks[picture.section].append(
            page.figure(picture.title, kind, content, width, picture.caption)
        )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page.whole(title, date, tiles, blocks), encoding="utf-8")
    return path


def save(folder: str | os.PathLike[str], drawn: Iterable[Picture]) -> list[Path]:
    """Writes each picture to a PNG file of its own, named by section and title."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in drawn:
        paths.append(folder / f"{page.slug(picture.section)}-{page.slug(picture.title)}.png")
        paths[-1].write_bytes(pictures.png(picture.image))
    return paths


def versions() -> dict[str, str]:
    """What this process runs on."""
    found = {"pyreid": VERSION, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["platform"] = platform.platform()
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


# Sections.


def _plots(
    results: Mapping[str, Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> list[Picture]:
    plots = []
    if any(line.get(part) for line in history for part in ("losses", "clusters", "evaluation")):
        plots.append(Picture("Training", "Epoch by epoch", pictures.training_curves(history)))
    matched = {name: result for name, result in results.items() if result["valid"]}
    if matched:
        caption = "The share of queries with a match among the first images, by their number."
        plots.append(
            Picture("Retrieval", "Match curve (CMC)", pictures.cmc_curve(matched), caption)
        )
        name, result = list(matched.items())[-1]
        if len(result["camera_pairs"]["cameras"]) > 1:
            caption = "How well queries of one camera find their matches in another. A dash: none to find."
            table = pictures.camera_pair_table(result)
            plots.append(Picture("Retrieval", f"Camera pairs: {name}", table, caption))
    return plots


def _tiles(
    results: Mapping[str, Mapping[str, Any]],
    clusters: Mapping[str, Any],
    seconds: Mapping[str, float],
    epochs: int,
) -> str:
    tiles = []
    if results:
        every = list(results.values())
        first, last = every[0], every[-1]
        for key, name in (("mAP", "mAP"), ("rank1", "rank-1")):
            before = f"from {_percent(first[key])}" if first is not last else ""
            tiles.append((name, _percent(last[key]), before))
    if clusters:
        tiles.append(
            ("clusters", f"{clusters['clusters']:,}", f"{clusters['outliers']:,} outliers")
        )
    if seconds:
        note = f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else ""
        tiles.append(("time", page.duration(sum(seconds.values())), note))
    return "".join(page.tile(*tile) for tile in tiles)


def _results(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not results:
        return []
    keys = ("mAP", "rank1", "rank5", "rank10", "mINP")
    rows = [
        [
            name,
            *(_percent(values[key]) for key in keys),
            f"{values['valid']:,} / {values['queries']:,}",
        ]
        for name, values, _ in lines_of(results)
    ]
    head = ["", "mAP", "rank-1", "rank-5", "rank-10", "mINP", "queries with a match"]
    note = (
        "In percent: means over the queries that have a match. Rank-r: those with a match among the first r "
        "gallery images. Gallery images without an id do not count."
    )
    if not any(values.get("same_camera") for values in results.values()):
        note += " Nor do those of both the id and the camera of the query."
    return [page.table(head, rows), f"<p class=note>{escape(note)}</p>"]


def _clusters(clusters: Mapping[str, Any]) -> list[str]:
    if not clusters:
        return []
    names = {
        "images": "images",
        "clusters": "clusters",
        "outliers": "outliers",
        "largest": "images in the largest cluster",
        "pair_precision": "pairs in one cluster that are of one id (%)",
        "pair_recall": "pairs of one id that are in one cluster (%)",
        "purity": "purity, outliers left out (%)",
        "ari": "adjusted Rand index, outliers left out (%)",
        "nmi": "normalised mutual information, outliers left out (%)",
    }
    rows = [
        [
            called,
            f"{clusters[key]:,}" if isinstance(clusters[key], int) else _percent(clusters[key]),
        ]
        for key, called in names.items()
        if key in clusters
    ]
    return [page.table(None, rows)]


def _cost(seconds: Mapping[str, float], epochs: int) -> list[str]:
    total = sum(seconds.values())
    if not total:
        return []
    rows = []
    for stage, value in [*seconds.items(), ("all", total)]:
        share = value / total
        bar = f'<span class=bar><i style="width:{100 * share:.1f}%"></i></span>{100 * share:.0f} %'
        per_epoch = [f"{value / epochs:.1f}"] if epochs else []
        rows.append([stage, f"{value:.1f}", *per_epoch, page.Html(bar)])
    head = ["stage", "seconds", *(["per epoch"] if epochs else []), "share"]
    return [page.table(head, rows)]


def _run(
    data: ReidData | None,
    settings: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, str],
) -> list[str]:
    blocks = []
    if data is not None:
        rows = []
        for name, images in data.subsets.items():
            known = np.unique(images.ids[images.ids >= 0])
            numbers = (len(known), len(images), len(np.unique(images.cameras)))
            rows.append([name, *(f"{number:,}" for number in numbers)])
        head = ["subset", "ids", "images", "cameras"]
        blocks.append(f"<div><h3>Data: {escape(data.name)}</h3>{page.table(head, rows)}</div>")
    for group, values in {**settings, "versions": environment}.items():
        rows = [[name, _value(value)] for name, value in values.items()]
        if rows:
            name = escape(group[:1].upper() + group[1:])
            blocks.append(f"<div><h3>{name}</h3>{page.table(None, rows, 'plain')}</div>")
    return [f"<div class=columns>{''.join(blocks)}</div>"]


# Pictures.


def _encoded(images: Sequence[Any], budget: int) -> list[tuple[str, str, int]]:
    """(type, base64, width in CSS pixels) of each: at the largest scale at which all fit the budget."""
    encoded: list[tuple[str, str, int]] = []
    for scale in _SCALES:
        encoded = [_file(image, scale) for image in images]
        if sum(len(content) for _, content, _ in encoded) <= budget:
            break
    return encoded


def _file(image: Any, scale: float) -> tuple[str, str, int]:
    kind = "png"
    if isinstance(image, Image.Image):
        width = image.width
        if scale < 1:
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        content = pictures.png(image)
        if len(content) > _PHOTOS:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "jpeg", quality=85, optimize=True, subsampling=0)
            if len(buffer.getvalue()) < len(content):
                kind, content = "jpeg", buffer.getvalue()
    else:
        width = round(image.get_figwidth() * 100)
        content = pictures.png(image, dpi=scale * image.dpi)
    return kind, base64.b64encode(content).decode(), width


# Words.


def _percent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
