"""How ops meet torch: the dispatcher where something must see them, the kernel at once where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_compiling = getattr(getattr(torch, "compiler", None), "is_compiling", lambda: False)

# torch 2.4 brought torch.library.custom_op. Before, ops work, but torch.compile breaks its graph at them.
_custom_op = getattr(torch.library, "custom_op", None)


def dispatched(array: Any) -> bool:
    """Whether a call on `array` must go through torch's dispatcher: under torch.compile, for fake tensors
    and other subclasses. A plain eager call need not, and the dispatcher's Python side takes longer than a
    small op."""
    if _is_compiling():
        return True
    return isinstance(array, torch.Tensor) and type(array) not in _PLAIN


def register(
    function: Callable,
    *,
    name: str,
    fake: Callable,
    mutates: tuple[str, ...] = (),
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers `function`, tensors in and tensors out, as torch.ops.pyreid.<name>; returns a function of
    the same positional arguments that takes the short way where nothing is looking.

    Args:
        function: annotated with types that torch.library can make a schema of.
        fake: the same for shapes and dtypes alone.
        mutates: names of arguments that are written to.
        setup_context, backward: as torch.autograd.Function's; one pair serves eager calls and compiled ones.
            What `backward` calls must be registered itself, so that compiled graphs see it.
    """
    if _custom_op is not None:
        registered = _custom_op(f"pyreid::{name}", mutates_args=mutates)(function)
        registered.register_fake(fake)
        if backward is not None:
            registered.register_autograd(backward, setup_context=setup_context)

    differentiable = function
    if backward is not None and setup_context is not None:
        differentiable = _autograd_function(name, function, setup_context, backward)

    def call(*arguments):
        if dispatched(arguments[0]):
            return getattr(torch.ops.pyreid, name)(*arguments)
        if torch.is_grad_enabled() and any(map(_requires_grad, arguments)):
            return differentiable(*arguments)
        return function(*arguments)

    return call


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def _autograd_function(
    name: str, function: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    # A `setup_context` of its own would make torch bind the arguments to the signature at every call, which
    # takes longer than a small op.
    def forward(ctx, *arguments):
        output = function(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
    }
    made: Any = type(name, (torch.autograd.Function,), members)
    return made.apply
