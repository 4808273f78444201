"""GCL: steps against the released trainer's, each loss and switch, clusters of the bank, small data."""

import copy

import numpy as np
import pytest
import torch
from bodied import SIZE, data, part_encoder
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyreid import models, ops, reference, train
from pyreid.data import Batch
from pyreid.methods import gcl
from pyreid.methods.gcl import GCL, Config

N, CAMERAS = 48, 3
NETWORKS = {"generator_width": 1, "discriminator_width": 3, "discriminator_scales": 2}
SMALL = Config(k1=8, k2=3, rho=0.05, negatives=12, **NETWORKS)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def world():
    """(N, 3, 16, 8) photos of 8 people, body pictures (N, 1, 16, 8) and turned ones."""
    ids, cameras = torch.arange(N) % 8, torch.arange(N) % CAMERAS
    people = F.interpolate(randn(8, 3, 8, 4, seed=1), scale_factor=2)
    bodies = randn(2, N, 1, *SIZE, seed=2).clamp(-1, 1)
    return people[ids] + 0.3 * randn(N, 3, *SIZE, seed=3), *bodies, ids, cameras


def batch_of(rows, labels, dtype=torch.float32):
    photos, bodies, turned, _, cameras = world()
    rows = torch.as_tensor(rows)
    views = tuple(view[rows].to(dtype) for view in (photos, bodies, turned))
    return Batch(views, rows, labels[rows], cameras[rows])


# --- the released trainer, in plain torch -----------------------------------------------------------


def released_discriminator_loss(discriminator, x, fakes):
    """Each generated set with the photos again."""
    total = 0
    for y in fakes:
        x = x.detach().requires_grad_()
        for of_fake, of_photo in zip(discriminator(y.detach()), discriminator(x), strict=True):
            total = total + (of_fake**2).mean() + ((of_photo - 1) ** 2).mean()
            (slope,) = torch.autograd.grad(of_photo.sum(), x, create_graph=True)
            total = total + 0.01 * (slope**2).reshape(len(x), -1).sum(1).mean()
    return total


def released_contrast(a, b, bank, labels, rows, config, seed):
    a, b = F.normalize(a.float()), F.normalize(b.float())
    logits = [[], [], []]
    positives, negatives = reference.sample_rows(
        labels.numpy(), labels[rows].numpy(), positives=2, negatives=config.negatives, seed=seed
    )
    for i, row in enumerate(rows.tolist()):
        others = bank[torch.from_numpy(negatives[i])]
        p, q = bank[positives[i]]
        third = a[i] if config.neg_query_term3 == "real" else b[i]
        terms = ((b[i], bank[row], b[i]), (b[i], p, b[i]), (a[i], q, third))
        for kept, (view, own, against) in zip(logits, terms, strict=True):
            kept.append(torch.cat([(view @ own)[None], others @ against]) / config.temperature)
    first = torch.zeros(len(rows), dtype=torch.long)
    return sum(F.cross_entropy(torch.stack(each), first) for each in logits)


class Released:
    """Section by section as the released code has it: a pass of the encoder for every set of images."""

    def __init__(self, method):
        copied = copy.deepcopy((method.encoder, method.generator, method.discriminator))
        self.encoder, self.generator, self.discriminator = copied
        self.config, self.joint = method.config, method.joint

    def losses(self, x, body, turned):
        encode, decode = self.encoder.appearance_and_embedding, self.generator.decoder
        s, s_new = self.generator.structure(body), self.generator.structure(turned)
        f, self.e = encode(x)
        rec, new = decode(s, f), decode(s_new, f)
        f_rec, _ = encode(rec)
        f_new, self.e_new = encode(new)
        cycled = decode(s, f_new)
        f_cyc, _ = encode(cycled)
        yield released_discriminator_loss(self.discriminator, x, (rec, new, cycled))
        loss = 0
        for y in (rec, new, cycled):
            loss = loss + sum(2 * ((out - 1) ** 2).mean() for out in self.discriminator(y))
        for y, code in ((rec, f_rec), (cycled, f_cyc)):
            loss = loss + 5 * (y - x).abs().mean() + 5 * (code - f.detach()).abs().mean()
        yield loss

    def step(self, batch, bank, labels, optimizers, seed):
        phases = self.losses(*batch.views)
        loss = next(phases)
        optimizers["discriminator"].zero_grad()
        loss.backward()
        optimizers["discriminator"].step()
        loss = next(phases)
        if self.joint:
            loss = loss + released_contrast(
                self.e, self.e_new, bank.clone(), labels, batch.rows, self.config, seed
            )
            bank[batch.rows] = F.normalize(
                0.2 * bank[batch.rows] + 0.8 * F.normalize(self.e.detach().float())
            )
        names = ("generator", "encoder") if self.joint else ("generator",)
        for name in names:
            optimizers[name].zero_grad()
        loss.backward()
        for name in names:
            optimizers[name].step()
        return float(loss.detach())


