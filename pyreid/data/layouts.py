"""The folders that re-identification data comes in: found, read, and checked against what was published."""

from __future__ import annotations

import csv
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyreid import files
from pyreid.data.images import Counts, ImageFiles, ReidData
from pyreid.data.tracklets import Tracklets

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# Ids and images (or tracklets) per subset; junk (id -1) counts as neither, distractors (id 0) as both.
PUBLISHED = {
    "market1501": {
        "train": Counts(751, 12_936),
        "query": Counts(750, 3_368),
        "gallery": Counts(751, 15_913),
    },
    "dukemtmc-reid": {
        "train": Counts(702, 16_522),
        "query": Counts(702, 2_228),
        "gallery": Counts(1_110, 17_661),
    },
    "msmt17": {
        "train": Counts(1_041, 32_621),
        "query": Counts(3_060, 11_659),
        "gallery": Counts(3_060, 82_161),
    },
    "mars": {
        "train": Counts(625, 8_298),
        "query": Counts(626, 1_980),
        "gallery": Counts(622, 9_330),
    },
    "dukemtmc-videoreid": {
        "train": Counts(702, 2_196),
        "query": Counts(702, 702),
        "gallery": Counts(1_110, 2_636),
    },
}
LAYOUTS = ("auto", *PUBLISHED)

_WHERE = """where data sets come from (none is downloaded here):
  Market-1501    the project page of its authors ("Scalable Person Re-identification: A Benchmark")
  DukeMTMC-reID  withdrawn by its authors; it is no longer given out
  MSMT17         on request from its authors ("Person Transfer GAN to Bridge Domain Gap")
  MARS           the project page of its authors ("MARS: A Video Benchmark ...")
  DukeMTMC-VideoReID  withdrawn, as DukeMTMC-reID"""

# Market-1501's layout, which DukeMTMC-reID and repacks of MSMT17 share.
_MARKET = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)")

# MSMT17's own layout: lists of "path id", the paths below one of two folders (V1's name, V2's).
_LISTS = {"train": ("train", "val"), "query": ("query",), "gallery": ("gallery",)}
_LIST_FOLDERS = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}
_MSMT17_NAME = re.compile(r"\d+_\d+_(\d+)_")  # id, image, camera

# MARS: lists of frames, and tables of tracklets in MATLAB files: first and last line of the list, id, camera.
_MARS = {"train": "bbox_train", "test": "bbox_test"}
_MARS_INFO = (
    *("train_name.txt", "test_name.txt", "tracks_train_info.mat", "tracks_test_info.mat"),
    "query_IDX.mat",
)
# DukeMTMC-VideoReID: id/tracklet/frame below each of three folders; the camera is in the frame's name.
_DUKE_VIDEO = ("train", "query", "gallery")
_DUKE_VIDEO_NAME = re.compile(r"\d+_?C(\d)")

# Names that say when an image was taken: the camera, and which recording of it; the frame.
_MARKET_FRAME = re.compile(r"-?\d+_c(\d+)s(\d+)_(\d+)_")
_DUKE_FRAME = re.compile(r"-?\d+_c(\d+)()_f(\d+)")
# MSMT17 has no camera here: all were recorded at the same times of the same days.
_MSMT17_FRAME = re.compile(r"\d+_\d+()_\d+_(\d{4}(?:morning|noon|afternoon))_(\d+)_")
_TIMES = ("morning", "noon", "afternoon")

# What people call the folders of published data sets, in lower case and without punctuation.
_FOLDERS = {
    "market1501": ("market", "market1501", "market1501v150915"),
    "dukemtmc-reid": ("duke", "dukemtmc", "dukemtmcreid"),
    "msmt17": ("msmt", "msmt17", "msmt17v1", "msmt17v2"),
    "mars": ("mars",),
    "dukemtmc-videoreid": ("dukevideo", "dukemtmcvideo", "dukemtmcvideoreid"),
}
_DEPTH = 2  # from what is given to the data set's folder, as in market1501/Market-1501-v15.09.15


