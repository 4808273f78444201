"""JVTC: its losses against their formulas, whole steps against plain torch, its labels, its state."""

import argparse
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pyreid import ops, options, reference, train
from pyreid.data import Batch, ImageArrays, ImageFiles, ReidData, Tracklets, camstyle, transforms
from pyreid.methods import JVTC
from pyreid.methods.clustering import Clustering, cluster, cluster_distances, joint_labels
from pyreid.methods.jvtc import Config, global_loss, local_loss

SHAPE = (3, 8, 4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tiny(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.backbone = nn.Linear(int(np.prod(SHAPE)), dim)
        self.neck = nn.BatchNorm1d(dim)

    def forward(self, images):
        return self.neck(self.backbone(images.flatten(1)))


def method_of(**changes):
    torch.manual_seed(0)
    settings = {"views": 2, "first_labels": 0, "relabel_every": 1, "k1": 8, "k2": 3, "rho": 0.05}
    return JVTC(Tiny(), Config(**(settings | changes))).train()


def world(ids=10, each=6):
    """Images of people in three cameras, which cameras, and when: they walk from one to the next."""
    who = torch.arange(ids).repeat_interleave(each)
    cameras = torch.arange(len(who)) % 3
    images = randn(ids, *SHAPE, seed=1)[who] + 0.5 * randn(len(who), *SHAPE, seed=3)
    frames = 5000 * who + torch.tensor([0, 400, 900])[cameras] + torch.arange(len(who)) % 7
    return images, cameras, frames


def features_of(method, images):
    with torch.no_grad():
        return F.normalize(method.inference.eval()(images))


def batch_of(method, images, labels, cameras, rows, seed):
    views = tuple(
        images[rows] + 0.4 * randn(len(rows), *SHAPE, seed=10 * seed + view)
        for view in range(len(method.views))
    )
    return Batch(views, rows, labels[rows], cameras[rows])


# --- the losses and their formulas ----------------------------------------------------------------


def assert_same(ours, formula, features):
    found = []
    for loss in (ours, formula):
        leaf = features.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 8, 33]), st.integers(0, 99))
def test_local_loss(batch, views, dim, seed):
    features = 2 * randn(batch, views, dim, seed=seed)

    def formula(x):
        losses = []
        for i in range(batch):
            for k in range(views):
                view = x[i, k] / x[i, k].norm()
                means = [x[j].mean(dim=0) for j in range(batch)]
                scores = torch.stack([view @ (mean / mean.norm()) for mean in means]) / 0.1
                losses.append(scores.logsumexp(0) - scores[i])
        return torch.stack(losses).mean()

    assert_same(local_loss, formula, features)


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 8, 33]), st.integers(0, 99))
def test_global_loss(batch, views, dim, seed):
    features, bank = 2 * randn(batch, views, dim, seed=seed), randn(30, dim, seed=seed + 1)
    bank_labels = torch.arange(30) % 7
    labels = torch.arange(batch) % 7

    def formula(x):
        losses = []
        for i in range(batch):
            own = (bank_labels == labels[i]).float()
            for k in range(views):
                log_softmax = ((x[i, k] / x[i, k].norm()) @ bank.T / 0.05).log_softmax(0)
                losses.append(-(own / own.sum() * log_softmax).sum())
        return torch.stack(losses).mean()

    assert_same(lambda x: global_loss(x, labels, bank, bank_labels), formula, features)


def test_losses_are_float32_under_autocast():
    features = randn(6, 3, 16).bfloat16()
    rows = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses = local_loss(features), global_loss(features, rows, randn(6, 16), rows)
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.testing.assert_close(losses[0], local_loss(features.float()))


