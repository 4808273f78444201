"""Each system's loss against its own formula: value, gradient, and the bank after the update."""

import pytest
import torch
from torch.nn import functional as F

from pyreid import losses, ops
from pyreid.memory import MemoryBank


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def assert_same(ours, formula, *inputs):
    """Two losses of the same inputs: equal values and gradients."""
    results = []
    for loss in (ours, formula):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = loss(*leaves)
        value.sum().backward()
        results.append((value.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def sequential(bank, features, rows, momentum):
    bank = bank.clone()
    for feature, row in zip(features, rows.tolist(), strict=True):
        moved = momentum * bank[row] + (1 - momentum) * feature
        bank[row] = moved / moved.norm()
    return bank


def test_cluster_contrast():
    bank = MemoryBank(unit(30, 64), momentum=0.1)
    features, labels = randn(16, 64, seed=1), torch.arange(16) % 5
    assert_same(
        lambda x: losses.ClusterContrast(bank)(x, labels),
        lambda x: F.cross_entropy(F.normalize(x) @ bank.features.T / 0.05, labels),
        features,
    )
    expected = sequential(bank.features, F.normalize(features), labels, 0.1)
    bank.update(F.normalize(features), labels)
    torch.testing.assert_close(bank.features, expected, rtol=0, atol=1e-6)


def test_hybrid_memory():
    labels = torch.cat([torch.arange(40) % 7, torch.tensor([9, 12])])  # two images stand alone
    bank = MemoryBank(unit(42, 64), labels)
    features, rows = randn(12, 64, seed=1), torch.arange(12) * 3

    def formula(x):
        """SpCL's masked softmax, in its own words: mean similarity per label, over labels present."""
        similarity = F.normalize(x) @ bank.features.T / 0.05
        means = torch.zeros(int(labels.max()) + 1, len(x)).index_add_(0, labels, similarity.T)
        counts = torch.bincount(labels)[:, None]
        exps = torch.exp(means / counts.clamp(min=1)) * (counts > 0)
        return F.nll_loss(torch.log(exps / exps.sum(0) + 1e-30).T, labels[rows])

    assert_same(lambda x: losses.HybridMemory(bank)(x, rows), formula, features)
    expected = sequential(bank.features, F.normalize(features), rows, 0.2)
    bank.update(F.normalize(features), rows)
    torch.testing.assert_close(bank.features, expected, rtol=0, atol=1e-6)


def test_selective_contrast():
    bank = MemoryBank(unit(60, 32), momentum=0.5)
    neighbours, hard = 3, 10
    own = torch.arange(6) * 7
    ranks = bank.mine(unit(6, 32, seed=2), neighbours + hard, self_rows=own).rows
    positives = torch.cat([own[:, None], ranks[:, :neighbours]], dim=1)
    negatives = ranks[:, neighbours:].contiguous()
    branches = torch.stack([unit(6, 32, seed=3), 8**0.5 * unit(6, 32, seed=4)])

    def formula(queries):
        """One cross-entropy per positive over the same list (SCL), weighted."""
        total = []
        for query in queries:
            rows = torch.cat([positives, negatives], dim=1)
            logits = 10 * (bank.features[rows] @ query[:, :, None])[..., 0]
            weights = [0.5] + [1.75 * 0.5 / neighbours] * neighbours
            target = [torch.full((len(query),), j) for j in range(neighbours + 1)]
            total.append(
                sum(w * F.cross_entropy(logits, t) for w, t in zip(weights, target, strict=True))
            )
        return torch.stack(total)

    contrast = losses.SelectiveContrast(bank)
    assert_same(lambda q: contrast(q, positives, negatives), formula, branches)

    # Both branches write the anchor's feature into its own and its neighbours' rows: local, then global.
    events = [(branch, j) for branch in (1, 0) for j in range(neighbours, -1, -1)]
    rows = torch.cat([positives[:, j] for _, j in events])
    features = torch.cat([branches[branch] for branch, _ in events])
    expected = sequential(bank.features, features, rows, 0.5)
    bank.update(features, rows)
    torch.testing.assert_close(bank.features, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("released", [False, True])
def test_camera_proxy_contrast(released):
    images, cameras = torch.arange(240) % 80, torch.arange(240) * 7 % 3
    proxies = ops.class_means(randn(240, 32), images, cameras, normalize=True)
    features = randn(10, 32, seed=1)
    labels, seen_by = torch.arange(10) * 3, torch.arange(10) % 3

    def formula(x):
        """A loop over cameras and images, as ICE and CAP have it."""
        bank = F.normalize(proxies.means, dim=0) if released else proxies.means
        total = 0.0
        for camera in seen_by.unique():
            members = torch.nonzero(seen_by == camera)[:, 0]
            loss = 0.0
            for i in members:
                similarity = F.normalize(x[i], dim=0) @ bank.T
                positive = torch.nonzero(proxies.labels == labels[i])[:, 0]
                masked = similarity.detach().clone()
                masked[positive] = -10000.0
                hardest = torch.sort(masked).indices[-50:]
                logits = torch.cat([similarity[positive], similarity[hardest]]) / 0.07
                loss = loss - F.log_softmax(logits, dim=0)[: len(positive)].mean()
            total = total + 0.5 * loss / len(members)
        return total

    contrast = losses.CameraProxyContrast(
        proxies.means, proxies.labels, released_normalization=released
    )
    assert_same(lambda x: contrast(x, labels, seen_by), formula, features)


def test_view_invariant_contrast():
    labels = torch.cat([torch.arange(90) % 6, torch.full((10,), -1)])
    bank = MemoryBank(unit(100, 32), labels, repeats="last")
    real, generated = randn(8, 32, seed=1), randn(8, 32, seed=2)
    rows = torch.arange(8) * 5
    positives, negatives = ops.sample_rows(labels, labels[rows], positives=2, negatives=40, seed=3)
    assert (labels[negatives] != labels[rows][:, None]).all()

    def formula(real, generated):
        a, b = F.normalize(real), F.normalize(generated)

        def term(query, positive):
            logits = [(query * bank.features[positive]).sum(1, keepdim=True)]
            logits.append((bank.features[negatives] @ b[:, :, None])[..., 0])
            return F.cross_entropy(torch.cat(logits, 1) / 0.04, torch.zeros(8, dtype=torch.long))

        return term(b, rows) + term(b, positives[:, 0]) + term(a, positives[:, 1])

    contrast = losses.ViewInvariantContrast(bank, negatives=40)
    assert_same(lambda a, b: contrast(a, b, rows, seed=3), formula, real, generated)
    expected = bank.features.clone()
    expected[rows] = F.normalize(0.2 * bank.features[rows] + 0.8 * F.normalize(real))
    bank.update(F.normalize(real), rows)
    torch.testing.assert_close(bank.features, expected, rtol=0, atol=1e-6)
