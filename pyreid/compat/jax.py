"""The ops on JAX arrays: `from pyreid.compat.jax import ops`.

An array crosses by DLPack, on its device and without a copy. JAX arrays do not change, so that
`ops.memory_update_` returns the bank as it is after the update and leaves the one that it was given.

`ops.set_contrast` and `ops.bank_cross_entropy` have gradients for `jax.grad`, and work under `jax.jit`, where
their arrays pass through the host. The other ops make arrays whose size depends on values, or work in place:
they are called outside of `jit`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch

from pyreid import ops as _ops

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    raise ImportError("pyreid.compat.jax takes JAX: pip install jax") from None

__all__ = ["ops"]


def _to_torch(value: Any) -> Any:
    """JAX arrays, in whatever tuples, as torch tensors."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"pyreid: an op must be given arrays outside of jax.jit, got a traced {value.aval}"
        )
    if isinstance(value, jax.Array):
        if len(value.devices()) > 1:
            raise ValueError(
                f"pyreid: an array must be on one device, got one on {len(value.devices())}"
            )
        return torch.from_dlpack(value)
    return _inside(_to_torch, value)


def _to_jax(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return jnp.from_dlpack(value.contiguous())
    return _inside(_to_jax, value)


def _inside(convert: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple):
        parts = [convert(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return [convert(part) for part in value] if isinstance(value, list) else value


def _plain(op: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        if not any(isinstance(value, jax.Array) for value in jax.tree.leaves((arguments, options))):
            raise ValueError(f"{op.__name__}: arrays must be JAX's, got none")
        options = {name: _to_torch(value) for name, value in options.items()}
        return _to_jax(op(*_to_torch(arguments), **options))

    return call


def _updated(bank: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
    return _plain(_ops.memory_update_)(jnp.copy(bank), *arguments, **options)


def _differentiable(op: Callable[..., Any]) -> Callable[..., Any]:
    """A loss (B,) of queries (B, D): each depends on its own query alone, so the gradients of all are one
    (B, D) array, which is made along with the losses."""
    signature = inspect.signature(op)

    def on_host(names: tuple[str, ...], options: dict[str, Any], *arrays: Any) -> tuple[Any, Any]:
        queries, *others = (_to_torch(jnp.asarray(array)) for array in arrays)
        queries = queries.requires_grad_()
        with torch.enable_grad():
            loss = op(queries, **dict(zip(names, others, strict=True)), **options)
            (gradient,) = torch.autograd.grad(loss.sum(), queries)
        return _to_jax(loss.detach()), _to_jax(gradient)

    @wraps(op)
    def call(*arguments: Any, **keywords: Any) -> jax.Array:
        given = signature.bind(*arguments, **keywords).arguments
        queries = given.pop("queries")
        names = tuple(name for name, value in given.items() if isinstance(value, jax.Array))
        options = {name: value for name, value in given.items() if name not in names}
        arrays = (queries, *(given[name] for name in names))
        host = partial(on_host, names, options)

        def both(*arrays: Any) -> tuple[Any, Any]:
            if not any(isinstance(array, jax.core.Tracer) for array in arrays):
                return host(*arrays)
            losses = jax.ShapeDtypeStruct(arrays[0].shape[:1], jnp.float32)
            gradient = jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)
            return jax.pure_callback(host, (losses, gradient), *arrays)

        @jax.custom_vjp
        def loss(*arrays: Any) -> Any:
            return both(*arrays)[0]

        def backward(gradient: Any, wanted: Any) -> tuple[Any, ...]:
            return (wanted[:, None].astype(gradient.dtype) * gradient, *(None for _ in names))

        loss.defvjp(lambda *arrays: both(*arrays), backward)
        return loss(*arrays)

    return call


_WITH_GRADIENT = ("set_contrast", "bank_cross_entropy")

ops = SimpleNamespace(
    **{
        name: _differentiable(op) if name in _WITH_GRADIENT else _plain(op)
        for name, op in vars(_ops).items()
        if name in _ops.__all__ and inspect.isfunction(op)
    }
    | {"memory_update_": wraps(_ops.memory_update_)(_updated)}
)
