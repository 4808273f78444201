"""`pyreid cluster` and `pyreid rerank`: an op on files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from pyreid import _native, files, ops
from pyreid.progress import Progress

_SHOWN = 8  # largest clusters of the summary
_UNIT = 1e-2  # how far from 1 the length of a unit row may be: bfloat16's


def cluster(arguments: Any) -> int:
    output, path = Path(arguments.output), Path(arguments.features)
    files.check_output(output)
    steps = _Steps("cluster")
    steps.say(f"reading {path}")
    arrays = files.read(path)
    features = files.matrix(path, arrays, arguments.key, files.FEATURES)
    cameras, people = (
        None if key is None else files.ids(path, arrays, key)
        for key in (arguments.cameras_key, arguments.ids_key)
    )
    del arrays
    count, dim = features.shape
    if people is not None and len(people) != count:
        raise ValueError(f"{path}: {arguments.ids_key} must hold {count} ids, got {len(people)}")
    features = _prepared(features, arguments, unit=arguments.variant in ("spcl", "ca-jaccard"))
    with steps:
        labels, stats = ops.pseudo_labels(
            features,
            k1=arguments.k1,
            k2=arguments.k2,
            eps=arguments.eps,
            min_samples=arguments.min_samples,
            variant=arguments.variant,
            cameras=None if cameras is None else cameras.to(features.device),
            return_stats=True,
            progress=steps,
        )
    labels = labels.cpu()
    several = len(arguments.eps) > 1
    files.write(
        output, "labels", (labels if several else labels[0]).numpy(), eps=list(arguments.eps)
    )

    print(f"{count} rows of {dim} features; {stats.pairs} near pairs")
    results = zip(arguments.eps, labels, stats.clusters, stats.noise, strict=True)
    for eps, row, clusters, noise in results:
        share = f" ({noise / count:.1%})" if count else ""
        print(f"eps {eps:g}: {clusters} clusters, {noise} noise{share}")
        if clusters:
            sizes = torch.bincount(row[row >= 0]).sort(descending=True).values[:_SHOWN]
            print(f"  largest: {', '.join(map(str, sizes.tolist()))}")
        if people is not None:
            print(f"  {_agreement(row, people)}")
    print("seconds: " + ", ".join(f"{stage} {s:.2f}" for stage, s in stats.seconds.items()))
    print(f"labels: {output}")
    return 0


def rerank(arguments: Any) -> int:
    output = Path(arguments.output)
    files.check_output(output)
    steps = _Steps("rerank")
    sides = []
    for path, key, names in (
        (Path(arguments.queries), arguments.queries_key, files.QUERIES),
        (Path(arguments.gallery), arguments.gallery_key, files.GALLERY),
    ):
        steps.say(f"reading {path}")
        features = files.matrix(path, files.read(path), key, names)
        sides.append(_prepared(features, arguments, unit=False))
    queries, gallery = sides
    start = time.perf_counter()
    with steps:
        distances = ops.rerank(
            queries,
            gallery,
            arguments.k1,
            arguments.k2,
            arguments.lambda_value,
            variant=arguments.variant,
            progress=steps,
        ).cpu()
    seconds = time.perf_counter() - start
    steps.say("writing")
    files.write(output, "distances", distances.numpy())

    print(f"{len(queries)} queries, {len(gallery)} gallery rows of {gallery.shape[1]} features")
    if distances.numel():
        low, mean, high = distances.min(), distances.mean(), distances.max()
        print(f"distances: smallest {low:.4f}, mean {mean:.4f}, largest {high:.4f}")
    print(f"seconds: {seconds:.2f}")
    print(f"distances: {output}")
    return 0


def _prepared(features: torch.Tensor, arguments: Any, *, unit: bool) -> torch.Tensor:
    if arguments.device == "cuda":
        reason = _native.cuda_error()
        if reason is None and not torch.cuda.is_available():
            reason = "torch sees no device"
        if reason is not None:
            raise ValueError(f"--device cuda: {reason}")
    features = features.to(arguments.device)
    if arguments.normalize:
        return torch.nn.functional.normalize(features)
    if unit and len(features):
        length = torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)
        if (length - 1).abs().max() > _UNIT:
            print(
                f"pyreid: rows have lengths from {length.min():.3g} to {length.max():.3g}, but variant "
                f"{arguments.variant!r} takes them to be 1; --normalize makes them so",
                file=sys.stderr,
            )
    return features


def _agreement(labels: torch.Tensor, people: torch.Tensor) -> str:
    """Of pairs of rows: those in one cluster that are one person, and the other way round."""
    shared, size, true_size = ops.cluster_overlap(labels, people)
    both, clustered, same = (int((x - 1).sum()) for x in (shared, size, true_size))
    return (
        f"pairs: {both / max(clustered, 1):.1%} of those in a cluster are one person, "
        f"{both / max(same, 1):.1%} of those of one person are in a cluster"
    )


class _Steps:
    """A line per step on stderr, with the seconds since the start; below it, how far the step has come."""

    def __init__(self, command: str):
        self.command, self.start = command, time.perf_counter()
        self._stage = ""
        self._progress: Progress | None = None

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__()

    def say(self, step: str) -> None:
        elapsed = time.perf_counter() - self.start
        print(f"pyreid {self.command}: {elapsed:6.1f} s  {step}", file=sys.stderr, flush=True)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._progress is None:
            self.__exit__()
            self.say(f"{stage} of {total} rows")
            self._stage = stage
            self._progress = Progress(f"  {stage}", total, unit="rows").__enter__()
        self._progress.advance(done - self._progress.done)
