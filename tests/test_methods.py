"""Methods that cluster: each loss against its formula, each switch, whole steps against plain torch, ranks
against one process."""

import argparse
import dataclasses
import typing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyreid import distributed, methods, ops, options, reference
from pyreid.data import Batch
from pyreid.methods import ClusterContrast, ice
from pyreid.methods.cluster_contrast import cluster_nce
from pyreid.methods.clustering import Clustering, cluster
from pyreid.methods.ice import ICE
from pyreid.models import GhostBatchNorm

IDS, CAMERAS, SHAPE = 12, 3, (3, 8, 4)
# Those that cluster features each epoch; tests/test_scl.py and tests/test_jvtc.py are of others.
METHODS = {name: methods.METHODS[name] for name in ("ice", "cluster-contrast")}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(randn(*shape, seed=seed), dim=-1)


def assert_same(ours, formula, features):
    """Two losses of the same features: equal values and gradients."""
    found = []
    for loss in (ours, formula):
        leaf = features.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


# --- the losses and their formulas ----------------------------------------------------------------


@st.composite
def batches(draw):
    """(features, labels, cameras) of a batch, and the same of a set that it is from."""
    ids, cameras = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    size, dim, seed = (
        draw(st.integers(1, 14)),
        draw(st.sampled_from([1, 8, 33])),
        draw(st.integers()),
    )
    rng = np.random.default_rng(seed % 2**32)
    known = np.concatenate([np.arange(ids), rng.integers(0, ids, 3 * ids)])
    seen_by = rng.integers(0, cameras, len(known))
    rows = rng.integers(0, len(known), size)
    features, everything = rng.normal(size=(size, dim)), rng.normal(size=(len(known), dim))
    return [
        torch.tensor(x, dtype=torch.float32 if x.dtype == float else torch.int64)
        for x in (features, known[rows], seen_by[rows], everything, known, seen_by)
    ]


@given(batches(), st.sampled_from([0.0, 0.1]))
def test_agnostic_loss(problem, smoothing):
    features, labels, _, everything, known, _ = problem
    centroids = ops.class_means(F.normalize(everything), known, normalize=False).means

    def formula(x):
        log_softmax = (x @ centroids.T / 0.5).log_softmax(dim=1)
        target = (1 - smoothing) * F.one_hot(labels, len(centroids)) + smoothing / len(centroids)
        return -(target * log_softmax).sum(dim=1).mean()

    assert_same(
        lambda x: ice.agnostic_loss(x, labels, centroids, label_smoothing=smoothing),
        formula,
        features,
    )


def camera_formula(features, labels, cameras, proxies, hardest, reduction, same, norm, few):
    """Camera by camera, image by image, as the released code has it."""
    bank = proxies.features
    if norm == "column":
        bank = F.normalize(bank, dim=0)
    per_camera = []
    for camera in cameras.unique():
        losses = []
        for i in torch.nonzero(cameras == camera)[:, 0]:
            scores = F.normalize(features[i], dim=0) @ bank.T / 0.07
            own = proxies.labels == labels[i]
            chosen = own if same == "include" else own & (proxies.cameras != cameras[i])
            masked = scores.detach().masked_fill(own, -10000.0)
            window = torch.sort(masked, stable=True).indices[-hardest:]
            if few == "fewer":
                window = window[~own[window]]
            among = torch.cat([scores[chosen], scores[window]])
            count = int(chosen.sum())
            losses.append(-among.log_softmax(0)[:count].mean() if count else 0 * features[i].sum())
        per_camera.append(torch.stack(losses).mean())
    total = torch.stack(per_camera)
    return total.sum() if reduction == "sum" else total.mean()


@given(
    batches(),
    st.sampled_from([1, 3, 50]),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from(["include", "exclude"]),
    st.sampled_from(["row", "column"]),
    st.sampled_from(["fewer", "positives"]),
)
def test_camera_loss(problem, hardest, reduction, same, norm, few):
    features, labels, cameras, *everything = problem
    proxies = ice.camera_proxies(*everything)
    assert_same(
        lambda x: ice.camera_loss(
            x,
            labels,
            cameras,
            proxies,
            hardest=hardest,
            cam_reduction=reduction,
            same_cam_positive=same,
            proxy_norm=norm,
            few_proxies=few,
        ),
        lambda x: camera_formula(x, labels, cameras, proxies, hardest, reduction, same, norm, few),
        features,
    )