# --- whole steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_steps_against_plain_torch(norm):
    """Two epochs of three steps: losses, weights and bank of the method, and of what it says it does."""
    images, cameras, _ = world()
    first = {"joint_from": None, "first_labels": 1, "bank_norm": norm, "momentum_step": 0.3}
    method = method_of(**first)
    plain = Tiny()
    plain.load_state_dict(method.encoder.state_dict())
    bank = features_of(method, images).clone()
    own = torch.optim.SGD(method.encoder.parameters(), lr=0.02)
    other = torch.optim.SGD(plain.parameters(), lr=0.02)
    for epoch in range(2):
        labels = method.label(bank if epoch == 0 else None, cameras)
        if epoch == 0:
            assert labels.tolist() == list(range(60))
        else:
            assert 5 < len(labels.unique()) < 50
        method.train()
        for step in range(3):
            rows = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:12]
            batch = batch_of(method, images, labels, cameras, rows, seed=step)
            terms = method.loss(batch)
            assert set(terms) == ({"local"} if epoch == 0 else {"local", "global"})
            own.zero_grad()
            sum(terms.values()).backward()
            own.step()
            method.update(batch)

            x = plain(torch.stack(batch.views, dim=1).flatten(0, 1)).unflatten(0, (12, 2))
            v = F.normalize(x.mean(dim=1), dim=1)
            x = F.normalize(x, dim=2)
            targets = torch.arange(12)
            expected = sum(F.cross_entropy(x[:, k] @ v.T / 0.1, targets) for k in range(2)) / 2
            torch.testing.assert_close(terms["local"], expected, rtol=1e-4, atol=1e-5)
            if epoch:
                alike = (labels[rows][:, None] == labels).float()
                target = alike / alike.sum(dim=1, keepdim=True)
                for k in range(2):
                    log_softmax = (x[:, k] @ bank.T / 0.05).log_softmax(dim=1)
                    expected = expected - 0.2 * (target * log_softmax).sum(dim=1).mean() / 2
            torch.testing.assert_close(sum(terms.values()), expected, rtol=1e-4, atol=1e-5)
            other.zero_grad()
            expected.backward()
            other.step()
            moved = 0.3 * epoch * bank[rows] + (1 - 0.3 * epoch) * v.detach()
            bank[rows] = F.normalize(moved) if norm else moved
            torch.testing.assert_close(method.bank, bank, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(method.encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_momentum_grows_with_epochs():
    images, cameras, _ = world()
    method = method_of(first_labels=99, joint_from=None, bank_norm=False, momentum_step=0.5)
    labels = method.label(features_of(method, images), cameras)
    method.train()
    for kept in (0.0, 0.5, 0.8, 0.8):
        batch = batch_of(method, images, labels, cameras, torch.arange(12), seed=1)
        before = method.bank.clone()
        method.loss(batch)
        method.update(batch)
        new, _ = method._latest
        torch.testing.assert_close(method.bank[:12], kept * before[:12] + (1 - kept) * new)
        torch.testing.assert_close(method.bank[12:], before[12:], rtol=0, atol=0)
        method.label(None, cameras)


def test_views_as_frames():
    """A view may hold several, as those of tracklets do: the styles of an image."""
    images, cameras, _ = world()
    method, styled = method_of(), method_of(views=1)
    features = features_of(method, images)
    labels = method.label(features, cameras)
    assert torch.equal(styled.label(features, cameras), labels)
    batch = batch_of(method, images, labels, cameras, torch.arange(12), seed=1)
    one = dataclasses.replace(batch, views=(torch.stack(batch.views, dim=1),))
    method.train(), styled.train()
    assert method.loss(batch) == styled.loss(one)


# --- labels ---------------------------------------------------------------------------------------


def test_when_there_are_labels():
    images, cameras, frames = world()
    method = method_of(first_labels=2, relabel_every=3, joint_from=5)
    features = features_of(method, images)
    told = []
    for epoch in range(9):
        labels = method.label(features if epoch == 0 else None, cameras, frames)
        assert labels.dtype == torch.int64
        assert (labels >= 0).all()
        told.append((method.clusters, method.histogram is not None))
        method.bank.add_(0.2 * randn(60, 16, seed=epoch))
    assert [one is not other for (one, _), (other, _) in itertools.pairwise(told)] == [
        *(False, True, False, False, True, False, False, True)
    ]
    assert [timed for _, timed in told] == [False] * 5 + [True] * 4
    assert method.histogram.shape == (3, 3, 3000)


def test_visual_labels_are_the_sources():
    """Re-ranked distances of all to all, eps as the mean of the smallest of them, DBSCAN."""
    images, cameras, _ = world()
    method = method_of(eps_factor=0.8)
    features = features_of(method, images)
    labels = method.label(features, cameras)
    distances = reference.rerank(features.numpy(), None, 8, 3, 0.3, variant="jvtc")
    eps = 0.8 * reference.mean_smallest(distances, 0.05)
    assert method.clusters.eps == pytest.approx(eps, abs=4e-3)
    clear = abs(distances - eps).min() > 4e-3  # else rounding to half precision may tell
    expected = reference.dbscan(distances, method.clusters.eps, 1)
    assert not clear or labels.tolist() == expected.tolist()
    assert (labels.numpy() == expected).mean() > 0.9


def test_joint_labels():
    """Two people who look alike are told apart by when they were seen."""
    images, cameras, frames = world(ids=12)
    images = images.clone()
    features = F.normalize(images.flatten(1))
    features[6:12] = F.normalize(features[:6] + 0.05 * randn(6, 96, seed=7))
    features = features.contiguous()
    config = Clustering(k1=8, k2=3, rho=0.06, min_samples=1, variant="jvtc")
    looks = cluster_distances(ops.rerank(features, None, 8, 3, 0.3, variant="jvtc"), config)
    assert looks.labels[0] == looks.labels[6]
    truth = torch.arange(12).repeat_interleave(6)
    histogram = ops.time_histogram(truth, cameras, frames, sigma=1.0)
    found = joint_labels(features, truth, cameras, frames, config, histogram=histogram)
    assert isinstance(found, type(looks))
    distances = ops.joint_distance(features, cameras, frames, histogram)
    distances = ops.rerank_distances(distances, None, None, 8, 3, 0.5, variant="jvtc")
    again = cluster_distances(distances, config)
    assert torch.equal(found.labels, again.labels)
    same, other = distances[:6, :6], distances[:6, 6:12]
    assert same.mean() < other.mean() - 0.05
    # A config of another method, whose variant takes features alone.
    gcl = Clustering(k1=8, k2=3, rho=0.06, min_samples=2)
    labels = cluster(features, None, gcl).labels
    assert joint_labels(features, labels, cameras, frames, gcl).labels.shape == (72,)


def test_joint_distances_of_test_images():
    images, cameras, frames = world()
    method = method_of(joint_from=0)
    features = features_of(method, images)
    test = features[:7], features[7:], cameras[:7], cameras[7:]
    assert method.distances(*test, frames[:7], frames[7:]) == {}
    method.label(features, cameras, frames)
    (found,) = method.distances(*test, frames[:7], frames[7:]).values()
    whole = ops.joint_distance(features, cameras, frames, method.histogram)
    torch.testing.assert_close(found, whole[:7, 7:])
    assert method.distances(*test, frames[:7], torch.full((53,), -1)) == {}
    further = cameras.clone()
    further[9] = 5  # nobody was seen there
    (other,) = method.distances(*test[:3], further[7:], frames[:7], frames[7:]).values()
    torch.testing.assert_close(other[:, 3:], found[:, 3:])


def test_frames_that_nobody_knows():
    images, cameras, frames = world()
    for unknown in (None, torch.full_like(frames, -1)):
        method = method_of(joint_from=0)
        method.label(features_of(method, images), cameras, unknown)
        assert method.histogram is None
        assert method.clusters.found > 1


def test_labels_in_joint_time():
    images, cameras, frames = world()
    method = method_of(joint_from=0)
    labels = method.label(features_of(method, images), cameras.numpy(), frames.numpy())
    assert method.histogram.shape == (3, 3, 3000)
    assert labels.shape == (60,)


def test_uniform_bank():
    images, cameras, _ = world()
    torch.manual_seed(4)
    method = method_of(bank_init="uniform", first_labels=3)
    torch.manual_seed(4)
    method.label(features_of(method, images), cameras)
    torch.manual_seed(4)
    assert torch.equal(method.bank, torch.rand(60, 16))


# --- training, state, options ---------------------------------------------------------------------


def pictures(count=48, seed=0):
    rng = np.random.default_rng(seed)
    shades = rng.integers(40, 200, (count // 6, 2, 1, 3))
    pixels = np.repeat(np.repeat(shades, 6, axis=0), 8, axis=1).repeat(8, axis=2)
    pixels = (pixels + rng.integers(-25, 25, pixels.shape)).clip(0, 255).astype(np.uint8)
    rows = np.arange(count)
    return ImageArrays(pixels, None, rows // 6, rows % 3, 3000 * (rows // 6) + 400 * (rows % 3))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 16), nn.BatchNorm1d(16)
        )

    def forward(self, images):
        return self.layers(images)


SHORT = {"views": 2, "first_labels": 1, "relabel_every": 1, "k1": 6, "k2": 2, "rho": 0.08}


def fit(data, output=None, *, views=2, **changes):
    torch.manual_seed(0)
    config = Config(**SHORT | {"joint_from": 1, "views": views})
    options_ = {"epochs": 3, "steps": 3, "batch_size": 12, "optimizer": "sgd", "device": "cpu"}
    options_ |= {"height": 16, "width": 8, "warmup_epochs": 0, "learning_rate": 0.01}
    return train.fit(config, Small(), data, train.Training(**options_ | changes), output=output)


def test_fit_hands_frames_over(tmp_path):
    images = pictures()
    data = ReidData(
        "made", images, images.select(slice(0, None, 2)), images.select(slice(1, None, 2))
    )
    result = fit(data, tmp_path / "run")
    assert set(result.evaluation.by_distance) == {"joint"}
    assert [set(entry["losses"]) for entry in result.history] == [
        *({"local"}, {"local", "global"}, {"local", "global"}),
    ]
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["method"]["_extra_state"]
    assert state["histogram"].shape == (3, 3, 3000)
    assert state["epoch"] == 2


def test_styles_as_tracklets():
    """An image and its styles, as frames: a view takes some of them."""
    images = pictures()
    frames = pictures(96, seed=1)
    data = ReidData("styled", Tracklets(frames, np.arange(96).reshape(48, 2), images.names))

    class Clips(Small):
        def forward(self, images):
            features = super().forward(images.flatten(0, -4))
            return (
                features if images.dim() == 4 else features.unflatten(0, images.shape[:2]).mean(1)
            )

    torch.manual_seed(0)
    config = Config(**SHORT | {"views": 1})
    training = train.Training(
        epochs=2, steps=2, batch_size=12, height=16, width=8, frames=2, device="cpu"
    )
    result = train.fit(config, Clips(), data, training)
    assert all(np.isfinite(list(entry["losses"].values())).all() for entry in result.history)


def test_camstyle(tmp_path):
    names = ["0002_c1s1_000451_03", "0002_c2s1_000007_01"]
    for k, name in enumerate(names):
        for file in (
            f"real/{name}.jpg",
            f"styles/{name}_fake_{k + 1}to3.jpg",
            f"styles/{name}_fake_{k + 1}to4.jpg",
        ):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 16), (50 + 100 * k, len(file), 0)).save(tmp_path / file)
    images = ImageFiles(tmp_path / "real", [f"{n}.jpg" for n in names], [2, 2], [0, 1], [451, 7])
    styled = camstyle(images, tmp_path / "styles")
    assert styled.names == images.names
    assert (styled.ids.tolist(), styled.cameras.tolist()) == ([2, 2], [0, 1])
    assert styled.frames.tolist() == [451, 7]
    clip, _, _ = styled[1]
    assert len(clip) == 3
    assert [abs(np.asarray(image)[0, 0, 0] - 150.0) < 9 for image in clip] == [True] * 3
    (tmp_path / "styles" / f"{names[1]}_fake_2to3.jpg").unlink()
    assert len(camstyle(images, tmp_path / "styles")[1][0]) == 2
    (tmp_path / "styles" / f"{names[1]}_fake_2to4.jpg").unlink()
    with pytest.raises(ValueError) as error:
        camstyle(images, tmp_path / "styles")
    wanted = f"must hold copies of every image, got none such as {names[1]}_fake_1to2.jpg"
    assert str(error.value) == f"camstyle: {tmp_path / 'styles'} {wanted}"


def test_state_goes_on(tmp_path):
    images, cameras, frames = world()
    method = method_of(joint_from=0)
    labels = method.label(features_of(method, images), cameras, frames)
    batch = batch_of(method.train(), images, labels, cameras, torch.arange(12), seed=1)
    method.loss(batch)
    method.update(batch)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = method_of(joint_from=0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not other.wants_features
    assert method.loss(batch) == other.loss(batch)
    for each in (method, other):
        each.update(batch)
    assert torch.equal(method.bank, other.bank)
    for each in (method, other):
        each.label(None, cameras, frames)
    assert torch.equal(method.labels, other.labels)
    method_of().load_state_dict(method_of().state_dict())  # before any label


def test_step_sizes():
    method = method_of()
    training = train.Training(optimizer="sgd", learning_rate=0.01, weight_decay=0.1)
    for kind in ("sgd", "adam"):
        chosen = dataclasses.replace(training, optimizer=kind)
        (optimizer,) = method.optimizers(chosen).values()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
        counts = [len(group["params"]) for group in optimizer.param_groups]
        assert counts == [2, 2]
        assert isinstance(optimizer, torch.optim.SGD if kind == "sgd" else torch.optim.Adam)
    plain = JVTC(Small())
    (optimizer,) = plain.optimizers(training).values()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01]
    for weight in plain.parameters():
        weight.requires_grad_(False)
    with pytest.raises(ValueError, match="must have parameters that require a gradient, got none"):
        plain.optimizers(training)


def test_views_of_the_released_code():
    view = transforms.make("erased", 256, 128)
    assert (view.pad, view.flip, view.blur, view.erase, view.erased) == (0, 0.5, 0, 0.5, 0.2)
    white = Image.new("RGB", (64, 128), "white")
    torch.manual_seed(0)
    shares = np.array([(view(white)[0] < 1).float().mean().item() for _ in range(200)])
    assert 0.35 < (shares > 0).mean() < 0.65
    assert 0.15 < shares.max() < 0.205


def test_released_values():
    config = Config()
    assert (config.k1, config.k2, config.rho, config.min_samples) == (20, 6, 0.0016, 1)
    assert (config.lambda_value, config.joint_lambda, config.variant) == (0.3, 0.5, "jvtc")
    assert (config.first_labels, config.relabel_every, config.joint_from) == (10, 5, 30)
    assert (config.local_temperature, config.temperature, config.global_weight) == (0.1, 0.05, 0.2)
    assert (config.views, JVTC.recipe["batch_size"], JVTC.recipe["epochs"]) == (4, 32, 100)
    released = Config.preset("released")
    assert (released.bank_norm, released.bank_init) == (False, "uniform")
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Config, "jvtc")
    line = ["--joint-from", "2", "--views", "3", "--no-bank-norm", "--variant", "mmt"]
    found = options.from_arguments(Config(), parser.parse_args(line))
    changes = {"joint_from": 2, "views": 3, "bank_norm": False, "variant": "mmt"}
    assert found == dataclasses.replace(Config(), **changes)


def test_errors():
    images, cameras, _ = world()
    method = method_of()
    rows = torch.arange(4)
    batch = Batch((images[:4],) * 2, rows, rows, rows)
    cases = [
        (lambda: method.loss(batch), "JVTC.loss: label() must have been called"),
        (
            lambda: method.label(None, cameras),
            "JVTC.label: features must be given the first time, got None",
        ),
        (lambda: Config(views=0), "Config: views must be at least 1, got 0"),
        (lambda: Config(joint_lambda=2.0), "Config: joint_lambda must lie in [0, 1], got 2.0"),
        (lambda: Config(eps_factor=0.0), "Config: eps_factor must be positive, got 0.0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
    method.label(features_of(method, images), cameras)
    cases = [
        (
            lambda: method.loss(dataclasses.replace(batch, views=(images[:4],))),
            "JVTC.loss: batch must have 2 views erased, got 1",
        ),
        (
            lambda: method.label(None, cameras[:9]),
            "JVTC.label: cameras must be those of the 60 images it began with, got 9",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message
