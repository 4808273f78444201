"""Ghost batch norm: the statistics of groups of images, as data-parallel training has them.

ICE was trained with 32 images on four GPUs: every batch norm saw 8 at a time, and the published numbers
depend on it. One process gets the same with groups of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class GhostBatchNorm(_BatchNorm):
    """Batch norm of (N, C, ...) whose training statistics are those of `group` consecutive samples.

    Running statistics move once per forward, to the mean of the groups' statistics: what data-parallel
    processes with one group each arrive at when their buffers are averaged. Where `group` does not divide N,
    the samples left over join the last group; a batch smaller than a group is one group. In evaluation it is
    plain batch norm, and it has batch norm's parameters and buffers.
    """

    def __init__(
        self,
        num_features: int,
        group: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = _checked(group)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"GhostBatchNorm: input must have shape (N, C, ...), got {tuple(input.shape)}"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        groups = len(input) // self.group
        if not self.training or groups < 2:
            return super().forward(input)
        self._check_input_dim(input)
        momentum, tracks = self.momentum, self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a plain average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        sizes = [self.group] * groups
        sizes[-1] += len(input) % self.group
        outputs = []
        # A call per group, then one copy: regrouping by a transpose would take two copies.
        for place, samples in enumerate(input.split(sizes)):
            # These momenta, one after another, give every group the weight momentum / groups.
            share = (momentum or 0.0) / (groups - (momentum or 0.0) * (groups - 1 - place))
            outputs.append(
                F.batch_norm(
                    samples,
                    self.running_mean if tracks else None,
                    self.running_var if tracks else None,
                    self.weight,
                    self.bias,
                    training=True,
                    momentum=share,
                    eps=self.eps,
                )
            )
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"


def ghost_(module: nn.Module, group: int) -> nn.Module:
    """Turns every batch norm in `module` into ghost batch norm of `group` samples, in place, and returns
    `module`. Parameters, buffers and hooks stay the same objects; on ghost batch norm, sets `group`."""
    _checked(group)
    norms = {name: child for name, child in module.named_modules() if isinstance(child, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, GhostBatchNorm):
            raise ValueError(
                f"ghost_: batch norms must be torch's BatchNorm1d, 2d or 3d, got {type(norm).__name__} "
                f"at {name or 'the top'}"
            )
    for norm in norms.values():
        norm.__class__ = GhostBatchNorm
        assert isinstance(norm, GhostBatchNorm)
        norm.group = group
    return module


@contextmanager
def separate_statistics(
    module: nn.Module, passes: int = 1, *, running: bool = True
) -> Iterator[None]:
    """Within it, one forward of `passes` batches of the same size, one behind the other, does to batch norms
    what `passes` forwards would: each batch has its own statistics, and running ones move for each in turn.

    Args:
        module: whose batch norms, torch's or ghosts; those in evaluation are left alone.
        passes: what the batch must be a multiple of. Of two contexts the inner one's count.
        running: False leaves the running statistics where they are, as for images that were generated.
    """
    if passes < 1:
        raise ValueError(f"separate_statistics: passes must be at least 1, got {passes}")
    norms: list[Any] = [
        child for child in module.modules() if isinstance(child, _BatchNorm) and child.training
    ]
    before = [
        (norm.__class__, norm.track_running_stats, vars(norm).get("passes")) for norm in norms
    ]
    try:
        for norm in norms:
            norm.__class__ = _in_passes(norm.__class__)
            norm.track_running_stats = norm.track_running_stats and running
            norm.passes = passes
        yield
    finally:
        for norm, (kind, tracks, outer) in zip(norms, before, strict=True):
            norm.__class__, norm.track_running_stats = kind, tracks
            if outer is None:
                del norm.passes
            else:
                norm.passes = outer


class _Passes:
    """What a batch norm is besides its own class, while it does several passes in one."""

    passes: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(input) % self.passes:
            raise ValueError(
                f"separate_statistics: a batch must be a multiple of {self.passes} passes, got {len(input)}"
            )
        forward = super().forward  # type: ignore[misc]
        if self.passes == 1:
            return forward(input)
        return torch.cat([forward(batch) for batch in input.chunk(self.passes)])


@cache
def _in_passes(kind: Any) -> Any:
    if issubclass(kind, _Passes):
        return kind
    return type(kind.__name__, (_Passes, kind), {})


def _checked(group: int) -> int:
    if group < 2:
        raise ValueError(f"ghost batch norm: group must be at least 2, got {group}")
    return group
