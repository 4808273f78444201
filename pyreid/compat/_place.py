"""Where the work is done."""

from __future__ import annotations

import numpy as np
import torch

from pyreid import _native


def placed(features: torch.Tensor | np.ndarray) -> torch.Tensor:
    """As our ops take them: a contiguous tensor of a precision that they know, without a gradient; on the
    GPU, where there is one."""
    tensor = torch.as_tensor(features).detach()
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        tensor = tensor.float()
    if torch.cuda.is_available() and _native.cuda_error() is None:
        tensor = tensor.cuda()
    return tensor.contiguous()