@given(batches())
def test_hard_instance_loss(problem):
    features, labels, *_ = problem
    keys = features + 0.5 * randn(*features.shape, seed=1)

    def formula(x):
        total = 0.0
        scores = F.normalize(x) @ F.normalize(keys).T
        for i in range(len(x)):
            hardest = scores[i, labels == labels[i]].min()
            among = torch.cat([hardest[None], scores[i, labels != labels[i]]]) / 0.1
            total = total + F.cross_entropy(among[None], torch.tensor([0]))
        return total / len(x)

    assert_same(
        lambda x: ice.hard_instance_loss(x, keys, labels, temperature=0.1), formula, features
    )


@given(batches())
def test_soft_instance_loss(problem):
    features, *_ = problem
    keys, weak = (features + 0.5 * randn(*features.shape, seed=seed) for seed in (1, 2))

    def formula(x):
        a = (F.normalize(x) @ F.normalize(keys).T / 0.4).softmax(dim=1)
        q = (F.normalize(weak) @ F.normalize(weak).T / 0.4).softmax(dim=1)
        return (q * (q.log() - a.log())).sum() / len(x)

    assert_same(lambda x: ice.soft_instance_loss(x, keys, weak, temperature=0.4), formula, features)


@given(batches())
def test_cluster_nce(problem):
    features, labels, _, everything, known, _ = problem
    centroids = ops.class_means(everything, known, normalize=True).means
    assert_same(
        lambda x: cluster_nce(x, labels, centroids),
        lambda x: F.cross_entropy(F.normalize(x) @ centroids.T / 0.05, labels),
        features,
    )