class _Rows(NamedTuple):
    """The images of one subset, before cameras are numbered across subsets; or its tracklets, with the names
    of the frames of each."""

    names: list[str]
    ids: list[int]
    cameras: list[str]
    frames: list[list[str]] | None = None


class _Found(NamedTuple):
    """A folder that holds a data set, or a part of one."""

    folder: Path
    name: str
    read: Callable[[Path], dict[str, _Rows]]


def open_data(path: str | os.PathLike[str], *, layout: str = "auto") -> ReidData:
    """The data set at or below `path`: Market-1501, DukeMTMC-reID or MSMT17 as their authors pack them (V1 or
    V2), anything packed like Market-1501, or a CSV file (`open_csv`); and, as Tracklets, MARS and
    DukeMTMC-VideoReID.

    `path` is the data set's own folder, or one up to two levels above it (data/ over
    market1501/Market-1501-v15.09.15/). Images are sorted by name; the cameras of all subsets are numbered
    together, from 0; junk keeps id -1, distractors id 0. Training images of MSMT17 are those of its train and
    val lists; the gallery of MARS is all test tracklets that are not its queries, but for its junk.

    Args:
        layout: "market1501", "dukemtmc-reid", "msmt17", "mars" or "dukemtmc-videoreid", to look for this one
            alone. Default: for any.

    Warns where a subset is not of the published size. Raises ValueError, with what was looked for and found,
    where there is no data set, a part of one, or several.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"open_data: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return open_csv(path)
    if not path.is_dir():
        kind = "is no folder and no .csv file" if path.exists() else "does not exist"
        raise ValueError(f"open_data: {path} {kind}\n{_WHERE}")
    found = _of_layout(_search(path, _DEPTH), layout)
    if not found:
        raise ValueError(f"open_data: {_nothing(path, layout)}\n{_WHERE}")
    if len(found) > 1:
        listed = "".join(f"\n  {one.folder}  ({one.name})" for one in found)
        raise ValueError(f"open_data: {path} holds several data sets, name one of them:{listed}")
    (chosen,) = found
    subsets = _numbered(chosen.folder, chosen.read(chosen.folder))
    data = ReidData(chosen.name, published=PUBLISHED.get(chosen.name), **subsets)
    for difference in data.differences():
        warnings.warn(difference, stacklevel=2)
    return data


def open_folder(
    path: str | os.PathLike[str], *, camera: str | None = None, identity: str | None = None
) -> ReidData:
    r"""The images in a folder and the folders below it, to train on: unlabelled crops. Hidden files and
    folders are passed over.

    Args:
        camera, identity: regular expressions with one group, searched for in each image's path below `path`
            (with "/"), such as r"cam(\w+)/" or r"_c(\d+)". What the group matches is the camera's name.
            Cameras are numbered from 0 in the order of their names: as numbers if all are, else as text.
            Identities that are all numbers stay as they are. Default: one camera; identities not known (-1).
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is no folder" if path.exists() else "does not exist"
        raise ValueError(f"open_folder: {path} {kind}")
    names = _images_below(path)
    if not names:
        raise ValueError(f"open_folder: {path} holds no images ({', '.join(SUFFIXES)})")
    ids = _identities(_matched("identity", identity, names)) if identity else None
    cameras = _in_order(_matched("camera", camera, names)) if camera else None
    images = ImageFiles(path, names, ids, cameras, frame_numbers(names))
    return ReidData(path.resolve().name, images)