@pytest.mark.parametrize("stage", ["2", "3"])
def test_steps_of_the_released_trainer(stage):
    config = Config(**SMALL.__dict__ | {"stage": stage, "temperature": 0.2, "gan_rate_joint": 1e-3})
    method = GCL(part_encoder(), config).double()
    method.train()
    theirs = Released(method)
    photos, _, _, ids, cameras = world()
    features = F.normalize(randn(N, 8, seed=5) + 2 * randn(8, 8, seed=6)[ids])
    labels = method.label(features if stage == "3" else None, cameras)
    bank, known = features.clone(), labels.clone()
    plan = method.sampler(labels, cameras, batch_size=6, rng=np.random.default_rng(0))
    training = train.Training(**GCL.recipe | {"learning_rate": 5e-3})
    ours = method.optimizers(training)
    for name in (
        "generator",
        "discriminator",
    ):  # else a bias that a norm undoes goes where noise does
        ours[name].param_groups[0]["eps"] = ours[name].defaults["eps"] = 1e-2
    others = {
        name: type(each)(getattr(theirs, name).parameters(), **each.defaults)
        for name, each in ours.items()
    }
    for step in range(4):
        batch = batch_of(next(plan), labels, torch.float64)
        torch.manual_seed(step)
        seed = int(torch.randint(2**62, ()))
        torch.manual_seed(step)
        for losses, names in method.phases(batch):
            for name in names:
                ours[name].zero_grad()
            total = sum(losses.values())
            total.backward()
            for name in names:
                ours[name].step()
        method.update(batch)
        expected = theirs.step(batch, bank, known, others, seed)
        assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
    for name in ("encoder", "generator", "discriminator"):
        for (key, mine), other in zip(
            getattr(method, name).state_dict().items(),
            getattr(theirs, name).state_dict().values(),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5, msg=f"{name}.{key}")
    if stage == "3":
        torch.testing.assert_close(method.bank, bank, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(method.bank, features)
    else:
        before = part_encoder().double().state_dict()
        for key, value in method.encoder.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_one_pass_of_the_discriminator_is_three():
    torch.manual_seed(0)
    discriminator = models.Discriminator(4, 2).double()
    for weight in discriminator.parameters():
        nn.init.normal_(weight, std=0.3)
    x, *fakes = randn(4, 3, 3, 16, 8).double()
    fakes = [each.requires_grad_() for each in fakes]
    weights = tuple(discriminator.parameters())
    terms = gcl.discriminator_loss(discriminator, x, fakes)
    assert set(terms) == {"fake", "real", "gradient"}
    expected = released_discriminator_loss(discriminator, x, fakes)
    torch.testing.assert_close(sum(terms.values()), expected)
    mine, theirs = (torch.autograd.grad(loss, weights) for loss in (sum(terms.values()), expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert "gradient" not in gcl.discriminator_loss(discriminator, x, fakes, gradient_weight=0)
    assert all(each.grad is None for each in fakes)


def test_r1_is_float32_under_autocast():
    torch.manual_seed(0)
    discriminator = models.Discriminator(4, 2)
    for weight in discriminator.parameters():
        nn.init.normal_(weight, std=0.3)
    x, *fakes = randn(4, 3, 3, 16, 8)
    expected = gcl.discriminator_loss(discriminator, x, fakes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = gcl.discriminator_loss(discriminator, x, fakes)
    for name in ("real", "gradient"):
        assert torch.equal(terms[name], expected[name])
    assert not torch.equal(terms["fake"], expected["fake"])
    torch.testing.assert_close(terms["fake"], expected["fake"], rtol=0.05, atol=0.01)


def test_the_generators_losses_leave_the_discriminator_alone():
    method = GCL(part_encoder(), Config(**SMALL.__dict__ | {"stage": "2"}))
    method.train()
    rows = torch.arange(6)
    batch = batch_of(rows, torch.full((N,), -1))
    made = method.generate(*batch.views)
    losses = gcl.generator_loss(method.discriminator, batch.views[0], made)
    assert set(losses) == {"adversarial", "reconstruction", "cycle", "appearance"}
    sum(losses.values()).backward()
    assert all(weight.grad is None for weight in method.discriminator.parameters())
    assert all(weight.requires_grad for weight in method.discriminator.parameters())
    assert all(weight.grad is None for weight in method.encoder.parameters())
    assert all(weight.grad is not None for weight in method.generator.parameters())


@pytest.mark.parametrize("third", ["generated", "real"])
def test_memory_contrast_against_cross_entropies(third):
    config = Config(negatives=9, temperature=0.3, neg_query_term3=third)
    bank = F.normalize(randn(30, 8, seed=1))
    labels = torch.arange(30) % 4
    labels[::7] = -1
    rows = torch.tensor([1, 2, 3, 1])
    grads = []
    for ours in (True, False):
        a, b = (randn(4, 8, seed=k).requires_grad_() for k in (2, 3))
        if ours:
            loss = gcl.memory_contrast(
                a,
                b,
                bank,
                labels,
                rows,
                temperature=0.3,
                negatives=9,
                seed=5,
                neg_query_term3=third,
            )
        else:
            loss = released_contrast(a, b, bank, labels, rows, config, 5)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@given(st.integers(2, 20), st.integers(1, 40), st.integers(0, 2**32), st.booleans())
def test_each_negative_counts_once_however_many_are_asked_for(count, asked, seed, own):
    """Asking for more rows than there are is asking for all."""
    bank = F.normalize(randn(count, 4, seed=1))
    labels = torch.arange(count) % 3 - (torch.arange(count) % 5 == 4).long()
    rows = torch.tensor([0, 1])
    a, b = randn(2, 4, seed=2), randn(2, 4, seed=3)
    loss = gcl.memory_contrast(
        a, b, bank, labels, rows, negatives=asked, seed=seed, pos_may_be_self=own
    )
    assert torch.isfinite(loss)
    others = (labels != labels[rows][:, None]).sum(1)
    if asked >= others.max():
        more = gcl.memory_contrast(
            a, b, bank, labels, rows, negatives=8192, seed=seed, pos_may_be_self=own
        )
        expected = 0.0
        unit_a, unit_b = F.normalize(a), F.normalize(b)
        drawn, _ = ops.sample_rows(
            labels,
            labels[rows],
            positives=2,
            negatives=1,
            seed=seed,
            exclude_self=None if own else rows,
        )
        for i, row in enumerate(rows.tolist()):
            against = 25 * bank[labels != labels[row]] @ unit_b[i]
            pairs = ((unit_b, row), (unit_b, drawn[i, 0]), (unit_a, drawn[i, 1]))
            for view, positive in pairs:
                logit = 25 * bank[positive] @ view[i]
                expected += torch.logsumexp(torch.cat([logit[None], against]), 0) - logit
        torch.testing.assert_close(more, expected / 2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(loss, more, rtol=1e-4, atol=1e-4)


def test_positives_may_be_kept_from_being_oneself():
    bank = F.normalize(randn(6, 4, seed=1))
    labels, rows = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0])
    a, b = randn(1, 4, seed=2), randn(1, 4, seed=3)
    with_self = {
        round(float(gcl.memory_contrast(a, b, bank, labels, rows, seed=seed)), 4)
        for seed in range(12)
    }
    without = {
        round(
            float(gcl.memory_contrast(a, b, bank, labels, rows, seed=s, pos_may_be_self=False)), 4
        )
        for s in range(12)
    }
    assert (len(with_self), len(without)) == (2, 1)  # (own, other) or (other, own); or other alone


def test_two_processes_draw_what_one_does(monkeypatch):
    bank, labels = F.normalize(randn(40, 8, seed=1)), torch.arange(40) % 5
    a, b, rows = randn(4, 8, seed=2), randn(4, 8, seed=3), torch.tensor([1, 7, 30, 12])
    one = gcl.memory_contrast(a, b, bank, labels, rows, negatives=9, seed=4)
    halves = []
    monkeypatch.setattr(gcl.distributed, "gather_rows", lambda part, equal: rows)
    for own in (range(2), range(2, 4)):
        monkeypatch.setattr(gcl.distributed, "share", lambda count, own=own: own)
        part = slice(own.start, own.stop)
        halves.append(
            gcl.memory_contrast(a[part], b[part], bank, labels, rows[part], negatives=9, seed=4)
        )
    torch.testing.assert_close(sum(halves) / 2, one)


def test_labels_are_of_the_bank():
    method = GCL(part_encoder(), SMALL)
    _, _, _, ids, cameras = world()
    features = F.normalize(randn(N, 8, seed=5) + 3 * randn(8, 8, seed=6)[ids])
    assert method.wants_features
    with pytest.raises(ValueError, match="features must be given the first time"):
        method.label(None, cameras)
    first = method.label(2 * features, cameras)
    torch.testing.assert_close(method.bank, features)
    graph = ops.jaccard_graph(features, 8, 3)
    eps = ops.mean_smallest(graph, 0.05)
    assert torch.equal(first, ops.dbscan(graph, eps, 4))
    assert not method.wants_features
    method.bank = F.normalize(randn(N, 8, seed=9) + 3 * randn(8, 8, seed=6)[ids.flip(0)])
    assert not torch.equal(method.label(None, cameras), first)
    with pytest.raises(ValueError, match="cameras must be those of the 48 images"):
        method.label(None, cameras[:4])


def test_generated_images_may_leave_running_statistics_alone():
    moved = {}
    for rule in ("shared", "apart"):
        method = GCL(part_encoder(), Config(**SMALL.__dict__ | {"bn_generated": rule}))
        method.train()
        batch = batch_of(torch.arange(6), torch.zeros(N, dtype=torch.long))
        norm = method.encoder.backbone[1]
        method.generate(*batch.views)
        moved[rule] = norm.running_mean.clone()
        assert norm.num_batches_tracked == (4 if rule == "shared" else 1)
    plain = part_encoder()
    plain(batch.views[0])
    torch.testing.assert_close(moved["apart"], plain.backbone[1].running_mean)
    assert not torch.allclose(moved["shared"], moved["apart"])


def test_views_and_widths_follow_the_config():
    assert GCL(part_encoder(), SMALL).views == ("plain", "mesh", "turned mesh")
    released = Config.preset("released")
    method = GCL(part_encoder(), Config(**SMALL.__dict__ | {"angles": released.angles}))
    assert method.views == ("plain", "mesh", "turned mesh to 270")
    assert Config.preset("msmt17").rho == 0.0012
    assert Config().negatives == 8192
    networks = {"generator": method.generator, "discriminator": method.discriminator}
    again = GCL(part_encoder(), SMALL, **networks)
    assert again.generator is method.generator
    with pytest.raises(ValueError, match="encoder must tell appearance_and_embedding"):
        GCL(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="batch must have views plain, mesh, turned mesh"):
        next(again.phases(Batch((torch.zeros(1),), *3 * [torch.zeros(1)])))


@pytest.mark.parametrize("stage", ["2", "3"])
def test_half_precision_is_near(stage):
    losses = []
    for half in (False, True):
        method = GCL(part_encoder(), Config(**SMALL.__dict__ | {"stage": stage}))
        method.train()
        method.bank, method.labels = F.normalize(randn(N, 8, seed=5)), torch.arange(N) % 8
        batch = batch_of(torch.arange(4), method.labels)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses.append({k: v for terms, _ in method.phases(batch) for k, v in terms.items()})
    for name, value in losses[0].items():
        assert losses[1][name].dtype == torch.float32
        torch.testing.assert_close(losses[1][name], value, rtol=0.1, atol=0.01, msg=name)


@pytest.mark.parametrize("stage, rate", [("2", 1e-4), ("3", 1e-5)])
def test_optimizers(stage, rate):
    method = GCL(part_encoder(), Config(**SMALL.__dict__ | {"stage": stage}))
    made = method.optimizers(train.Training(**GCL.recipe))
    assert list(made) == ["generator", "discriminator", *["encoder"] * (stage == "3")]
    for name in ("generator", "discriminator"):
        assert made[name].defaults["lr"] == rate
        assert made[name].defaults["betas"] == (0.0, 0.999)
        assert made[name].defaults["weight_decay"] == 5e-4
    if stage == "3":
        assert isinstance(made["encoder"], torch.optim.SGD)
        assert made["encoder"].defaults["nesterov"]
        assert made["encoder"].defaults["lr"] == 3.5e-4


# --- runs -------------------------------------------------------------------------------------------


TRAINING = train.Training(
    **GCL.recipe | {"epochs": 2, "batch_size": 4, "height": 16, "width": 8, "learning_rate": 1e-3}
)
FEW = Config(**SMALL.__dict__ | {"k1": 4, "k2": 2, "rho": 0.1, "negatives": 8192, "min_samples": 2})


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(stage, tmp_path, monkeypatch):
    config = Config(**FEW.__dict__ | {"stage": stage})
    whole = GCL(part_encoder(), config)
    result = train.fit(whole, None, data(), TRAINING, output=tmp_path / "whole")
    assert np.isfinite(sum(result.history[-1]["losses"].values()))
    assert {"last.pt", "generator.pt", "discriminator.pt"} <= {
        path.name for path in (tmp_path / "whole").iterdir()
    }

    class Stopped(Exception):
        pass

    steps = 0
    update = GCL.update

    def stops(self, batch):
        nonlocal steps
        steps += 1
        update(self, batch)
        if steps == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(GCL, "update", stops)
    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        train.fit(GCL(part_encoder(), config), None, data(), TRAINING, output=tmp_path / "cut")
    monkeypatch.undo()
    torch.manual_seed(8)
    cut = GCL(part_encoder(), config)
    train.fit(cut, None, data(), TRAINING, output=tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(cut.state_dict()[name], value, msg=name)
    if stage == "3":
        torch.testing.assert_close(cut.bank, whole.bank)


def test_what_small_data_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"a batch of 32 must have as many images, got 24"):
        train.fit(
            GCL(part_encoder(), Config(**FEW.__dict__ | {"stage": "2"})),
            None,
            data(),
            train.Training(**TRAINING.__dict__ | {"batch_size": 32}),
        )
    none = Config(**FEW.__dict__ | {"rho": None, "eps": 1e-6, "min_samples": 20})
    with pytest.raises(ValueError, match=r"its 0 clusters: .*got 0 in clusters; eps 1e-06 may be"):
        train.fit(GCL(part_encoder(), none), None, data(), TRAINING)
    one = GCL(part_encoder(), Config(**FEW.__dict__ | {"k1": 12, "rho": None, "eps": 1.0}))
    with pytest.raises(ValueError, match=r"got one of all 24 images; eps 1.0 is too large"):
        one.label(1 + 0.2 * randn(24, 8), torch.zeros(24))
    with pytest.raises(ValueError, match="data must be MeshedImages"):
        train.fit(GCL(part_encoder(), FEW), None, data().stills(), TRAINING)


def test_render_draws_each_pose():
    method = GCL(part_encoder(), FEW)
    photos, bodies, turned, _, _ = world()
    several = torch.stack([bodies, turned, bodies], dim=1)[:5]
    method.train()
    drawn, cycled = method.render(photos[:5], several)
    assert method.training
    assert drawn.shape == (5, 3, 3, *SIZE)
    method.eval()
    appearance, _ = method.encoder.appearance_and_embedding(photos[:5])
    torch.testing.assert_close(drawn[:, 0], drawn[:, 2])
    torch.testing.assert_close(drawn[:, 1], method.generator(turned[:5], appearance).detach())
    again, _ = method.encoder.appearance_and_embedding(drawn[:, 1])
    torch.testing.assert_close(cycled, method.generator(bodies[:5], again).detach())
