"""The ops on JAX arrays: what they say on NumPy's, and the gradients of their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyreid import ops as numpy_ops
from pyreid.compat.jax import ops


def unit(rng, *shape):
    rows = rng.standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def same(found, expected):
    assert type(found) is type(expected) or not isinstance(expected, tuple)
    if isinstance(expected, tuple):
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, jax.Array)
        np.testing.assert_array_equal(np.asarray(found), expected)
    else:
        assert found == expected


def test_every_op_is_here():
    functions = {name for name in numpy_ops.__all__ if name[0].islower()}
    assert functions == set(vars(ops))


def test_features_to_labels(rng):
    centres = np.repeat(unit(rng, 8, 16), 12, axis=0)
    features = centres + 0.1 * unit(rng, 96, 16)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    jaxes = jnp.asarray(features)
    graph, expected = (
        each.jaccard_graph(of, k1=10, k2=3) for each, of in ((ops, jaxes), (numpy_ops, features))
    )
    same(graph, expected)
    same(ops.dbscan(graph, (0.5, 0.6)), numpy_ops.dbscan(expected, (0.5, 0.6)))
    same(ops.pseudo_labels(jaxes, k1=10, k2=3), numpy_ops.pseudo_labels(features, k1=10, k2=3))
    same(ops.knn(jaxes, 5), numpy_ops.knn(features, 5))


def test_mining_and_means(rng):
    queries, bank = unit(rng, 4, 8), unit(rng, 50, 8)
    groups = rng.integers(0, 6, 50).astype(np.int32)
    options = {"query_groups": groups[:4], "bank_groups": groups}
    found = ops.mine_negatives(
        jnp.asarray(queries), jnp.asarray(bank), 7, **jax.tree.map(jnp.asarray, options)
    )
    same(found, numpy_ops.mine_negatives(queries, bank, 7, **options))
    means = ops.class_means(jnp.asarray(bank), jnp.asarray(groups), normalize=True)
    same(means, numpy_ops.class_means(bank, groups, normalize=True))


def test_an_update_leaves_the_old_bank(rng):
    bank, features = unit(rng, 10, 8), unit(rng, 4, 8)
    rows = np.array([3, 1, 3, 9], np.int32)
    before = jnp.asarray(bank)
    after = ops.memory_update_(before, jnp.asarray(features), jnp.asarray(rows), momentum=0.2)
    np.testing.assert_array_equal(np.asarray(before), bank)
    same(after, numpy_ops.memory_update_(bank.copy(), features, rows, momentum=0.2))


def cross_entropy(queries, bank, targets, scale):
    logits = scale * queries @ bank.T
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_gradients(rng, transform):
    queries, bank = jnp.asarray(unit(rng, 6, 8)), jnp.asarray(unit(rng, 20, 8))
    targets = jnp.asarray(rng.integers(0, 20, 6).astype(np.int32))
    weights = jnp.arange(1.0, 7.0)  # a sum that tells rows apart

    def mine(queries, bank, targets):
        return (weights * ops.bank_cross_entropy(queries, bank, targets, scale=4.0)).sum()

    def theirs(queries, bank, targets):
        return (weights * cross_entropy(queries, bank, targets, 4.0)).sum()

    found, expected = (
        transform(jax.value_and_grad(loss))(queries, bank, targets) for loss in (mine, theirs)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_gradients_of_set_contrast(rng, transform):
    queries, bank = jnp.asarray(unit(rng, 3, 8)), jnp.asarray(unit(rng, 20, 8))
    positives = jnp.asarray([[1, 2], [4, -1], [7, 0]], jnp.int32)
    negatives = jnp.asarray([[3, 5, 6], [8, 9, 10], [11, -1, -1]], jnp.int32)

    def mine(queries):
        return ops.set_contrast(queries, bank, positives, negatives, scale=5.0).sum()

    def theirs(queries):
        ids = jnp.concatenate([positives, negatives], axis=1)
        scores = jnp.where(ids < 0, -jnp.inf, 5.0 * jnp.einsum("bd,bkd->bk", queries, bank[ids]))
        terms = jnp.where(positives < 0, 0, jax.nn.logsumexp(scores, 1)[:, None] - scores[:, :2])
        return (terms.sum(1) / (positives >= 0).sum(1)).sum()

    found, expected = (transform(jax.value_and_grad(loss))(queries) for loss in (mine, theirs))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def message(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_errors(rng):
    features = jnp.asarray(unit(rng, 20, 8))
    assert message(jax.jit(ops.pseudo_labels), features) == (
        "pyreid: an op must be given arrays outside of jax.jit, got a traced float32[20,8]"
    )
    assert message(ops.pseudo_labels, np.asarray(features)) == (
        "pseudo_labels: arrays must be JAX's, got none"
    )
    assert message(ops.knn, features, 0).startswith("knn: k must ")
