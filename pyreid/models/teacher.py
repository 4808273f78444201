"""The moving average of a network: ICE's momentum encoder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class Teacher(nn.Module):
    """A copy of `module` whose parameters follow those of the original.

    Args:
        module: starts as its copy, wrapped for data parallelism or not.
        momentum: `update` moves each parameter to momentum * own + (1 - momentum) * the module's.
        buffers: "own" leaves batch norm's running statistics to the copy's own forwards in training mode, as
            ICE does; "copy" takes the module's at each `update`, for a copy that never sees a training batch.

    `forward` is the copy's. `.module` is the copy itself; nothing in it requires a gradient.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.999, *, buffers: str = "own"):
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"Teacher: momentum must lie in [0, 1], got {momentum}")
        if buffers not in ("own", "copy"):
            raise ValueError(f'Teacher: buffers must be "own" or "copy", got {buffers!r}')
        if isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        self.momentum = momentum
        self.buffers_of = buffers
        self.module = copy.deepcopy(module).requires_grad_(False)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Follows `module`, after the optimiser's step."""
        own_parameters = tuple(self.module.parameters())
        torch._foreach_lerp_(own_parameters, tuple(module.parameters()), 1 - self.momentum)
        if self.buffers_of == "copy":
            for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
                own.copy_(other)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, buffers={self.buffers_of!r}"
