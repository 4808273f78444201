"""Rows of a plan to batches of transformed views, the same ones whatever the number of workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pyreid import _native
from pyreid.data.images import ImageError, Images
from pyreid.data.transforms import View

Transform = Callable[[Image.Image], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """B images, each in one or more views."""

    views: tuple[torch.Tensor, ...]  # each (B, 3, H, W) float32
    rows: torch.Tensor  # (B,) int64, of the image set
    labels: torch.Tensor  # (B,) int64
    cameras: torch.Tensor  # (B,) int64
    skipped: tuple[str, ...] = ()  # names of corrupt images that others of the batch stand in for

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: Any) -> Batch:
        """The batch on `device`; from pinned memory without waiting for the copy."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            views=tuple(moved(view) for view in self.views),
            rows=moved(self.rows),
            labels=moved(self.labels),
            cameras=moved(self.cameras),
        )


def batches(
    images: Images,
    plan: Iterable[Any],
    *,
    transforms: Sequence[Transform],
    labels: Any,
    seed: int,
    workers: int = 0,
    skip_corrupt: bool = False,
    first_step: int = 0,
    first_slot: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of `plan`, in its order. Each image is read once, and goes through every transform.

    The random numbers of a view depend on `seed`, the step, the slot in the batch and the transform alone:
    the number of workers changes nothing, any step can be repeated, and the processes of a distributed run
    see what one process would.

    Args:
        plan: (B,) rows for each step; may be endless.
        transforms: PIL image -> tensor, each of one shape; random by torch's global generator only, whose
            state outside is left as it was.
        labels: (N,) of all images; of a batch, those of its rows.
        workers: processes that read ahead, a batch each; 0: none, everything happens here.
        skip_corrupt: an image that cannot be read is replaced by another of its batch, of its label if there
            is one; `Batch.skipped` names it. Default: ImageError.
        first_step, first_slot: the place of the plan in a longer one that is resumed, and of its rows in
            larger batches that several processes share.
        pin_memory: batches come in pinned memory, for `Batch.to`. Takes workers.
    """
    labels = _native.to_numpy(labels).astype(np.int64)
    if labels.shape != (len(images),):
        raise ValueError(f"batches: labels must have shape ({len(images)},), got {labels.shape}")
    if not transforms:
        raise ValueError("batches: transforms must be at least one, got none")
    if seed < 0:
        raise ValueError(f"batches: seed must not be negative, got {seed}")
    loaded: Iterator[_Loaded | _Failure]
    loader = _Loader(images, tuple(transforms), labels, seed, skip_corrupt, first_slot)
    steps = enumerate(plan, first_step)
    if workers:
        # A generator of its own: the loader would draw from the global one, which training draws from.
        loaded = iter(
            torch.utils.data.DataLoader(
                loader,
                batch_size=None,
                sampler=steps,
                num_workers=workers,
                collate_fn=_as_it_is,
                generator=torch.Generator(),
                pin_memory=pin_memory,
            )
        )
    else:
        loaded = itertools.starmap(loader.load, steps)
    return _checked(loaded, labels, images.cameras)


def images_in_order(
    images: Images, *, transform: Transform, batch_size: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """The transformed images from first to last, (B, 3, H, W) at a time; the last may be fewer."""
    rows = np.arange(len(images))
    plan = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
    labels = np.zeros(len(images), np.int64)
    for batch in batches(
        images, plan, transforms=[transform], labels=labels, seed=0, workers=workers
    ):
        yield batch.views[0]


_Loaded = tuple[tuple[torch.Tensor, ...], torch.Tensor, tuple[str, ...]]


class _Failure(NamedTuple):
    """An error on its way from a worker, to be raised as it would have been without workers."""

    kind: type[Exception]
    message: str


@dataclass(frozen=True)
class _Loader(torch.utils.data.Dataset):
    """(step, rows) -> views, rows and skipped names of the batch."""

    images: Images
    transforms: tuple[Transform, ...]
    labels: np.ndarray
    seed: int
    skip_corrupt: bool
    first_slot: int

    def __getitem__(self, wanted: tuple[int, Any]) -> _Loaded | _Failure:
        try:
            return self.load(*wanted)
        except (ImageError, _TransformError, IndexError) as error:
            return _Failure(type(error), str(error))

    def load(self, step: int, rows: Any) -> _Loaded:
        state = torch.default_generator.get_state()
        try:
            return self._load(step, np.array(rows, np.int64))
        finally:
            torch.default_generator.set_state(state)

    def _load(self, step: int, rows: np.ndarray) -> _Loaded:
        if rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= len(self.images):
            raise IndexError(
                f"batches: step {step} of the plan must be rows of {len(self.images)} images, got {rows}"
            )
        pictures, rows, skipped = self._read(rows)
        sizes = {(t.height, t.width) if isinstance(t, View) else None for t in self.transforms}
        first = self.transforms[0]
        if len(sizes) == 1 and isinstance(first, View):
            pictures = [first.resized(picture) for picture in pictures]  # once for all views
        count = len(self.transforms)
        # One draw for the step, whose numbers do not depend on how many are drawn.
        seeds = np.random.SeedSequence((self.seed, step)).generate_state(
            (self.first_slot + len(rows)) * count, np.uint64
        )[self.first_slot * count :]
        views: list[list[torch.Tensor]] = [[] for _ in range(count)]
        for slot, picture in enumerate(pictures):
            for k, transform in enumerate(self.transforms):
                torch.default_generator.manual_seed(int(seeds[slot * count + k]))
                try:
                    views[k].append(transform(picture))
                except ImageError:  # a frame of a tracklet
                    raise
                except Exception as error:
                    raise _TransformError(
                        f"batches: transform {k} failed on {self.images.names[rows[slot]]}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
        stacked = tuple(torch.stack(view) for view in views)
        return stacked, torch.from_numpy(rows), tuple(skipped)

    def _read(self, rows: np.ndarray) -> tuple[list[Image.Image], np.ndarray, list[str]]:
        """The pictures of `rows`, and the rows and names again, once what cannot be read is replaced."""
        read: dict[int, Image.Image] = {}
        failed: dict[int, ImageError] = {}
        for slot, row in enumerate(rows.tolist()):
            try:
                read[slot], _, _ = self.images[row]
            except ImageError as error:
                if not self.skip_corrupt:
                    raise
                failed[slot] = error
        if not read:
            raise next(iter(failed.values()))
        taken = list(range(len(rows)))
        for slot in failed:
            alike = [s for s in read if self.labels[rows[s]] == self.labels[rows[slot]]]
            choice = alike or list(read)
            taken[slot] = choice[slot % len(choice)]
        names = [self.images.names[rows[slot]] for slot in failed]
        return [read[slot] for slot in taken], rows[taken], names


class _TransformError(RuntimeError):
    """A transform that fails, and on what."""


def _checked(
    loaded: Iterator[_Loaded | _Failure], labels: np.ndarray, cameras: np.ndarray
) -> Iterator[Batch]:
    try:
        for one in loaded:
            if isinstance(one, _Failure):
                raise one.kind(one.message)
            views, rows, skipped = one
            of_rows = [torch.from_numpy(column[rows.numpy()]) for column in (labels, cameras)]
            yield Batch(tuple(views), rows, of_rows[0], of_rows[1], tuple(skipped))
    finally:
        del loaded  # ends the workers; where the garbage collector has to, it waits 5 s for each


def _as_it_is(loaded: Any) -> Any:
    return loaded
