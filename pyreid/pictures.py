"""Pictures of retrieval, clusters, features and training: the same input gives the same picture.

Sheets of crops are PIL images, plots are matplotlib figures that belong to no window. Colour is never the
only sign: what is right has a tick, what is wrong a cross, and each line and group has a marker of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pyreid import ops
from pyreid.data import Images
from pyreid.evaluation import Evaluation, as_dict, lines_of

Queries = Literal["random", "best", "worst"]
Order = Literal["largest", "impure"]
Method = Literal["pca", "tsne"]

RIGHT, WRONG, ASKED = "#009e73", "#cc3311", "#3b4252"
# Okabe and Ito's colours, which colour-blind people tell apart, the darkest first.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")
MARKERS = "os^DvPX*"
_INK, _FAINT, _GRID, _REST = "#222222", "#6b7280", "#e5e7eb", "#c4c8ce"

_FRAME, _GAP, _MARGIN, _TEXT = 4, 10, 16, 12  # pixels of a sheet
_SMOOTH = Image.Resampling.BICUBIC


class NothingToShow(ValueError):
    """No query has a match, or there is no such cluster."""


def ranked_list(
    query: Images,
    gallery: Images,
    query_features: torch.Tensor,
    gallery_features: torch.Tensor,
    *,
    rows: Sequence[int] | Queries = "random",
    count: int = 6,
    top: int = 10,
    seed: int = 0,
    distance: torch.Tensor | None = None,
    same_camera: bool = False,
    height: int = 128,
) -> Image.Image:
    """Queries, and the gallery images that come first for each: framed green with a tick if they are of its
    id, red with a cross if not.

    Images that the protocol leaves out (see `evaluate`) are not shown.

    Args:
        query_features, gallery_features: (Q, D) and (G, D) unit rows.
        rows: of the queries; or which `count` of those with a match: drawn with `seed`, or those of the
            largest or smallest AP.
        top: gallery images per query.
        distance: (Q, G), such as the re-ranked one. Default: 1 - cosine.
        same_camera: images of the query's own camera count too.
        height: of a crop, in pixels; it is half as wide.
    """
    ids, cameras = (torch.from_numpy(x).to(gallery_features.device) for x in _known_of(gallery))
    query_ids, query_cameras = (torch.from_numpy(x).to(ids.device) for x in _known_of(query))
    if same_camera:
        query_cameras = torch.full_like(query_cameras, -1)

    def ranking(some: Any) -> ops.Ranking:
        return ops.evaluate_ranking(
            query_features[some],
            gallery_features,
            query_ids=query_ids[some],
            gallery_ids=ids,
            query_cameras=query_cameras[some],
            gallery_cameras=cameras,
            distance=None if distance is None else distance[some],
        )

    if isinstance(rows, str):
        found = ranking(slice(None))
        places = _chosen(rows, found.ap.cpu().numpy(), found.valid.cpu().numpy(), count, seed)
    else:
        places = np.asarray(rows, np.int64)
    chosen = torch.from_numpy(places).to(ids.device)
    precision = ranking(chosen).ap.tolist()
    if distance is None:
        shown = 1 - query_features[chosen].float() @ gallery_features.float().T
    else:
        shown = distance[chosen].clone()
    same_id = query_ids[chosen, None] == ids
    out = same_id & (query_cameras[chosen, None] == cameras) | (ids < 0)
    shown[out] = math.inf
    values, order = shown.cpu().sort(dim=1, stable=True)  # equal distances: the lower row first
    top = min(top, len(gallery))

    cell_width, cell_height = _cell(height)
    left = _MARGIN + cell_width + 2 * _GAP
    first = _MARGIN + _TEXT + 8
    sheet = _sheet(
        left + top * (cell_width + _GAP) - _GAP + _MARGIN,
        first + len(chosen) * (cell_height + _GAP) + _TEXT + _MARGIN,
    )
    draw = ImageDraw.Draw(sheet)
    middle = cell_width // 2
    header = _MARGIN + _TEXT
    _write(draw, (_MARGIN + middle, header), "query, AP", _FAINT, "ms")
    for place in range(top):
        x = left + place * (cell_width + _GAP) + middle
        _write(draw, (x, header), str(place + 1), _FAINT, "ms")
    for line, row in enumerate(chosen.tolist()):
        y = first + line * (cell_height + _GAP)
        image, _, camera = query[row]
        _place(sheet, image, (_MARGIN, y), height, ASKED)
        _caption(draw, (_MARGIN, y), height, f"cam {camera}", f"{precision[line]:.2f}")
        for place in range(top):
            x, value = left + place * (cell_width + _GAP), float(values[line, place])
            if value == math.inf:
                break
            image, identity, camera = gallery[int(order[line, place])]
            right = identity == int(query.ids[row])
            colour, mark = (RIGHT, "tick") if right else (WRONG, "cross")
            _place(sheet, image, (x, y), height, colour, mark)
            _caption(draw, (x, y), height, f"cam {camera}", f"{value:.2f}")
    kind = "1 - cosine" if distance is None else "the given distance"
    _legend(
        sheet,
        (_MARGIN, sheet.height - _MARGIN - _TEXT),
        [("tick", RIGHT, "same person"), ("cross", WRONG, "another person")],
        f"numbers: {kind}",
    )
    return sheet


def cluster_montage(
    images: Images,
    labels: Any,
    ids: Any = None,
    *,
    order: Order = "largest",
    clusters: int = 6,
    shown: int = 12,
    height: int = 96,
) -> Image.Image:
    """Clusters as rows of crops. Where ids are known, crops that are not of the most frequent id of their
    cluster are framed red with a cross.

    Args:
        labels: (N,) clusters, -1 where an image is in none.
        ids: (N,), -1 where not known. Default: none is.
        order: the clusters with most images, or those of several ids with most images not of their main one.
        clusters: how many.
        shown: crops of each. Of a cluster that has more, main id and others take part by their shares.
        height: of a crop, in pixels; it is half as wide.
    """
    labels = _numbers(labels)
    ids = np.full(len(images), -1) if ids is None else _numbers(ids)
    if labels.shape != (len(images),) or ids.shape != labels.shape:
        raise ValueError(
            f"cluster_montage: labels and ids must have shape ({len(images)},), "
            f"got {labels.shape} and {ids.shape}"
        )
    if order not in ("largest", "impure"):
        raise ValueError(f"cluster_montage: order must be largest or impure, got {order!r}")
    found = []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        known = ids[members][ids[members] >= 0]
        names, counts = np.unique(known, return_counts=True)
        main = int(names[counts.argmax()]) if len(names) else -1
        wrong = (ids[members] != main) & (ids[members] >= 0)
        found.append((int(label), members, wrong, len(names)))
    if order == "impure":
        found = sorted((c for c in found if c[2].any()), key=lambda c: -c[2].sum())[:clusters]
    else:
        found = sorted(found, key=lambda c: -len(c[1]))[:clusters]
    if not found:
        of = " with images of several ids" if order == "impure" else ""
        raise NothingToShow(f"cluster_montage: labels must hold a cluster{of}, got none")

    cell_width, cell_height = height // 2 + 2 * _FRAME, height + 2 * _FRAME
    left, known = _MARGIN + 108, bool((ids >= 0).any())
    columns = min(shown, max(len(members) for _, members, _, _ in found))
    width = left + columns * (cell_width + _GAP // 2) - _GAP // 2 + _MARGIN
    below = _TEXT + _GAP if known else 0
    sheet = _sheet(max(width, 420), 2 * _MARGIN + len(found) * (cell_height + _GAP) - _GAP + below)
    draw = ImageDraw.Draw(sheet)
    for line, (label, members, wrong, people) in enumerate(found):
        y = _MARGIN + line * (cell_height + _GAP)
        _write(draw, (_MARGIN, y + 20), f"cluster {label}", _INK, "ls", _TEXT + 1)
        text = [f"{len(members)} images"]
        if known:
            text += [f"{people} {'id' if people == 1 else 'ids'}"]
            text += [f"{wrong.mean():.0%} not main id"] if wrong.any() else []
        for k, words in enumerate(text):
            _write(draw, (_MARGIN, y + 40 + k * (_TEXT + 5)), words, _FAINT, "ls")
        for place, member in enumerate(_spread(wrong, min(columns, len(members)))):
            x = left + place * (cell_width + _GAP // 2)
            bad = bool(wrong[member])
            colour, mark = (WRONG, "cross") if bad else (LINES[0] if known else _REST, "")
            _place(sheet, images[int(members[member])][0], (x, y), height, colour, mark)
    if known:
        _legend(
            sheet,
            (_MARGIN, sheet.height - _MARGIN - _TEXT),
            [("", LINES[0], "main id of the cluster"), ("cross", WRONG, "another id")],
        )
    return sheet


def view_grid(
    inputs: Sequence[Image.Image],
    views: np.ndarray,
    cycles: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    angles: Sequence[int] = tuple(range(0, 360, 45)),
    height: int = 128,
) -> Image.Image:
    """What a generator makes of photos: a row for each, of the photo, its reconstruction, the same person
    turned by each angle, and the photo again by way of a turned view.

    Args:
        inputs: B photos.
        views: (B, T, H, W, 3) uint8, the person as generated at each of the `angles` (T,). The first is 0
            degrees: the reconstruction.
        cycles: (B, H, W, 3) uint8.
        truth: (B, T, H, W, 3) uint8: below each row, what should be seen at these angles, where it is known.
        height: of a picture, in pixels; it is half as wide.
    """
    count, poses = views.shape[:2]
    if len(inputs) != count or len(cycles) != count or len(angles) != poses:
        raise ValueError(
            f"view_grid: inputs, cycles and angles must be as many as views has, {count}, {count} and "
            f"{poses}, got {len(inputs)}, {len(cycles)} and {len(angles)}"
        )
    if truth is not None and truth.shape[:2] != (count, poses):
        raise ValueError(f"view_grid: truth must be of {(count, poses)}, got {truth.shape[:2]}")
    wide, high = height // 2 + _GAP // 2, height + _GAP // 2
    first = _MARGIN + _TEXT + 8
    lines = count if truth is None else 2 * count
    sheet = _sheet(2 * _MARGIN + (poses + 3) * wide + 3 * _GAP, first + lines * high + _MARGIN)
    draw = ImageDraw.Draw(sheet)
    columns = [("photo", _MARGIN), ("again", _MARGIN + wide + _GAP)]
    start = columns[-1][1] + wide + _GAP
    columns += [(f"{angle}°", start + place * wide) for place, angle in enumerate(angles)]
    columns.append(("cycle", start + poses * wide + _GAP))
    for words, x in columns:
        _write(draw, (x + height // 4, _MARGIN + _TEXT), words, _FAINT, "ms")
    for row in range(count):
        y = first + row * high * (1 if truth is None else 2)
        drawn = [inputs[row], *(Image.fromarray(a) for a in (views[row, 0], *views[row]))]
        for image, (_, x) in zip([*drawn, Image.fromarray(cycles[row])], columns, strict=True):
            sheet.paste(image.convert("RGB").resize((height // 2, height), _SMOOTH), (x, y))
        if truth is not None:
            below = (start - _GAP, y + high + height // 2)
            _write(draw, below, "as it would be", _FAINT, "rm")
            for place in range(poses):
                image = Image.fromarray(truth[row, place]).resize((height // 2, height), _SMOOTH)
                sheet.paste(image, (start + place * wide, y + high))
    return sheet


def cmc_curve(results: Mapping[str, Evaluation | Mapping[str, Any]], *, max_rank: int = 20) -> Any:
    """The share of queries with a match among the first r gallery images, r to `max_rank`: a figure with a
    line for each evaluation (or its `to_dict()`), dashed where re-ranked."""
    figure, axes = _figure(6.4, 4.0)
    plot, lowest, colour = axes[0, 0], 1.0, -1
    for name, values, again in lines_of(results):
        colour += not again
        cmc = np.array([np.nan if x is None else x for x in values["cmc"]])[:max_rank]
        if np.isnan(cmc).all():
            continue
        lowest = min(lowest, float(np.nanmin(cmc)))
        plot.plot(
            np.arange(1, len(cmc) + 1),
            100 * cmc,
            color=LINES[colour % len(LINES)],
            marker=MARKERS[colour % len(MARKERS)],
            linestyle="--" if again else "-",
            markerfacecolor="white" if again else None,
            markersize=4.5,
            linewidth=1.6,
            label=f"{name}: mAP {100 * values['mAP']:.1f}, rank-1 {100 * values['rank1']:.1f}",
        )
    plot.set_xlabel("rank")
    plot.set_ylabel("queries with a match (%)")
    plot.set_ylim(max(0, math.floor(10 * lowest - 0.5) * 10), 101)
    plot.set_xlim(0.5, max_rank + 0.5)
    plot.set_xticks([1, *range(5, max_rank + 1, 5)])
    _key(plot, loc="lower right")
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> Any:
    """A figure of what was measured epoch by epoch; what no epoch has is left out.

    `history` has a dict for each epoch, any part of which may be missing: "epoch"; "losses", by term;
    "clusters", what `cluster_quality` returns; "evaluation", what `Evaluation.to_dict` returns.
    """
    epochs = [line.get("epoch", place) for place, line in enumerate(history)]

    def series(part: str, names: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
        """Names to values, NaN where there is none; `names`: those wanted, and what they are called."""
        lines = [line.get(part) or {} for line in history]
        if names is None:
            names = {name: name for line in lines for name in line}
        found = {
            called: np.array([_number(line.get(name)) for line in lines])
            for name, called in names.items()
        }
        return {name: values for name, values in found.items() if not np.isnan(values).all()}

    shares = {"pair_precision": "pairs: precision", "pair_recall": "pairs: recall"}
    panels = [
        ("loss", "", 1, series("losses")),
        ("clusters", "", 1, series("clusters", {"clusters": "clusters", "outliers": "outliers"})),
        (
            "clusters against ids",
            "%",
            100,
            series("clusters", {**shares, "nmi": "NMI", "ari": "ARI"}),
        ),
        ("retrieval", "%", 100, series("evaluation", {"mAP": "mAP", "rank1": "rank-1"})),
    ]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        raise ValueError("training_curves: history must hold losses, clusters or evaluation")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = _figure(4.4 * columns, 2.9 * rows, rows, columns)
    for plot in axes.flat[len(panels) :]:
        plot.remove()
    for plot, (title, unit, scale, lines) in zip(axes.flat, panels, strict=False):
        for k, (name, values) in enumerate(lines.items()):
            there = ~np.isnan(values)
            plot.plot(
                np.array(epochs)[there],
                scale * values[there],
                color=LINES[k % len(LINES)],
                marker=MARKERS[k % len(MARKERS)],
                markersize=4,
                markevery=max(1, there.sum() // 12),
                linewidth=1.6,
                label=name,
            )
        plot.set_title(f"{title} ({unit})" if unit else title, fontsize=10, color=_INK, loc="left")
        plot.set_xlabel("epoch")
        plot.set_ylim(bottom=0, top=102 if unit else None)
        plot.xaxis.get_major_locator().set_params(integer=True)
        _key(plot)
    return figure


def feature_map(
    features: torch.Tensor,
    groups: Any,
    *,
    name: str = "id",
    most: int = 10,
    method: Method = "pca",
    max_points: int = 2000,
    seed: int = 0,
) -> Any:
    """A map of features in the plane: a figure in which the largest groups have a colour and a marker each.

    Args:
        features: (N, D).
        groups: (N,) ids, cameras or clusters; those below 0 are the rest.
        name: what a group is called: "id", "camera", "cluster".
        most: how many groups are told apart.
        method: the two main components, or t-SNE (scikit-learn's).
        max_points: of more, so many are drawn with `seed`.
    """
    groups = _numbers(groups)
    if features.ndim != 2 or len(features) != len(groups) or len(groups) < 3:
        raise ValueError(
            f"feature_map: features (N, D) and groups (N,) must have the same N, at least 3, "
            f"got {tuple(features.shape)} and {groups.shape}"
        )
    generator = np.random.default_rng(seed)
    if len(groups) > max_points:
        rows = np.sort(generator.choice(len(groups), max_points, replace=False))
        features, groups = features[torch.from_numpy(rows).to(features.device)], groups[rows]
    vectors = features.detach().float().cpu()
    if method == "pca":
        places, shares = principal(vectors, 2, seed=seed)
        labels = [f"component {k + 1} ({share:.0%} of variance)" for k, share in enumerate(shares)]
    elif method == "tsne":
        places, labels = _tsne(vectors, seed), ["", ""]  # its axes mean nothing
    else:
        raise ValueError(f"feature_map: method must be pca or tsne, got {method!r}")

    names, counts = np.unique(groups[groups >= 0], return_counts=True)
    large = np.sort(names[np.argsort(-counts, kind="stable")[:most]])
    figure, axes = _figure(6.4, 4.6)
    plot = axes[0, 0]
    rest = ~np.isin(groups, large)
    if rest.any():
        others = len(names) - len(large)
        text = f"{others} others" if others else f"no {name}"
        plot.scatter(*places[rest].T, s=7, color=_REST, linewidths=0, label=text, zorder=2)
    for k, group in enumerate(large):
        plot.scatter(
            *places[groups == group].T,
            s=44 if MARKERS[k % len(MARKERS)] == "*" else 22,
            color=LINES[k % len(LINES)],
            marker=MARKERS[k % len(MARKERS)],
            edgecolors="white",
            linewidths=0.4,
            label=f"{name} {group}",
            zorder=3,
        )
    plot.set_xticks([])
    plot.set_yticks([])
    plot.set_xlabel(labels[0])
    plot.set_ylabel(labels[1])
    plot.set_aspect("equal", adjustable="datalim")
    _key(plot, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def camera_pair_table(result: Evaluation | Mapping[str, Any]) -> Any:
    """A figure of mAP and rank-1 for each camera of queries (rows) and of gallery images (columns)."""
    pairs = as_dict(result)["camera_pairs"]
    cameras = pairs["cameras"]
    size = max(2.8, 0.42 * len(cameras) + 1.0)
    figure, axes = _figure(2 * size + 0.4, size + 0.2, 1, 2)
    for plot, key, title in zip(
        axes.flat, ("mAP", "rank1"), ("mAP (%)", "rank-1 (%)"), strict=True
    ):
        values = np.array([[_number(value) for value in row] for row in pairs[key]])
        plot.set_facecolor("#f1f2f4")
        plot.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(values.shape):
            value = values[i, j]
            text = "\N{EN DASH}" if np.isnan(value) else f"{100 * value:.0f}"
            colour = "white" if value > 0.6 else _INK
            plot.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
        plot.set_title(title, fontsize=10, color=_INK, loc="left")
        plot.set_xticks(range(len(cameras)), cameras)
        plot.set_yticks(range(len(cameras)), cameras)
        plot.set_xlabel("gallery camera")
        plot.set_ylabel("query camera")
        plot.grid(False)
        plot.tick_params(length=0)
        for spine in plot.spines.values():
            spine.set_visible(False)
    return figure


def principal(
    features: torch.Tensor, count: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The (N, count) coordinates along the main directions of (N, D) features, and the (count,) shares of
    variance. By iterating a subspace: a full decomposition takes minutes where this takes a moment."""
    centred = features - features.mean(dim=0)
    wide = min(count + 8, *centred.shape)
    start = torch.randn(centred.shape[1], wide, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(start).Q  # (D, wide)
    for _ in range(24):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    _, scale, turn = torch.linalg.svd(centred @ basis, full_matrices=False)
    axes = basis @ turn[:count].T  # (D, count)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = (
        axes * largest.sign()
    )  # either sign would do: the one that makes the largest entry positive
    total = centred.square().sum().clamp(min=1e-12)
    return (centred @ axes).numpy(), (scale[:count].square() / total).numpy()


def png(image: Any, *, dpi: float | None = None) -> bytes:
    """A figure, with `dpi` other than its own or not, or a PIL image, as a PNG file."""
    buffer = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(buffer, "png", optimize=True)
    else:
        image.savefig(buffer, format="png", dpi=dpi or "figure", metadata={"Software": None})
    return buffer.getvalue()


def _tsne(vectors: torch.Tensor, seed: int) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ImportError(
            "feature_map: method tsne takes scikit-learn: pip install scikit-learn"
        ) from None
    reduced, _ = principal(vectors, min(50, *vectors.shape), seed=seed)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)