def open_csv(path: str | os.PathLike[str]) -> ReidData:
    """The images that a CSV file lists, under a header of these columns in any order: path (relative to the
    file, or absolute); camera, id, split, each of which may be missing.

    Cameras and ids are numbered as by `open_folder`, over all splits; an empty id is not known (-1). A split
    is train, query or gallery; without that column, all is train.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"open_csv: {path} is no file")
    rows: dict[str, _Rows] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        columns = reader.fieldnames or []
        unknown = set(columns) - {"path", "id", "camera", "split"}
        if "path" not in columns or unknown:
            raise ValueError(
                f"open_csv: {path}: header must name path and may name id, camera, split, "
                f"got {','.join(columns) or 'nothing'}"
            )
        lines = [(reader.line_num, line) for line in reader]
    ids = _identities([line.get("id") or "" for _, line in lines])
    for (number, line), known in zip(lines, ids, strict=True):
        split = line.get("split", "train")
        if split not in ("train", "query", "gallery"):
            raise ValueError(
                f"open_csv: {path}: line {number}: split must be train, query or gallery, got {split!r}"
            )
        if None in line or not (line["path"] and line.get("camera", "0")):
            raise ValueError(
                f"open_csv: {path}: line {number} must have a path, a camera where there is a column for it, "
                f"and {len(columns)} fields"
            )
        subset = rows.setdefault(split, _Rows([], [], []))
        subset.names.append(Path(line["path"]).as_posix())
        subset.ids.append(int(known))
        subset.cameras.append(line.get("camera") or "")
    if "train" not in rows:
        raise ValueError(f"open_csv: {path}: must list training images, found none")
    missing = [n for s in rows.values() for n in s.names if not (path.parent / n).is_file()]
    if missing:
        raise ValueError(
            f"open_csv: {path}: {len(missing):,} of the images are not there, the first {missing[0]}"
        )
    return ReidData(path.stem, **_numbered(path.parent, rows))


def frame_numbers(names: Sequence[str]) -> np.ndarray:
    """(N,) when images were taken, by names such as Market-1501's (0002_c1s1_000451_03.jpg: a camera, one of
    its sequences, a frame), DukeMTMC-reID's (0001_c2_f0046182.jpg) and MSMT17's
    (0000_000_01_0303morning_0015_0.jpg), in any folders: the number of the frame; -1 where a name says
    nothing.

    A camera's sequences follow each other: the largest number of each is added to those of the later ones,
    as in JVTC's lists. MSMT17's times of day do likewise, for all cameras together.
    """
    read = [_timed(name.rsplit("/", 1)[-1]) for name in names]
    longest: dict[tuple[str, Any], int] = {}
    for clock, sequence, frame in filter(None, read):
        longest[clock, sequence] = max(longest.get((clock, sequence), 0), frame)
    begins: dict[tuple[str, Any], int] = {}
    ends: dict[str, int] = {}
    for clock, sequence in sorted(longest):
        begins[clock, sequence] = ends.get(clock, 0)
        ends[clock] = begins[clock, sequence] + longest[clock, sequence]
    return np.array([begins[one[:2]] + one[2] if one else -1 for one in read], np.int64)


# --- Finding a data set


def _search(folder: Path, depth: int) -> list[_Found]:
    """The data set in `folder`; if there is none, those in folders up to `depth` levels below."""
    lists = any(
        (folder / f"list_{name}.txt").is_file() for names in _LISTS.values() for name in names
    )
    listed = [folder / name for names in _LIST_FOLDERS.values() for name in names]
    boxes = any((folder / _MARKET[subset]).is_dir() for subset in ("train", "gallery"))
    if boxes and not (lists and any(images.is_dir() for images in listed)):
        return [_Found(folder, _called(folder), _read_market)]
    if lists or any(images.is_dir() and "mask" in images.name for images in listed):
        return [_Found(folder, "msmt17", _read_msmt17)]
    if any((folder / name).is_dir() for name in _MARS.values()):
        return [_Found(folder, "mars", _read_mars)]
    if all(_has_tracklets(folder / name) for name in _DUKE_VIDEO):
        return [_Found(folder, "dukemtmc-videoreid", _read_duke_video)]
    if not depth:
        return []
    return [found for below in _folders(folder) for found in _search(below, depth - 1)]


def _has_tracklets(folder: Path) -> bool:
    """Whether there are folders two levels below."""
    return folder.is_dir() and any(_folders(below) for below in _folders(folder)[:1])


def _of_layout(found: list[_Found], layout: str) -> list[_Found]:
    """Those of one data set: by the names of their folders, or else those whose names say nothing."""
    if layout == "auto":
        return found
    unnamed = [one._replace(name=layout) for one in found if one.name not in PUBLISHED]
    return [one for one in found if one.name == layout] or unnamed


def _called(folder: Path) -> str:
    """Which published data set a folder's name, or that of the folder above it, says it is; else its name."""
    folder = folder.resolve()
    for name in (folder.name, folder.parent.name):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        for known, spellings in _FOLDERS.items():
            if plain in spellings:
                return known
    return folder.name


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if entry.is_dir()
            and not entry.name.startswith(".")
            and os.access(entry, os.R_OK | os.X_OK)
        )