@given(batches())
def test_a_process_has_its_share_of_the_loss(problem):
    """With the whole batch at hand, the mean over equal shares is the loss of the whole."""
    features, labels, cameras, *everything = problem
    features, labels, cameras = (torch.cat([x, x]) for x in (features, labels, cameras))
    keys, weak = randn(*features.shape, seed=1), randn(*features.shape, seed=2)
    proxies = ice.camera_proxies(*everything)

    def terms(rows):
        f, y, c = features[rows], labels[rows], cameras[rows]
        yield ice.hard_instance_loss(f, keys, y, key_labels=labels)
        yield ice.soft_instance_loss(f, keys, weak[rows], weak_keys=weak)
        for reduction in ("sum", "mean"):
            yield ice.camera_loss(f, y, c, proxies, cam_reduction=reduction, batch_cameras=cameras)

    half = len(features) // 2
    shares = zip(terms(slice(0, half)), terms(slice(half, None)), strict=True)
    for whole, (a, b) in zip(terms(slice(None)), shares, strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "switch",
    [
        {"proxy_norm": "column"},
        {"same_cam_positive": "exclude"},
        {"few_proxies": "positives"},
        {"cam_reduction": "mean"},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_switches_tell_released_from_fixed(switch):
    known, seen_by = torch.arange(45) % 15, torch.arange(45) // 15
    proxies = ice.camera_proxies(randn(45, 16), known, seen_by)
    assert len(proxies.labels) == 45  # less than 50
    call = (randn(8, 16, seed=1) + proxies.features[:8], known[:8], torch.arange(8) % 2, proxies)
    one, other = (ice.camera_loss(*call, **given) for given in ({}, switch))
    assert abs(one - other) > 0.005 * one


def test_losses_are_float32_under_autocast():
    known, seen_by = torch.arange(60) % 20, torch.arange(60) // 20
    proxies = ice.camera_proxies(randn(60, 16), known, seen_by)
    keys, weak = randn(8, 16, seed=1), randn(8, 16, seed=2)
    labels, cameras = known[:8], seen_by[:8]

    def terms(features):
        yield ice.agnostic_loss(features, labels, proxies.features)
        yield ice.camera_loss(features, labels, cameras, proxies)
        yield ice.hard_instance_loss(features, keys, labels, temperature=0.1)
        yield ice.soft_instance_loss(features, keys, weak, temperature=0.4)
        yield cluster_nce(features, labels, proxies.features)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = 6 * randn(8, 16, seed=3).to(dtype)
        features, plain = given.clone().requires_grad_(), given.float().requires_grad_()
        expected = list(terms(plain))
        with torch.autocast("cpu", torch.bfloat16):
            found = list(terms(features))
        assert found == expected
        assert {loss.dtype for loss in found} == {torch.float32}
        sum(found).backward()
        sum(expected).backward()
        torch.testing.assert_close(features.grad.float(), plain.grad, rtol=0.02, atol=1e-3)


# --- whole steps ----------------------------------------------------------------------------------


class Tiny(nn.Module):
    """An encoder for images of SHAPE."""

    def __init__(self, dim=16, norm=None):
        super().__init__()
        self.dim = dim
        self.body = nn.Linear(int(np.prod(SHAPE)), dim, bias=False)
        self.norm = nn.Identity() if norm is None else norm
        with torch.no_grad():
            self.body.weight.copy_(randn(*self.body.weight.shape, seed=5) / 10)

    def forward(self, images):
        return self.norm(self.body(images.flatten(1)))


def world(per_camera=4):
    """Images (N, 3, 8, 4) of IDS people in CAMERAS cameras, and the camera of each."""
    ids = torch.arange(IDS).repeat_interleave(CAMERAS * per_camera)
    cameras = torch.arange(CAMERAS).repeat_interleave(per_camera).repeat(IDS)
    images = randn(IDS, *SHAPE, seed=1)[ids] + 0.5 * randn(CAMERAS, *SHAPE, seed=2)[cameras]
    return images + 0.6 * randn(len(ids), *SHAPE, seed=3), cameras


@torch.no_grad()
def features_of(method, images):
    method.eval()
    features = F.normalize(method.inference(images))
    method.train()
    return features


def batch_of(method, images, labels, cameras, rows, seed):
    views = tuple(
        images[rows] + 0.6 * randn(len(rows), *SHAPE, seed=100 * seed + view)
        for view in range(len(method.views))
    )
    return Batch(views, rows, labels[rows], cameras[rows])


def labelled(method, images, cameras):
    labels = method.label(features_of(method, images), cameras)
    assert int(labels.max()) + 1 >= 8
    return labels


def train(method, *, steps=10, batch_size=16, part=slice(None), epoch=5):
    """The losses of `steps` steps, with new labels every `epoch`; this process takes `part` of each batch."""
    images, cameras = world()
    optimizer = torch.optim.SGD(method.encoder.parameters(), lr=0.02)
    curve = []
    for step in range(steps):
        if step % epoch == 0:
            # Running statistics are of each process's images until they are averaged.
            distributed.mean_(b for b in method.buffers() if b.is_floating_point())
            labels = labelled(method, images, cameras)
            rng = np.random.default_rng(step)
            plan = method.sampler(labels, cameras, batch_size=batch_size, rng=rng)
        rows = torch.as_tensor(next(plan))
        whole = batch_of(method, images, labels, cameras, rows, seed=step)
        batch = Batch(
            tuple(view[part] for view in whole.views),
            *(x[part] for x in (whole.rows, whole.labels, whole.cameras)),
        )
        loss = sum(method.loss(batch).values())
        optimizer.zero_grad()
        loss.backward()
        distributed.mean_([p.grad for p in method.encoder.parameters()])
        optimizer.step()
        method.update(batch)
        loss = loss.detach()[None]
        distributed.mean_([loss])
        curve.append(loss.item())
    return curve, [p.detach().clone() for p in method.inference.parameters()]


SETTINGS = {"k1": 8, "k2": 3, "instances": 2}


def method_of(name, norm=None, **settings):
    cls = METHODS[name]
    return cls(Tiny(norm=norm), cls.Config(**{**SETTINGS, **settings})).train()


EVERY = [
    pytest.param("ice", {}, id="ice"),
    pytest.param("ice", ice.Config.presets["released"], id="ice-released"),
    pytest.param("ice", {"same_cam_positive": "exclude", "proxy_momentum": 0.5}, id="ice-moving"),
    pytest.param("cluster-contrast", {}, id="cluster-contrast"),
    pytest.param("cluster-contrast", {"use_hard": True}, id="cluster-contrast-hard"),
]


def plain_ops():
    """The ops in plain torch and NumPy, by name."""

    def bank_cross_entropy(queries, bank, targets, *, scale, label_smoothing=0.0):
        logits = scale * queries @ bank.T
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)

    def set_contrast(queries, bank, positives, negatives, *, scale):
        losses = []
        for query, chosen, others in zip(queries, positives, negatives, strict=True):
            chosen = chosen[chosen >= 0]
            rows = torch.cat([chosen, others[others >= 0]])
            log_softmax = (scale * bank[rows] @ query).log_softmax(0)
            losses.append(-log_softmax[: len(chosen)].sum() / max(len(chosen), 1))
        return torch.stack(losses)

    def from_numpy(function, result):
        def call(*arrays, **options):
            def numpy(value):
                return value.numpy() if isinstance(value, torch.Tensor) else value

            found = function(*map(numpy, arrays), **{k: numpy(v) for k, v in options.items()})
            return result(found)

        return call

    def tensors(found):
        return [None if x is None else torch.as_tensor(x) for x in found]

    def memory_update_(bank, *arguments, **options):
        moved = from_numpy(reference.memory_update, torch.as_tensor)(bank, *arguments, **options)
        return bank.copy_(moved)

    def pseudo_labels(features, *, k1, k2, variant, eps, min_samples, **_):
        distances = reference.jaccard_distance(features.numpy(), k1, k2, variant=variant)
        labels = torch.as_tensor(reference.dbscan(distances, eps, min_samples))
        return labels, ops.LabelStats({}, 0, 0, 0)

    return {
        "bank_cross_entropy": bank_cross_entropy,
        "set_contrast": set_contrast,
        "memory_update_": memory_update_,
        "mine_negatives": from_numpy(
            reference.mine_negatives, lambda found: ops.Mined(*tensors(found))
        ),
        "class_means": from_numpy(reference.class_means, lambda found: ops.Means(*tensors(found))),
        "pseudo_labels": pseudo_labels,
    }


@pytest.mark.parametrize("name, settings", EVERY)
def test_steps_on_native_and_on_plain_ops(name, settings, monkeypatch):
    torch.manual_seed(0)
    curve, weights = train(method_of(name, **settings))
    for op, plain in plain_ops().items():
        monkeypatch.setattr(ops, op, plain)
    torch.manual_seed(0)
    expected, expected_weights = train(method_of(name, **settings))
    np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert min(curve) > 0.01  # there is something to compare
    assert np.ptp(curve) > 0.01


CURVES = {
    "ice": ("ice", {"shuffle": False, "proxy_momentum": 0.5}),
    "cluster-contrast": ("cluster-contrast", {}),
    "cluster-contrast-hard": ("cluster-contrast", {"use_hard": True}),
}


def train_each(part):
    """All of CURVES, with norm groups of 4 images."""
    torch.manual_seed(0)
    return {
        key: train(method_of(name, norm=GhostBatchNorm(16, 4), **settings), part=part)
        for key, (name, settings) in CURVES.items()
    }


def train_share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.save(train_each(slice(8 * rank, 8 * rank + 8)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(train_share, (str(tmp_path),), nprocs=2)
    expected = train_each(slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, (curve, weights) in expected.items():
        # The teacher is the average of encoders, so that its weights tell those of all steps.
        for ours, theirs, single in zip(first[key][1], second[key][1], weights, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, single, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(first[key][0], curve, rtol=1e-5, atol=1e-5)
        assert first[key][0] == second[key][0]


def step(method, seed=0, batch_size=16):
    """A labelled method and a batch for it."""
    images, cameras = world()
    labels = labelled(method, images, cameras)
    rng = np.random.default_rng(seed)
    rows = torch.as_tensor(next(method.sampler(labels, cameras, batch_size=batch_size, rng=rng)))
    return batch_of(method, images, labels, cameras, rows, seed=seed)


def test_ice_is_the_sum_of_its_terms():
    method = method_of("ice", norm=nn.BatchNorm1d(16), shuffle=False)
    batch = step(method)
    terms = method.loss(batch)
    encoder, teacher = Tiny(norm=nn.BatchNorm1d(16)), Tiny(norm=nn.BatchNorm1d(16))
    f, (k, w) = encoder(batch.views[0]), [teacher(view).detach() for view in batch.views[1:]]
    expected = {
        "agnostic": ice.agnostic_loss(f, batch.labels, method.centroids),
        "camera": 0.5 * ice.camera_loss(f, batch.labels, batch.cameras, method.proxies),
        "hard": ice.hard_instance_loss(f, k, batch.labels, temperature=0.1),
        "soft": 10 * ice.soft_instance_loss(f, k, w, temperature=0.4),
    }
    assert terms == expected
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())
    # Batch statistics of the teacher are those of its own two passes.
    assert torch.equal(method.inference.norm.running_mean, teacher.norm.running_mean)


def test_ice_teacher_follows_after_the_step():
    method = method_of("ice", teacher_momentum=0.75)
    batch, before = step(method), method.inference.body.weight.clone()
    with torch.no_grad():
        method.encoder.body.weight += 1
    method.loss(batch)
    assert torch.equal(method.inference.body.weight, before)
    method.update(batch)
    torch.testing.assert_close(method.inference.body.weight, before + 0.25)


@pytest.mark.parametrize(
    "settings, views, passes, terms",
    [
        ({}, 3, (1, 2), {"agnostic", "camera", "hard", "soft"}),
        ({"stack_views": True}, 3, (1, 1), {"agnostic", "camera", "hard", "soft"}),
        ({"extra_forwards": True}, 3, (2, 3), {"agnostic", "camera", "hard", "soft"}),
        ({"camera_weight": 0.0}, 3, (1, 2), {"agnostic", "hard", "soft"}),
        ({"hard_weight": 0.0}, 3, (1, 2), {"agnostic", "camera", "soft"}),
        ({"soft_weight": 0.0}, 2, (1, 1), {"agnostic", "camera", "hard"}),
        ({"soft_weight": 0.0, "hard_weight": 0.0}, 1, (1, 0), {"agnostic", "camera"}),
        (
            {"soft_weight": 0.0, "hard_weight": 0.0, "extra_forwards": True},
            2,
            (2, 2),
            {"agnostic", "camera"},
        ),
    ],
    ids=str,
)
def test_ice_does_no_work_for_nothing(settings, views, passes, terms, monkeypatch):
    method = method_of("ice", norm=nn.BatchNorm1d(16), **settings)
    assert method.views == ("strong", "strong", "weak")[:views]
    batch, counts = step(method), [0, 0]
    for place, module in enumerate((method.encoder, method.inference)):
        module.register_forward_hook(
            lambda *_, place=place: counts.__setitem__(place, counts[place] + 1)
        )
    if "camera" not in terms:
        monkeypatch.delattr(ops, "mine_negatives")
    assert set(method.loss(batch)) == terms
    assert tuple(counts) == passes
    method.update(batch)
    # However few passes: the teacher, which is what is kept, has batch statistics.
    assert method.inference.norm.running_mean.abs().max() > 0


def assert_terms_close(some, others):
    assert list(some) == list(others)
    for name, loss in some.items():
        torch.testing.assert_close(loss, others[name], rtol=1e-5, atol=1e-5)


def test_extra_forwards_change_batch_statistics_alone():
    found = []
    for extra in (False, True):
        method = method_of("ice", norm=nn.BatchNorm1d(16), extra_forwards=extra)
        found.append((method.loss(step(method)), method))
    (plain, without), (released, extra) = found
    assert_terms_close(plain, released)
    assert [int(m.encoder.norm.num_batches_tracked) for m in (without, extra)] == [1, 2]
    assert [int(m.inference.norm.num_batches_tracked) for m in (without, extra)] == [2, 3]


def test_shuffled_batches_matter_to_norm_groups_alone():
    def losses(norm, **settings):
        torch.manual_seed(0)
        method = method_of("ice", norm=norm, **settings)
        return method.loss(step(method))

    for norm in (nn.BatchNorm1d, nn.Identity):
        assert_terms_close(losses(norm(16)), losses(norm(16), shuffle=False))
    ghost = [losses(GhostBatchNorm(16, 4), shuffle=shuffle)["soft"] for shuffle in (True, False)]
    assert abs(ghost[0] - ghost[1]) > 1e-3
    # Where groups divide the batch, those of a stacked pass are those of two.
    stacked = losses(GhostBatchNorm(16, 4), shuffle=False, stack_views=True)["soft"]
    torch.testing.assert_close(stacked, ghost[1])
    shared = losses(nn.BatchNorm1d(16), shuffle=False, stack_views=True)["soft"]
    assert abs(shared - losses(nn.BatchNorm1d(16), shuffle=False)["soft"]) > 1e-3


def test_moving_proxies():
    method = method_of("ice", proxy_momentum=0.3)
    batch = step(method)
    expected = method.proxies.features.clone()
    method.loss(batch)
    features = F.normalize(method.encoder(batch.views[0])).detach()
    for feature, label, camera in zip(features, batch.labels, batch.cameras, strict=True):
        row = (method.proxies.labels == label) & (method.proxies.cameras == camera)
        expected[row] = F.normalize(0.3 * expected[row] + 0.7 * feature)
    method.update(batch)
    torch.testing.assert_close(method.proxies.features, expected)


@pytest.mark.parametrize("hard", [False, True])
def test_cluster_contrast_centroids_move_in_update(hard):
    method = method_of("cluster-contrast", use_hard=hard, instances=4)
    batch = step(method)
    old, expected = method.centroids.clone(), method.centroids.clone()
    terms = method.loss(batch)
    features = F.normalize(method.encoder(batch.views[0])).detach()
    assert list(terms) == ["cluster"]
    torch.testing.assert_close(terms["cluster"], cluster_nce(features, batch.labels, old))
    terms["cluster"].backward()
    assert torch.equal(method.centroids, old)
    for label in batch.labels.unique():
        members = features[batch.labels == label]
        if hard:
            members = members[(members @ old[label]).argmin()][None]
        for feature in members:
            expected[label] = F.normalize(0.1 * expected[label] + 0.9 * feature, dim=0)
    method.update(batch)
    torch.testing.assert_close(method.centroids, expected)


@pytest.mark.parametrize("name", METHODS)
def test_mixed_precision(name):
    method = method_of(name, norm=nn.BatchNorm1d(16))
    batch = step(method)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(batch)
        sum(terms.values()).backward()
        method.update(batch)
    assert {loss.dtype for loss in terms.values()} == {torch.float32}
    assert method.encoder.body.weight.grad.isfinite().all()


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_clusters_are_numbered_and_noise_left_out(name):
    method = method_of(name, k1=6, k2=1, eps=0.5)
    features = torch.cat([unit(1, 16, seed=k) + 0.01 * randn(6, 16, seed=9 + k) for k in range(4)])
    features = F.normalize(torch.cat([features, unit(3, 16, seed=40)]))
    shuffled = torch.randperm(27, generator=torch.Generator().manual_seed(0))
    cameras = np.arange(27) % 3
    labels = method.label(features[shuffled], cameras)
    assert labels.dtype == torch.int64
    ids = torch.where(shuffled < 24, shuffled // 6, -1)
    names = list(dict.fromkeys(ids[ids >= 0].tolist()))  # in the order of appearance
    assert labels.tolist() == [names.index(k) if k >= 0 else -1 for k in ids.tolist()]
    found = method.clusters
    assert (found.found, found.noise, found.eps) == (4, 3, 0.5)
    assert str(found).startswith("4 clusters of 24 images, 3 in none (eps 0.5, ")
    means = torch.stack([features[shuffled][labels == k].mean(0) for k in range(4)])
    if name == "cluster-contrast":
        means = F.normalize(means)
    torch.testing.assert_close(method.centroids, means)
    if name == "ice":
        proxies = method.proxies
        for feature, label, camera in zip(*proxies[:3], strict=True):
            mean = features[shuffled][(labels == label) & (torch.tensor(cameras) == camera)].mean(0)
            torch.testing.assert_close(feature, F.normalize(mean, dim=0))
        order = list(zip(proxies.cameras.tolist(), proxies.labels.tolist(), strict=True))
        assert order == sorted(order)
        for label, rows in enumerate(proxies.of_label.tolist()):
            assert [row for row in rows if row >= 0] == [
                row for row, (_, of) in enumerate(order) if of == label
            ]


@pytest.mark.parametrize("name", METHODS)
def test_no_cluster_and_one_cluster(name):
    method = method_of(name, k1=2, k2=1)
    cameras = torch.zeros(12, dtype=torch.int64)
    labels = method.label(unit(12, 64), cameras)
    assert labels.tolist() == [-1] * 12
    assert (method.clusters.found, method.clusters.noise) == (0, 12)
    with pytest.raises(ValueError, match="cluster"):
        next(iter(method.sampler(labels, cameras, batch_size=4, rng=np.random.default_rng(0))))

    method = method_of(name, k1=12, k2=1)
    labels = method.label(F.normalize(unit(1, 16) + 0.01 * randn(12, 16, seed=1)), cameras)
    assert labels.tolist() == [0] * 12
    rows = torch.arange(4)
    views = tuple(randn(4, *SHAPE, seed=seed) for seed in range(len(method.views)))
    terms = method.loss(Batch(views, rows, labels[rows], cameras[rows]))
    assert all(loss.isfinite() for loss in terms.values())
    for term in {"hard", "cluster"} & set(terms):  # there is no negative
        assert terms[term] == 0
    sum(terms.values()).backward()
    assert method.encoder.body.weight.grad.isfinite().all()


def test_eps_by_rho():
    features = F.normalize(randn(6, 16).repeat_interleave(20, 0) + 0.2 * randn(120, 16, seed=1))
    graph = ops.jaccard_graph(features, 20, 3)
    config = Clustering(k1=20, k2=3, rho=0.15)
    found = cluster(features, None, config)
    assert found.eps == ops.mean_smallest(graph, 0.15)
    assert torch.equal(found.labels, ops.dbscan(graph, found.eps, 4))
    assert found.pairs == len(graph.indices)
    fixed = cluster(features, None, dataclasses.replace(config, rho=None, eps=found.eps))
    assert torch.equal(found.labels, fixed.labels)
    assert fixed.found == found.found == 6


def test_clusters_by_camera():
    features = F.normalize(randn(6, 16).repeat_interleave(20, 0) + 0.2 * randn(120, 16, seed=1))
    cameras = torch.arange(120) % 3
    config = Clustering(variant="ca-jaccard", intra_k=(4, 2), inter_k=(8, 3))
    sets = {"variant": "ca-jaccard", "cameras": cameras, "intra_k": (4, 2), "inter_k": (8, 3)}
    expected = ops.pseudo_labels(features, **sets)
    assert torch.equal(cluster(features, cameras, config).labels, expected)
    message = "jaccard_graph: cameras must be given for variant 'ca-jaccard', got None"
    with pytest.raises(ValueError) as error:
        cluster(features, None, config)
    assert str(error.value) == message


# --- options and errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_loss_wants_labels(name):
    method = method_of(name)
    rows = torch.arange(4)
    batch = Batch(tuple(randn(4, *SHAPE) for _ in method.views), rows, rows, rows)
    with pytest.raises(ValueError) as error:
        method.loss(batch)
    assert str(error.value) == f"{type(method).__name__}.loss: label() must have been called"


@pytest.mark.parametrize("name", METHODS)
def test_loss_wants_its_views(name):
    method = method_of(name)
    batch = dataclasses.replace(step(method), views=(randn(16, *SHAPE),) * 2)
    with pytest.raises(ValueError) as error:
        method.loss(batch)
    wanted = {"ice": "views strong, strong, weak", "cluster-contrast": "view standard"}[name]
    where = f"{type(method).__name__}.loss"
    assert str(error.value) == f"{where}: batch must have {wanted}, got 2 views"


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_more_clusters_than_there_are(name):
    method = method_of(name)
    labels = torch.arange(30) % 3
    with pytest.raises(ValueError, match="cluster"):
        next(method.sampler(labels, labels, batch_size=8, rng=np.random.default_rng(0)))


def test_cluster_contrast_may_ignore_cameras(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "pyreid.data.samplers.multiple_gallery", lambda labels, cameras, **_: seen.append(cameras)
    )
    labels, cameras = torch.arange(20) % 4, torch.arange(20) % 3
    for use in (True, False):
        method = method_of("cluster-contrast", use_cameras=use)
        method.sampler(labels, cameras, batch_size=8, rng=np.random.default_rng(0))
    assert seen[0].tolist() == cameras.tolist()
    assert seen[1].tolist() == [0] * 20


def test_variants_are_those_of_the_op():
    variants = typing.get_args(typing.get_type_hints(Clustering)["variant"])
    features = unit(30, 8)
    for variant in variants:
        cameras = torch.arange(30) % 2 if variant == "ca-jaccard" else None
        ops.jaccard_graph(features, 8, 3, variant=variant, cameras=cameras)
    with pytest.raises(ValueError) as error:
        ops.jaccard_graph(features, variant="")
    assert all(repr(variant) in str(error.value) for variant in variants)
    assert str(error.value).count("'") == 2 * len(variants) + 2


@pytest.mark.parametrize("name", METHODS)
def test_options_make_a_command_line(name):
    cls = METHODS[name].Config
    for field in dataclasses.fields(cls):
        assert field.metadata["help"]
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, cls, name)
    line = "--variant ca-jaccard --intra-k 6,3 --rho 0.002 --eps 0.4 --instances 8"
    config = options.from_arguments(cls(), parser.parse_args(line.split()))
    expected = {
        "variant": "ca-jaccard",
        "intra_k": (6, 3),
        "rho": 0.002,
        "eps": 0.4,
        "instances": 8,
    }
    assert config == dataclasses.replace(cls(), **expected)
    assert options.replace(cls(), options.to_dict(config), name) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.eps = 0.5


def test_released_values():
    config = ICE.Config()
    assert (config.k1, config.k2, config.eps, config.min_samples) == (30, 6, 0.55, 4)
    assert (config.camera_weight, config.hard_weight, config.soft_weight) == (0.5, 1, 10)
    config = ClusterContrast.Config()
    assert (config.k1, config.k2, config.eps, config.min_samples) == (30, 6, 0.6, 4)
    assert (config.temperature, config.momentum, config.instances) == (0.05, 0.1, 16)
    for cls in METHODS.values():
        for name in ("market1501", "dukemtmc-reid", "msmt17"):
            assert cls.Config.preset(name) == cls.Config()
        assert {"epochs", "steps", "batch_size", "learning_rate"} <= set(cls.recipe)
        assert all(set(preset) <= set(cls.recipe) for preset in cls.recipe_presets.values())
    assert ICE.Config.preset("released").proxy_norm == "column"
    with pytest.raises(ValueError) as error:
        ICE.Config.preset("mars")
    known = "market1501, dukemtmc-reid, msmt17, released"
    assert str(error.value) == f"Config.preset: name must be one of {known}, got 'mars'"


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_on_within_an_epoch(name, tmp_path):
    method = method_of(name, norm=nn.BatchNorm1d(16))
    batch = step(method)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = method_of(name, norm=nn.BatchNorm1d(16))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses = []
    for each in (method, other):
        torch.manual_seed(0)
        each.loss(batch)
        each.update(batch)
        losses.append(each.loss(batch))
    assert losses[0] == losses[1]
    method_of(name, norm=nn.BatchNorm1d(16)).load_state_dict(
        method_of(name, norm=nn.BatchNorm1d(16)).state_dict()
    )  # before any label