def _chosen(how: str, ap: np.ndarray, valid: np.ndarray, count: int, seed: int) -> np.ndarray:
    rows = np.flatnonzero(valid)
    if not len(rows):
        raise NothingToShow("ranked_list: a query must have a match, got none that has")
    if how == "random":
        picked = np.random.default_rng(seed).choice(len(rows), min(count, len(rows)), replace=False)
        return rows[np.sort(picked)]
    if how not in ("best", "worst"):
        raise ValueError(f"ranked_list: rows must be random, best, worst or rows, got {how!r}")
    by_ap = np.argsort(ap[rows] if how == "worst" else -ap[rows], kind="stable")
    return rows[by_ap[:count]]


def _spread(wrong: np.ndarray, count: int) -> np.ndarray:
    """`count` places among a cluster's members, main id first: each side by its share, but at least one."""
    good, bad = np.flatnonzero(~wrong), np.flatnonzero(wrong)
    if len(wrong) > count and len(bad) and len(good):
        kept = min(max(round(count * len(bad) / len(wrong)), 1), count - 1)
    else:
        kept = min(len(bad), count)
    sides = ((good, min(count - kept, len(good))), (bad, kept))
    return np.concatenate([s[np.arange(n) * len(s) // max(n, 1)] for s, n in sides]).astype(int)


def _known_of(images: Images) -> tuple[np.ndarray, np.ndarray]:
    return images.ids, images.cameras


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, np.int64)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


# Sheets.


def _sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def _cell(height: int) -> tuple[int, int]:
    """Width and height of a crop with its frame and caption."""
    return height // 2 + 2 * _FRAME, height + 2 * _FRAME + _TEXT + 6


def _place(
    sheet: Image.Image,
    image: Image.Image,
    corner: tuple[int, int],
    height: int,
    colour: str,
    mark: str = "",
) -> None:
    """A crop within a frame, and its mark in the frame's upper right corner."""
    x, y = corner
    width = height // 2
    ImageDraw.Draw(sheet).rectangle(
        (x, y, x + width + 2 * _FRAME - 1, y + height + 2 * _FRAME - 1), fill=colour
    )
    crop = image.convert("RGB").resize((width, height), _SMOOTH)
    sheet.paste(crop, (x + _FRAME, y + _FRAME))
    if mark:
        badge = _badge(mark, colour, 18)
        sheet.paste(badge, (x + width + 2 * _FRAME - badge.width, y))


@lru_cache(maxsize=16)
def _badge(mark: str, colour: str, size: int) -> Image.Image:
    """A tick or a cross in white on a square of the colour, drawn large and made small for smooth edges."""
    large = 8 * size
    shape = Image.new("L", (large, large))
    draw = ImageDraw.Draw(shape)
    strokes = {
        "tick": [[(0.22, 0.54), (0.42, 0.74), (0.78, 0.28)]],
        "cross": [[(0.26, 0.26), (0.74, 0.74)], [(0.74, 0.26), (0.26, 0.74)]],
        "": [],
    }
    for stroke in strokes[mark]:
        points = [(large * x, large * y) for x, y in stroke]
        draw.line(points, fill=255, width=large // 7, joint="curve")
    badge = Image.new("RGB", (size, size), colour)
    badge.paste("white", mask=shape.resize((size, size), Image.Resampling.LANCZOS))
    return badge


def _caption(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], height: int, left: str, right: str
) -> None:
    x, y = corner[0], corner[1] + height + 2 * _FRAME + _TEXT + 1
    _write(draw, (x, y), left, _FAINT, "ls", _TEXT - 1)
    _write(draw, (x + height // 2 + 2 * _FRAME, y), right, _INK, "rs", _TEXT - 1)


def _legend(
    sheet: Image.Image,
    corner: tuple[int, int],
    entries: Sequence[tuple[str, str, str]],
    more: str = "",
) -> None:
    draw, (x, y) = ImageDraw.Draw(sheet), corner
    for mark, colour, text in entries:
        sheet.paste(_badge(mark, colour, 14), (x, y - 1))
        x = _write(draw, (x + 20, y + 10), text, _INK, "ls") + 20
    _write(draw, (x, y + 10), more, _FAINT, "ls")


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    colour: str,
    anchor: str,
    size: int = _TEXT,
) -> int:
    """Where the text ends."""
    draw.text(place, text, fill=colour, font=_font(size), anchor=anchor)
    return math.ceil(draw.textbbox(place, text, font=_font(size), anchor=anchor)[2])


# Plots.


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches, and its (rows, columns) axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pyreid.pictures takes matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for plot in axes.flat:
        plot.grid(True, color=_GRID, linewidth=0.8)
        plot.set_axisbelow(True)
        plot.tick_params(colors=_FAINT, labelsize=8, length=3)
        plot.xaxis.label.set(color=_INK, fontsize=9)
        plot.yaxis.label.set(color=_INK, fontsize=9)
        for side, spine in plot.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_REST)
    return figure, axes


def _key(plot: Any, **where: Any) -> None:
    if plot.get_legend_handles_labels()[0]:
        plot.legend(frameon=False, fontsize=8, labelcolor=_INK, handlelength=2.2, **where)