def _nothing(path: Path, layout: str) -> str:
    """Why there is no data set in `path`."""
    if path.resolve().name in (*_MARKET.values(), *sum(_LIST_FOLDERS.values(), ())):
        above = _search(path.resolve().parent, 0)
        if above:
            return f"{path} is one folder of a data set: open {above[0].folder}"
    wanted = "data set" if layout == "auto" else layout
    looked = (
        f"there is no {wanted} in {path} or up to {_DEPTH} levels below: looked for "
        f"{', '.join(_MARKET.values())} (Market-1501, DukeMTMC-reID), list_train.txt with train or "
        f"mask_train_v2 (MSMT17), {_MARS['train']} (MARS) and train, query, gallery with tracklets "
        "(DukeMTMC-VideoReID)"
    )
    images = sum(1 for _ in _walk(str(path)))
    if images:
        return (
            f"{looked}; found {images:,} images. To train on images without labels: "
            f"open_folder({str(path)!r}), on the command line --images {path}"
        )
    there = sorted(os.listdir(path))
    packed = [
        name
        for name in there
        if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"))
    ]
    if packed:
        return f"{looked}; found {packed[0]}: unpack it first"
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    return f"{looked}; found {shown or 'nothing'}"


# --- Reading it


def _read_market(folder: Path) -> dict[str, _Rows]:
    names = {subset: _images_below(folder / below) for subset, below in _MARKET.items()}
    if not all(names.values()):
        found = (f"{len(names[subset]):,} images in {below}" for subset, below in _MARKET.items())
        raise ValueError(
            f"open_data: {folder} is not whole (half unpacked?): looked for images in "
            f"{', '.join(_MARKET.values())}; found {', '.join(found)}\n{_WHERE}"
        )
    subsets = {}
    for subset, below in _MARKET.items():
        rows = subsets[subset] = _Rows([], [], [])
        for name in names[subset]:
            match = _MARKET_NAME.match(name.rsplit("/", 1)[-1])
            if not match:
                raise ValueError(
                    f"open_data: {folder / below}: names must begin with an id and a camera, such as "
                    f"0002_c1, got {name}"
                )
            rows.names.append(f"{below}/{name}")
            rows.ids.append(int(match[1]))
            rows.cameras.append(match[2])
    return subsets


def _read_msmt17(folder: Path) -> dict[str, _Rows]:
    wanted = [f"list_{name}.txt" for names in _LISTS.values() for name in names]
    lists = [name for name in wanted if (folder / name).is_file()]
    below = {
        part: next((name for name in names if (folder / name).is_dir()), None)
        for part, names in _LIST_FOLDERS.items()
    }
    if len(lists) < len(wanted) or not all(below.values()):
        found = [*lists, *(name for name in below.values() if name)]
        raise ValueError(
            f"open_data: {folder} is not whole (half unpacked?): looked for {', '.join(wanted)}, "
            f"{' or '.join(_LIST_FOLDERS['train'])}, {' or '.join(_LIST_FOLDERS['test'])}; "
            f"found {', '.join(found)}\n{_WHERE}"
        )
    there = {part: set(_images_below(folder / str(name))) for part, name in below.items()}
    subsets = {}
    for subset, names in _LISTS.items():
        rows = subsets[subset] = _Rows([], [], [])
        part = "train" if subset == "train" else "test"
        for name in names:
            listing = folder / f"list_{name}.txt"
            listed = _read_list(listing)
            missing = [image for image, _, _ in listed if image not in there[part]]
            if missing:
                raise ValueError(
                    f"open_data: {folder} is not whole (half unpacked?): {listing.name} lists "
                    f"{len(listed):,} images, of which {len(missing):,} are not in {below[part]}, "
                    f"the first {missing[0]}\n{_WHERE}"
                )
            for image, known, camera in listed:
                rows.names.append(f"{below[part]}/{image}")
                rows.ids.append(known)
                rows.cameras.append(camera)
    return subsets


