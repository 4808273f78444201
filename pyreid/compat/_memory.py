"""Banks that change in backward, as SpCL's and Cluster Contrast's do."""

from __future__ import annotations

import torch

from pyreid import ops


class UpdateInBackward(torch.autograd.Function):
    """The features as they are; when their gradient comes by, `bank` is moved towards them.

    `apply(features, rows, bank, momentum, repeats)`, or with what should move the bank in their place, where
    that is more than this process's features: `apply(..., moved_by, moved_rows)`.
    """

    @staticmethod
    def forward(ctx, features, rows, bank, momentum, repeats, moved_by=None, moved_rows=None):
        moved_by = features if moved_by is None else moved_by
        ctx.save_for_backward(moved_by, rows if moved_rows is None else moved_rows)
        # Not saved: a bank that changed between forward and backward is what they expect.
        ctx.bank, ctx.momentum, ctx.repeats = bank, float(momentum), repeats
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient):
        moved_by, rows = ctx.saved_tensors
        move(ctx.bank, moved_by, rows, ctx.momentum, ctx.repeats)
        return gradient, *[None] * 6


class Products(torch.autograd.Function):
    """features @ bank.T; backward moves the bank, one row after another, once the gradient has been taken."""

    @staticmethod
    def forward(ctx, inputs, indexes, features, momentum):
        ctx.save_for_backward(inputs, indexes)
        ctx.features, ctx.momentum = features, float(momentum)
        return inputs.mm(features.t())

    @staticmethod
    def backward(ctx, gradient):
        return _products_backward(ctx, gradient, "sequential")


class HardestProducts(Products):
    """The same, but a row is moved once, by the member of the batch that is least like it."""

    @staticmethod
    def backward(ctx, gradient):
        return _products_backward(ctx, gradient, "hardest")


def _products_backward(ctx, gradient, repeats):
    inputs, indexes = ctx.saved_tensors
    of_inputs = gradient.mm(ctx.features) if ctx.needs_input_grad[0] else None
    move(ctx.features, inputs, indexes, ctx.momentum, repeats)
    return of_inputs, None, None, None


def move(
    bank: torch.Tensor, features: torch.Tensor, rows: torch.Tensor, momentum: float, repeats: str
) -> None:
    features, rows = features.detach().contiguous(), rows.detach().contiguous()
    ops.memory_update_(bank, features, rows, momentum=momentum, repeats=repeats)


def hybrid_loss(queries, bank, labels, rows, temperature: float) -> torch.Tensor:
    """SpCL's loss with its 1e-6 in the logarithm, which bounds the loss of a hopeless query at 13.8."""
    losses = ops.bank_cross_entropy(
        queries, bank, labels[rows], scale=1 / temperature, labels=labels, reduce="cluster_mean"
    )
    return -torch.log(torch.exp(-losses) + 1e-6).mean()
