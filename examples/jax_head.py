"""A linear head on frozen features, trained in JAX: labels, loss and memory on JAX arrays.

pip install jax
python examples/jax_head.py
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from pyreid.compat.jax import ops


def blobs(
    rng: np.random.Generator, ids: int, images: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """Features (ids * images, width) in which most directions say nothing of the identity."""
    told = np.repeat(rng.standard_normal((ids, 8)), images, axis=0)
    noise = 0.5 * rng.standard_normal((ids * images, width - 8))
    features = np.concatenate([told + 0.3 * rng.standard_normal(told.shape), noise], axis=1)
    return jnp.asarray(features, jnp.float32), jnp.repeat(jnp.arange(ids), images)


def embedded(weights: jax.Array, features: jax.Array) -> jax.Array:
    found = features @ weights
    return found / jnp.linalg.norm(found, axis=1, keepdims=True)


def mean_average_precision(weights: jax.Array, features: jax.Array, ids: jax.Array) -> float:
    found = embedded(weights, features)
    cameras = jnp.arange(len(ids))  # each its own, so that only an image itself is left out
    ranking = ops.evaluate_ranking(
        found, found, query_ids=ids, gallery_ids=ids, query_cameras=cameras, gallery_cameras=cameras
    )
    return float(ranking.mAP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30, help="of an epoch")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    features, ids = blobs(rng, arguments.ids, 12, 48)
    weights = jnp.asarray(0.2 * rng.standard_normal((48, 32)), jnp.float32)
    print(f"untrained: mAP {mean_average_precision(weights, features, ids):.1%}")

    @jax.jit
    def step(weights, bank, batch, labels):
        def loss(weights):
            queries = embedded(weights, batch)
            return ops.bank_cross_entropy(queries, bank, labels, scale=20.0).mean()

        value, gradient = jax.value_and_grad(loss)(weights)
        return value, weights - 0.1 * gradient

    for epoch in range(arguments.epochs):
        found = embedded(weights, features)
        labels = ops.pseudo_labels(found, k1=12, k2=3, eps=0.6)
        kept = np.flatnonzero(np.asarray(labels) >= 0)
        bank = ops.class_means(found, labels, normalize=True).means
        losses = []
        for _ in range(arguments.steps):
            rows = rng.choice(kept, 32)
            value, weights = step(weights, bank, features[rows], labels[rows])
            bank = ops.memory_update_(
                bank, embedded(weights, features[rows]), labels[rows], momentum=0.1
            )
            losses.append(float(value))
        print(f"epoch {epoch + 1}: {len(bank)} clusters, loss {np.mean(losses):.2f}")
    print(f"trained: mAP {mean_average_precision(weights, features, ids):.1%}")


if __name__ == "__main__":
    main()