def _read_mars(folder: Path) -> dict[str, _Rows]:
    info = folder / "info"
    found = [name for name in _MARS_INFO if (info / name).is_file()]
    below = [name for name in _MARS.values() if (folder / name).is_dir()]
    if len(found) < len(_MARS_INFO) or len(below) < len(_MARS):
        raise ValueError(
            f"open_data: {folder} is not whole (half unpacked?): looked for {', '.join(_MARS.values())} "
            f"and, in info, {', '.join(_MARS_INFO)}; found {', '.join([*below, *found])}\n{_WHERE}"
        )
    queries = set(_table(info / "query_IDX.mat", 1).ravel().tolist())
    subsets = {name: _Rows([], [], [], []) for name in ("train", "query", "gallery")}
    for part, images in _MARS.items():
        listed = (info / f"{part}_name.txt").read_text().split()
        path = info / f"tracks_{part}_info.mat"
        for number, (first, last, known, camera) in enumerate(_table(path, 4).tolist(), 1):
            if not 1 <= first <= last <= len(listed):
                raise ValueError(
                    f"open_data: {path}: row {number} must be of lines 1 to {len(listed)} of "
                    f"{part}_name.txt, got {first} to {last}"
                )
            if known < 0:
                continue
            subset = part if part == "train" else "query" if number in queries else "gallery"
            rows = subsets[subset]
            frames = [f"{images}/{name[:4]}/{name}" for name in listed[first - 1 : last]]
            rows.names.append(frames[0])
            rows.ids.append(known)
            rows.cameras.append(str(camera))
            assert rows.frames is not None
            rows.frames.append(frames)
    return subsets


def _table(path: Path, columns: int) -> np.ndarray:
    """(N, columns) whole numbers: the only matrix of a MATLAB file."""
    arrays = [np.asarray(a) for a in files.read(path).values()]
    tables = [a.reshape(-1, columns) for a in arrays if a.size and a.size % columns == 0]
    if len(tables) != 1:
        raise ValueError(f"open_data: {path}: must hold one matrix of {columns} columns")
    return tables[0].astype(np.int64)


def _read_duke_video(folder: Path) -> dict[str, _Rows]:
    subsets = {}
    for subset in _DUKE_VIDEO:
        rows = subsets[subset] = _Rows([], [], [], [])
        names = _images_below(folder / subset)
        for tracklet, frames in itertools.groupby(names, lambda name: name.rpartition("/")[0]):
            first, *others = frames
            known, _, _ = tracklet.partition("/")
            match = _DUKE_VIDEO_NAME.match(first.rpartition("/")[2])
            if not match or not known.isdecimal():
                raise ValueError(
                    f"open_data: {folder / subset}: paths must be such as 0001/0003/0001_C6_F0001_X1.jpg, "
                    f"got {first}"
                )
            rows.names.append(f"{subset}/{tracklet}")
            rows.ids.append(int(known))
            rows.cameras.append(match[1])
            assert rows.frames is not None
            rows.frames.append([f"{subset}/{name}" for name in (first, *others)])
    return subsets


def _read_list(path: Path) -> list[tuple[str, int, str]]:
    """(image, id, camera) of each line."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        image, _, known = line.strip().rpartition(" ")
        match = _MSMT17_NAME.match(image.rsplit("/", 1)[-1])
        if not match or not known.isdecimal():
            raise ValueError(
                f"open_data: {path}: line {number} must be a path such as 0000/0000_000_01_... and an id, "
                f"got {line!r}"
            )
        rows.append((image, int(known), match[1]))
    return rows


def _walk(
    folder: str, below: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Files named like images in `folder` and further down, with their paths below it; hidden ones are passed
    over."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_dir():
                if os.path.realpath(entry.path) not in above:  # else a link back up
                    yield from _walk(entry.path, f"{below}{entry.name}/", above)
            elif entry.name.lower().endswith(SUFFIXES):
                yield below + entry.name, entry


def _images_below(folder: Path) -> list[str]:
    """Their paths below `folder`, sorted. Empty files and dangling links are left out, with a warning."""
    names: list[str] = []
    empty: list[str] = []
    for name, entry in _walk(str(folder)) if folder.is_dir() else ():
        full = entry.is_file() and entry.stat().st_size > 0
        (names if full else empty).append(name)
    if empty:
        warnings.warn(
            f"{folder}: {len(empty):,} image files are empty and left out, the first {min(empty)}",
            stacklevel=2,
        )
    return sorted(names)


def _timed(name: str) -> tuple[str, Any, int] | None:
    """(clock, sequence, frame) of an image; sequences in their order."""
    for pattern in (_MARKET_FRAME, _DUKE_FRAME, _MSMT17_FRAME):
        if match := pattern.match(name):
            clock, sequence, frame = match.groups()
            day, time = sequence[:4], sequence[4:]
            order = (day, _TIMES.index(time)) if time in _TIMES else (sequence.zfill(9), 0)
            return clock, order, int(frame)
    return None


def _numbered(root: Path, rows: dict[str, _Rows]) -> dict[str, Any]:
    """The subsets sorted by name, their cameras numbered together, and their frames."""
    cameras = _in_order([camera for subset in rows.values() for camera in subset.cameras])
    frames = frame_numbers([name for subset in rows.values() for name in subset.names])
    subsets: dict[str, Any] = {}
    first = 0
    for name, subset in rows.items():
        order = sorted(range(len(subset.names)), key=subset.names.__getitem__)
        own = cameras[first : first + len(order)]
        times = frames[first : first + len(order)]
        first += len(order)
        names = [subset.names[row] for row in order]
        ids = np.array(subset.ids, np.int64)[order]
        if subset.frames is None:
            subsets[name] = ImageFiles(root, names, ids, own[order], times[order])
            continue
        members = [subset.frames[row] for row in order]
        ends = np.cumsum([len(part) for part in members])
        images = ImageFiles(root, [image for part in members for image in part])
        spans = np.split(np.arange(len(images)), ends[:-1])
        subsets[name] = Tracklets(images, spans, names, ids, own[order])
    return subsets


def _matched(option: str, pattern: str, names: Sequence[str]) -> list[str]:
    """What the only group of `pattern` matches in each name."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"open_folder: {option} must be a regular expression, got '{pattern}': {error}"
        ) from None
    if compiled.groups != 1:
        raise ValueError(
            f"open_folder: {option} must have one group in parentheses, such as '_c(\\d+)', got '{pattern}'"
        )
    found = [match[1] if (match := compiled.search(name)) else None for name in names]
    without = [name for name, text in zip(names, found, strict=True) if text is None]
    if without:
        raise ValueError(
            f"open_folder: {option} must match every path, but '{pattern}' does not match "
            f"{len(without):,} of {len(names):,}, the first {without[0]}"
        )
    return [str(text) for text in found]


def _in_order(values: Sequence[str]) -> np.ndarray:
    """Names as 0, 1, ... in their order: that of numbers, if all are numbers."""
    every = set(values)
    numbers = all(re.fullmatch(r"\d+", value) for value in every)
    place = {value: k for k, value in enumerate(sorted(sorted(every), key=int if numbers else str))}
    return np.array([place[value] for value in values], np.int64)


def _identities(values: Sequence[str]) -> np.ndarray:
    """Whole numbers as they are; other names numbered in their order. Empty: -1."""
    if all(re.fullmatch(r"-?\d+|", value) for value in values):
        return np.array([int(value or -1) for value in values], np.int64)
    return _in_order(["", *values])[1:] - 1  # the empty name comes first
