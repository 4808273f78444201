"""SCL: steps against the released trainer's, each rule and switch, ranks, the network, distances."""

import argparse
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pyreid import cli, distributed, evaluation, models, ops, options, reference
from pyreid.data import Batch, ImageArrays
from pyreid.losses import SelectiveContrast
from pyreid.memory import MemoryBank
from pyreid.methods import scl
from pyreid.methods.scl import SCL, Config
from pyreid.models import StripeEncoder, build_encoder

N, CAMERAS = 48, 3
PARTS = (32, 8, 8, 8, 8)
SMALL = {"neighbours": 3, "negatives": 12, "initial_epochs": 1}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_parts(count, parts=PARTS, seed=0):
    return torch.cat([F.normalize(randn(count, p, seed=seed + k)) for k, p in enumerate(parts)], 1)


def striped(seed=0, **changes):
    """A network for 16x8 images, whose map has four rows."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.BatchNorm2d(24), nn.ReLU())
    sizes = {"embedding": 32, "stripes": 4, "stripe_embedding": 8} | changes
    return build_encoder(backbone, size=(16, 8), **sizes)


# --- the released trainer, in plain torch -----------------------------------------------------------


class Logits(torch.autograd.Function):
    """Scores of the rows of X, whose backward reads, then moves, X: term by term, sample by sample."""

    @staticmethod
    def forward(ctx, query, bank, listed, own, moves):
        ctx.query, ctx.bank, ctx.listed, ctx.own, ctx.moves = query, bank, listed, own, moves
        return 10 * torch.einsum("bd,bad->ba", query, bank[listed])

    @staticmethod
    def backward(ctx, grad):
        grad = 10 * torch.einsum("ba,bad->bd", grad, ctx.bank[ctx.listed])
        if ctx.moves:
            write(ctx.bank, ctx.query, ctx.own)
        return grad, None, None, None, None


def write(bank, queries, rows):
    for query, row in zip(queries, rows.tolist(), strict=True):
        bank[row] = F.normalize((bank[row] + query) / 2, dim=0)


class Released:
    """Section by section as the released code has it; `config` only for numbers and switches."""

    def __init__(self, encoder, config, images, cameras):
        self.encoder, self.config, self.cameras = encoder, config, cameras
        with torch.no_grad():
            encoder.eval()
            self.G, self.L = self.network(images)
            encoder.train()
        self.X = torch.zeros_like(self.G)

    def network(self, images):
        """(B, Dg) global and (S, B, Ds) local features."""
        encoder = self.encoder
        clips = images.dim() == 5
        maps = encoder.backbone(images.flatten(0, 1) if clips else images)
        pooled = [maps.mean((2, 3))]
        for s in range(4):
            pooled.append(maps[:, :, s : s + 1].mean((2, 3)))  # the map has four rows
        if clips:
            pooled = [x.view(*images.shape[:2], -1).mean(1) for x in pooled]
        g = F.normalize(encoder.neck(encoder.embedding(pooled[0])), dim=1)
        local = [head(x) for head, x in zip(encoder.stripes, pooled[1:], strict=True)]
        return g, torch.stack([F.normalize(x, dim=1) for x in local])

    def select(self, g, local, rows, epoch):
        config = self.config
        if epoch <= config.initial_epochs:
            seed = int(torch.randint(2**62, ()))
            nobody, count = np.full(N, -1), config.neighbours + config.negatives
            order = reference.sample_rows(nobody, [-1], positives=1, negatives=N, seed=seed)[1][0]
            negatives = []
            for row in rows.tolist():
                if config.init_negatives == "released":
                    without = np.delete(order, row)
                else:
                    without = order[order != row]
                negatives.append(without[:count])
            return rows[:, None], torch.tensor(np.stack(negatives))
        distance = config.global_weight * torch.cdist(g, self.G) ** 2
        for s in range(4):
            distance += (1 - config.global_weight) / 4 * torch.cdist(local[s], self.L[s]) ** 2
        distance += config.camera_weight * (self.cameras[rows][:, None] == self.cameras)
        positives, negatives = [], []
        for i, row in enumerate(rows.tolist()):
            ranking = distance[i].argsort()
            ranking = ranking[ranking != row]
            positives.append(torch.cat([rows[i : i + 1], ranking[: config.neighbours]]))
            negatives.append(ranking[config.neighbours :][: config.negatives])
        return torch.stack(positives), torch.stack(negatives)

    def loss(self, images, rows, epoch):
        config = self.config
        g, local = self.network(images)
        query = {"global": g, "local": torch.cat(list(local), dim=1)}
        if config.local_query_norm == "unit":
            query["local"] = query["local"] / 2
        with torch.no_grad():
            self.positives, self.negatives = self.select(g, local, rows, epoch)
        places = self.positives.shape[1]
        listed = torch.cat([self.positives, self.negatives], dim=1)
        self.g, self.l, self.query = g.detach(), local.detach(), query
        share = config.alpha * (1 - config.self_weight) / config.neighbours
        weights = {"global": 1 - config.local_weight, "local": config.local_weight}
        terms = {}
        for branch, weight in weights.items():
            total = 0.0
            for j in range(places):
                own = self.positives[:, j]
                moves = config.grad_bank == "progressive"
                if config.neighbour_write == "anchor":
                    moves = moves and j == 0
                logits = Logits.apply(query[branch], self.X, listed, own, moves)
                target = torch.full((len(rows),), j)
                c = config.self_weight if j == 0 else share
                total = total + c * F.cross_entropy(logits, target)
            terms[branch] = weight * total
        return terms

    def update(self, rows):
        config = self.config
        if config.grad_bank == "snapshot":
            for branch in ("local", "global"):
                for j in reversed(range(self.positives.shape[1])):
                    if j == 0 or config.neighbour_write == "neighbours":
                        write(self.X, self.query[branch].detach(), self.positives[:, j])
        self.G[rows] = F.normalize(0.5 * self.G[rows] + 0.5 * self.g, dim=1)
        self.L[:, rows] = F.normalize(0.5 * self.L[:, rows] + 0.5 * self.l, dim=2)


def world(clips=0):
    """(N, 3, 16, 8) images, or (N, T, 3, 16, 8) clips, of 12 people in 3 cameras."""
    ids, cameras = torch.arange(N) // 4, torch.arange(N) % CAMERAS
    people = F.interpolate(randn(12, 3, 8, 4, seed=1), scale_factor=2)
    seen = F.interpolate(randn(CAMERAS, 3, 2, 1, seed=2), scale_factor=8)
    images = people[ids] + 0.5 * seen[cameras]
    if clips:
        images = images[:, None].expand(-1, clips, -1, -1, -1)
    return images + 0.5 * randn(*images.shape, seed=3), cameras


SWITCHES = {
    "default": {},
    "released": Config.presets["released"],
    "unit query": {"local_query_norm": "unit", "local_weight": 0.3},
    "anchor": {"neighbour_write": "anchor", "camera_weight": 0.4},
    "anchor, progressive": {"neighbour_write": "anchor", "grad_bank": "progressive"},
    "clips": {},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_twenty_steps_of_the_released_trainer(name):
    config = Config(**SMALL, **SWITCHES[name])
    images, cameras = world(clips=2 if name == "clips" else 0)
    encoder = striped()
    theirs = Released(copy.deepcopy(encoder), config, images, cameras)
    method = SCL(encoder, config)
    with torch.no_grad():
        features = encoder.eval()(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(N))
    both = [torch.optim.SGD(e.parameters(), lr=0.01) for e in (encoder, theirs.encoder)]
    method.train()
    plan = method.sampler(torch.zeros(N), cameras, batch_size=8, rng=np.random.default_rng(0))
    for step in range(20):
        if step % 6 == 0:
            assert method.wants_features == (step == 0)
            labels = method.label(features if step == 0 else None, cameras)
            assert labels.tolist() == [-1] * N
            epoch = step // 6 + 1
        rows = torch.as_tensor(next(plan))
        given = images[rows] + 0.1 * randn(*images[rows].shape, seed=step)
        batch = Batch((given,), rows, labels[rows], cameras[rows])
        for optimizer in both:
            optimizer.zero_grad()
        torch.manual_seed(step)
        before = method.mixture.clone(), method.bank.clone()
        terms = method.loss(batch)
        sum(terms.values()).backward()
        assert torch.equal(method.mixture, before[0])
        assert torch.equal(method.bank, before[1])  # loss is pure
        torch.manual_seed(step)
        expected = theirs.loss(given, rows, epoch)
        sum(expected.values()).backward()

        torch.manual_seed(step)
        positives, negatives = method.select(method._latest[0], rows, cameras[rows])
        assert torch.equal(positives, theirs.positives)
        assert torch.equal(negatives, theirs.negatives)
        assert positives.shape == (8, 1 if epoch == 1 else 4)
        for branch, value in expected.items():
            torch.testing.assert_close(terms[branch], value, rtol=1e-4, atol=1e-5)
        for p, q in zip(encoder.parameters(), theirs.encoder.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        for optimizer in both:
            optimizer.step()
        # Roundings of a step grow within the network from step to step: it is theirs, the banks are ours.
        encoder.load_state_dict(theirs.encoder.state_dict())
        method.update(batch)
        theirs.update(rows)
        own = [method.mixture, *method.bank.split(PARTS, dim=1)]
        for ours, bank in zip(own, [theirs.X, theirs.G, *theirs.L], strict=True):
            torch.testing.assert_close(ours, bank, rtol=0, atol=1e-5)
    assert min(value.item() for value in expected.values()) > 0.1  # there was something to compare


# --- rules ----------------------------------------------------------------------------------------


@given(
    st.integers(3, 40), st.integers(1, 8), st.integers(0, 9), st.integers(1, 20), st.integers(0, 99)
)
def test_select(size, batch, neighbours, negatives, seed):
    bank, rows = rows_of_parts(size, seed=seed), torch.arange(batch) % size
    features, cameras = rows_of_parts(batch, seed=seed + 50), torch.arange(size) % 3
    positives, others = scl.select(
        features,
        bank,
        rows,
        parts=PARTS,
        neighbours=neighbours,
        negatives=negatives,
        global_weight=0.3,
        cameras=cameras[rows],
        bank_cameras=cameras,
        camera_weight=0.5,
    )
    parts = zip(features.split(PARTS, 1), bank.split(PARTS, 1), (0.3, *[0.175] * 4), strict=True)
    distance = sum(weight * torch.cdist(f.double(), b.double()) ** 2 for f, b, weight in parts)
    distance += 0.5 * (cameras[rows][:, None] == cameras)
    distance[torch.arange(batch), rows] = -1
    ranking = distance.argsort(dim=1)
    count = min(neighbours, size - 2)
    assert torch.equal(positives, ranking[:, : 1 + count])
    assert torch.equal(others, ranking[:, 1 + count :][:, :negatives])


@pytest.mark.parametrize("window", ["gap", "quantile"])
def test_adaptive_windows(window):
    """Two crowds, a dense one and a loose one: in the dense one more rows are near."""
    dense = F.normalize(randn(1, 16) + 0.1 * randn(40, 16, seed=1))
    loose = F.normalize(randn(1, 16, seed=2) + 1.2 * randn(40, 16, seed=3))
    bank, rows = torch.cat([dense, loose]), torch.arange(80)
    call = {"parts": (16,), "neighbours": 3, "negatives": 30}
    fixed = scl.select(bank, bank, rows, **call)
    found = scl.select(bank, bank, rows, **call, window=window, gap=0.15, quantile=0.4)
    assert torch.equal(found.positives, fixed.positives)
    scores = (bank @ bank.T).gather(1, fixed.negatives)
    if window == "gap":
        last = (bank @ bank.T).gather(1, fixed.positives[:, -1:])
        kept = scores >= last - 0.15
    else:
        kept = scores >= scores.quantile(0.4, interpolation="lower")
        assert int(kept.sum()) == pytest.approx(0.6 * scores.numel(), abs=2)
    kept[:, 0] = True
    assert torch.equal(found.negatives, torch.where(kept, fixed.negatives, -1))
    counts = (found.negatives >= 0).sum(dim=1)
    assert counts[:40].min() > counts[40:].float().mean()
    assert counts.min() >= 1


def test_adaptive_extremes():
    bank, rows = rows_of_parts(30), torch.arange(30)
    call = {"parts": PARTS, "neighbours": 2, "negatives": 10}
    every = scl.select(bank, bank, rows, **call)
    for rule in ({"window": "gap", "gap": 9.0}, {"window": "quantile", "quantile": 0.0}):
        assert torch.equal(scl.select(bank, bank, rows, **call, **rule).negatives, every.negatives)
    one = scl.select(bank, bank, rows, **call, window="gap", gap=-9.0)
    assert torch.equal(one.negatives[:, 0], every.negatives[:, 0])
    assert (one.negatives[:, 1:] == -1).all()


def test_random_window():
    bank, rows = rows_of_parts(60), torch.arange(60)
    call = {"parts": PARTS, "neighbours": 5, "negatives": 30}
    fixed = scl.select(bank, bank, rows, **call)
    found = scl.select(bank, bank, rows, **call, window="random", seed=3)
    assert torch.equal(found.positives, fixed.positives)
    drawn = scl.random_negatives(rows, 60, 30, seed=3)
    for own, others, free in zip(found.positives, found.negatives, drawn, strict=True):
        assert torch.equal(others, torch.where(torch.isin(free, own), -1, free))
    assert not torch.equal(
        found.negatives, scl.select(bank, bank, rows, **call, window="random", seed=4).negatives
    )


@given(st.integers(2, 60), st.integers(1, 70), st.integers(0, 2**62))
def test_random_negatives(size, count, seed):
    rows = torch.arange(size)
    found = scl.random_negatives(rows, size, count, seed=seed)
    assert found.shape == (size, min(count, size - 1))
    assert (found != rows[:, None]).all()
    order = scl.random_negatives(rows[:1] - 1, size, size - 1, seed=seed)[0].tolist()  # nobody's
    for row, own in enumerate(found.tolist()):
        without = [other for other in order if other != row]
        assert own[: len(without)] == without[: len(own)]
    # The released rule leaves out the place of that number, and so some images meet themselves.
    released = scl.random_negatives(rows, size, count, seed=seed, rule="released")
    whole = torch.tensor(order + list({*range(size)} - {*order}))
    for row, own in enumerate(released):
        assert torch.equal(own, torch.cat([whole[:row], whole[row + 1 :]])[: len(own)])


def test_random_negatives_are_uniform():
    counts, own = torch.zeros(50), 0
    rows = torch.arange(8)
    for seed in range(400):
        counts += torch.bincount(
            scl.random_negatives(rows, 50, 10, seed=seed).flatten(), minlength=50
        )
        released = scl.random_negatives(rows, 50, 10, seed=seed, rule="released")
        own += int((released == rows[:, None]).sum())
    assert counts[8:].min() > 0.7 * counts[8:].mean()
    assert own / (8 * 400) == pytest.approx(10 / 50, abs=0.04)


def test_one_call_is_the_events_one_after_another():
    bank, queries = F.normalize(randn(12, 8)), randn(2, 5, 8, seed=1)
    positives = torch.stack([torch.randperm(12)[:4] for _ in range(5)])
    expected = bank.clone()
    for query in queries:
        for j in (3, 2, 1, 0):
            write(expected, query, positives[:, j])
    ops.memory_update_(bank, *scl.mixture_events(queries, positives), momentum=0.5)
    torch.testing.assert_close(bank, expected)


@given(st.integers(0, 5), st.integers(0, 9), st.floats(0, 1), st.sampled_from([1, 2]))
def test_selective_loss(neighbours, seed, self_weight, branches):
    bank, queries = randn(30, 8, seed=seed), randn(branches, 6, 8, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    listed = torch.stack([torch.randperm(30, generator=generator) for _ in range(6)])
    positives, negatives = listed[:, : 1 + neighbours], listed[:, 1 + neighbours : 20].contiguous()
    positives = positives.contiguous()
    found = queries.clone().requires_grad_()
    loss = scl.selective_loss(found, bank, positives, negatives, self_weight=self_weight)
    loss.sum().backward()
    leaf = queries.clone().requires_grad_()
    logits = 10 * torch.einsum("qbd,bad->qba", leaf, bank[listed[:, :20]])
    expected = 0.0
    for j in range(1 + neighbours):
        c = self_weight if j == 0 else 1.75 * (1 - self_weight) / neighbours
        expected = expected - c * logits.log_softmax(dim=2)[:, :, j].mean(dim=1)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.grad, leaf.grad, rtol=1e-4, atol=1e-4)
    contrast = SelectiveContrast(MemoryBank(bank), self_weight=self_weight)
    assert torch.equal(contrast(queries, positives, negatives), loss)


def test_progressive_gradient_is_near_the_exact_one():
    bank, queries = F.normalize(randn(30, 16)), F.normalize(randn(2, 8, 16, seed=1), dim=2)
    listed = torch.stack([torch.randperm(30) for _ in range(8)])
    call = (bank, listed[:, :4].contiguous(), listed[:, 4:].contiguous())
    grads, values = [], []
    for loss in (scl.selective_loss, scl.progressive_loss):
        leaf = queries.clone().requires_grad_()
        values.append(loss(leaf, *call))
        values[-1].sum().backward()
        grads.append(leaf.grad.flatten())
    assert torch.equal(*values)
    cosine = F.cosine_similarity(*grads, dim=0).item()
    assert 0.5 < cosine < 0.999


# --- the method -----------------------------------------------------------------------------------


def train(config, steps=12, part=slice(None)):
    """Losses and state after some steps; this process takes `part` of each batch."""
    encoder = striped()
    for module in encoder.modules():  # statistics are of a process's own share
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    images, cameras = world()
    method = SCL(encoder, config)
    with torch.no_grad():
        features = encoder(images)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    plan = method.sampler(torch.zeros(N), cameras, batch_size=8, rng=np.random.default_rng(0))
    curve = []
    torch.manual_seed(0)
    for step in range(steps):
        if step % 4 == 0:
            method.label(features if step == 0 else None, cameras)
        rows = torch.as_tensor(next(plan))[part]
        batch = Batch(
            (images[rows] + 0.1 * randn(N, 3, 16, 8, seed=step)[rows],), rows, rows, cameras[rows]
        )
        loss = sum(method.loss(batch).values())
        optimizer.zero_grad()
        loss.backward()
        distributed.mean_([p.grad for p in encoder.parameters()])
        optimizer.step()
        method.update(batch)
        loss = loss.detach()[None]
        distributed.mean_([loss])
        curve.append(loss.item())
    return {"curve": curve, "bank": method.bank, "mixture": method.mixture}


RANKED = [
    Config(**SMALL),
    Config(**SMALL, window="quantile", init_negatives="released"),
    Config(**SMALL, grad_bank="progressive", neighbour_write="anchor"),
]


def train_share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    part = slice(4 * rank, 4 * rank + 4)
    torch.save([train(config, part=part) for config in RANKED], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path, processes):
    ranks = [processes.Process(target=train_share, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for config, one, other in zip(RANKED, first, second, strict=True):
        expected = train(config)
        assert one["curve"] == other["curve"]
        np.testing.assert_allclose(one["curve"], expected["curve"], rtol=1e-4)
        assert max(expected["curve"]) > 0.1
        for name in ("bank", "mixture"):
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name], expected[name], rtol=0, atol=1e-4)


def labelled(config=None, encoder=None):
    images, cameras = world()
    encoder = encoder or striped()
    method = SCL(encoder, config or Config(**SMALL))
    with torch.no_grad():
        method.label(encoder.eval()(images), cameras)
    method.train()
    rows = torch.arange(8) * 5
    return method, Batch((images[rows],), rows, rows, cameras[rows])


def test_branches_that_weigh_nothing_are_left_out():
    for local, names in ((0.0, ["global"]), (1.0, ["local"]), (0.3, ["local", "global"])):
        method, batch = labelled(Config(**SMALL, local_weight=local))
        method.loss(batch)
        method.update(batch)
        terms = method.loss(batch)
        assert list(terms) == names
        sum(terms.values()).backward()
        heads = method.encoder.neck, method.encoder.stripes[0][0]
        moved = [bool(head.weight.grad.any()) for head in heads]
        assert moved == ["global" in names, "local" in names]


def test_an_encoder_without_parts_is_all_global():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3 * 16 * 8, 20)

        def forward(self, images):
            return self.body(images.flatten(1))

    method, batch = labelled(encoder=Plain())
    method.label(None, method.cameras)
    assert method.parts == (20,)
    terms = method.loss(batch)
    method.update(batch)
    assert list(terms) == ["global"]
    torch.testing.assert_close(method.bank.norm(dim=1), torch.ones(N))
    queries = F.normalize(randn(5, 20), dim=1)
    found = method.distances(queries, queries, torch.arange(5), torch.arange(5))
    torch.testing.assert_close(
        found["not squared"], torch.cdist(queries, queries), rtol=0, atol=1e-3
    )


def test_mixed_precision():
    method, batch = labelled()
    method.loss(batch)
    method.update(batch)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.loss(batch)
        sum(terms.values()).backward()
        method.update(batch)
    assert {loss.dtype for loss in terms.values()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in method.encoder.parameters())


def test_state_goes_on(tmp_path):
    method, batch = labelled()
    method.loss(batch)
    method.update(batch)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = SCL(striped(seed=1), Config(**SMALL))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses = []
    for each in (method, other):
        each.label(None, each.cameras)
        each.loss(batch)
        each.update(batch)
        losses.append(each.loss(batch))
    assert losses[0] == losses[1]
    assert all(loss > 0.1 for loss in losses[0].values())
    other.load_state_dict(SCL(striped(), Config(**SMALL)).state_dict())  # before any label


def message(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_errors():
    images, cameras = world()
    assert message(SCL, striped(stripe_embedding=4)) == (
        "SCL: encoder must have a global part as wide as its stripes together, since both are contrasted "
        "with one bank, got parts (32, 4, 4, 4, 4)"
    )
    method = SCL(striped(), Config(**SMALL))
    rows = torch.arange(4)
    batch = Batch((images[rows],), rows, rows, rows)
    assert message(method.loss, batch) == "SCL.loss: label() must have been called"
    assert message(method.label, None, cameras) == (
        "SCL.label: features must be given the first time, got None"
    )
    assert message(method.label, rows_of_parts(4), cameras[:4]) == (
        "SCL.label: features must be of at least 5 images (neighbours 3), got 4"
    )
    method, batch = labelled()
    assert message(method.label, None, cameras[:4]) == (
        f"SCL.label: cameras must be those of the {N} images it began with, got 4"
    )
    two = dataclasses.replace(batch, views=batch.views * 2)
    assert message(method.loss, two) == "SCL.loss: batch must have view mirrored, got 2 views"
    assert message(Config, self_weight=1.5) == "SCL: self_weight must lie in [0, 1], got 1.5"
    assert message(Config, temperature=0.0) == "SCL: temperature must be positive, got 0.0"
    assert message(Config, negatives=0) == (
        "SCL: neighbours must not be negative and negatives at least 1, got 7 and 0"
    )


def test_options():
    config = Config()
    assert (config.neighbours, config.negatives, config.camera_weight) == (7, 500, 0.05)
    assert (config.global_weight, config.local_weight, config.alpha) == (0.5, 0.5, 1.75)
    for name in ("market1501", "dukemtmc-reid", "msmt17", "mars"):
        assert Config.preset(name) == config
        assert set(SCL.recipe_presets.get(name, {})) <= set(SCL.recipe)
    assert Config.preset("dukemtmc-videoreid").local_weight == 0.3
    released = Config.preset("released")
    assert (released.grad_bank, released.init_negatives) == ("progressive", "released")
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Config, "scl")
    line = "--neighbours 5 --window gap --gap 0.1 --grad-bank progressive"
    found = options.from_arguments(config, parser.parse_args(line.split()))
    expected = {"neighbours": 5, "window": "gap", "gap": 0.1, "grad_bank": "progressive"}
    assert found == dataclasses.replace(config, **expected)
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]


# --- distances and the network --------------------------------------------------------------------


def test_distances_of_the_released_evaluation():
    parts = (4, 2, 2)
    queries, gallery = (rows_of_parts(count, parts, seed=count) for count in (7, 9))
    weights = (0.6, 0.2, 0.2)
    expected = sum(
        w * torch.cdist(q, g)
        for w, q, g in zip(weights, queries.split(parts, 1), gallery.split(parts, 1), strict=True)
    )
    cameras = torch.arange(7) % 2, torch.arange(9) % 3
    same = cameras[0][:, None] == cameras[1]
    root = scl.part_weights(parts, 0.6).sqrt()  # as the encoder has it in evaluation
    found = scl.blended_distance(queries * root, gallery * root, parts=parts, global_weight=0.6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    found = scl.blended_distance(
        *(queries, gallery),
        parts=parts,
        global_weight=0.6,
        query_cameras=cameras[0],
        gallery_cameras=cameras[1],
        camera_weight=0.05,
    )
    torch.testing.assert_close(found, expected + 0.05 * same, rtol=0, atol=1e-3)


@pytest.mark.parametrize("held", [2**26, 100])
def test_both_test_distances_are_reported(held, monkeypatch):
    monkeypatch.setattr(evaluation, "_DISTANCES", held)
    images, cameras = world()
    method, _ = labelled(Config(**SMALL, test_camera_weight=0.4))
    with torch.no_grad():
        features = method.encoder.eval()(images)
    pixels = np.zeros((N, 4, 2, 3), np.uint8)
    names = [f"{row}.png" for row in range(N)]
    stored = ImageArrays(pixels, names, np.arange(N) // 4, cameras.numpy())
    first, rest = np.arange(0, N, 4), np.arange(N)[np.arange(N) % 4 > 0]
    call = features[first], features[rest], stored.select(first), stored.select(rest)
    found = evaluation.evaluate(*call, distances=method.distances)
    plain = evaluation.evaluate(*call)
    assert found.mAP == plain.mAP
    assert list(found.by_distance) == ["not squared", "not squared, cameras"]
    ids, seen_by = np.arange(N) // 4, cameras.numpy()
    for name, distance in method.distances(*call[:2], cameras[first], cameras[rest]).items():
        expected = reference.evaluate_ranking(
            None,
            None,
            query_ids=ids[first],
            gallery_ids=ids[rest],
            query_cameras=seen_by[first],
            gallery_cameras=seen_by[rest],
            distance=distance.numpy(),
        )
        own = found.by_distance[name]
        np.testing.assert_allclose(own.cmc, expected[0], atol=1e-6)
        assert (own.mAP, own.mINP) == pytest.approx(expected[1:3], abs=1e-6)
        np.testing.assert_allclose(own.ap, expected[3], atol=1e-6)
        assert own.valid.tolist() == expected[4].tolist()
    rankings = [values["mAP"] for _, values, _ in evaluation.lines_of({"SCL": found})]
    assert len({round(value, 6) for value in rankings}) == 3
    lines = found.summary().splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == list(found.by_distance)


def test_parts_of_the_network():
    encoder = striped()
    assert isinstance(encoder, StripeEncoder)
    assert (encoder.parts, encoder.dim) == (PARTS, 64)
    images = randn(6, 3, 16, 8)
    raw = encoder(images)
    encoder.global_weight.fill_(0.3)
    encoder.eval()
    rows = encoder(images)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    lengths = [part.norm(dim=1).mean().item() ** 2 for part in rows.split(PARTS, 1)]
    assert lengths == pytest.approx([0.3, *[0.175] * 4])
    encoder.train()
    assert raw.norm(dim=1).min() > 1.5
    encoder.backbone[1].momentum = 0.0
    one = images[:, None].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(encoder(one), raw, rtol=1e-3, atol=1e-3)  # a clip that stands still
    with pytest.raises(ValueError, match="maps of at least 4 rows"):
        encoder(images[:, :, :12])


def released_names(encoder, old=False):
    """As SCL's files call the tensors of a ResNet with heads."""
    renamed = {}
    for name, tensor in encoder.state_dict().items():
        if name == "global_weight":
            continue
        if old and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        name = name.replace("backbone.", "CNN.").replace("neck.", "avg_pooling.embeding_bn.")
        name = name.replace("embedding.", "avg_pooling.embeding.")
        renamed[name.replace("stripes.", "local_pooling.local_conv_list.")] = tensor
    return renamed


@pytest.mark.parametrize("old", [False, True])
def test_released_checkpoints(old, tmp_path):
    torch.manual_seed(0)
    sizes = {"embedding": 32, "stripes": 4, "stripe_embedding": 8}
    written = build_encoder("small", **sizes)
    for tensor in written.state_dict().values():
        if tensor.is_floating_point() and tensor.dim():
            tensor.uniform_(0.5, 1.5)
    path = tmp_path / "resnet50_model_50.pth"
    torch.save(released_names(written, old), path)
    encoder = build_encoder("small", **sizes)
    loaded = models.load_weights(encoder, path)
    assert (loaded.layout, loaded.missing, loaded.unexpected) == ("scl", ("global_weight",), ())
    images = randn(2, 3, 64, 32)
    assert torch.equal(encoder.eval()(images), written.eval()(images))
    fewer = build_encoder("small", embedding=32, stripes=2, stripe_embedding=16)
    assert message(models.load_weights, fewer, path) == (
        f"{path}: stripes must be 4, as the file has them, got 2 (head=False loads the backbone alone)"
    )
    assert models.load_weights(fewer, path, head=False).missing

    models.save_weights(written, tmp_path / "last.pt")
    again = models.load_weights(encoder, tmp_path / "last.pt")
    assert (again.layout, again.missing, again.unexpected) == ("pyreid", (), ())


def test_from_the_command_line(tmp_path, capsys):
    """Trained, then evaluated as the run beside the weights was made."""
    folder = tmp_path / "run"
    network = "--encoder small --weights random --embedding 32 --stripes 2 --stripe-embedding 16"
    images = "--height 32 --width 16 --people 6"
    schedule = "--epochs 1 --steps 2 --batch-size 4 --neighbours 2 --test-camera-weight 0.3"
    line = f"train --method scl {network} {images} {schedule} -o {folder}"
    assert cli.main(line.split()) == 0
    assert "not squared, cameras" in capsys.readouterr().out
    assert (folder / "report.html").exists()
    figures = tmp_path / "figures.json"
    assert cli.main(f"eval {folder}/last.pt --people 6 --json {figures}".split()) == 0
    out = capsys.readouterr().out
    assert f"{folder}/last.pt (pyreid): " in out
    assert "not in the file" not in out
    found = json.loads(figures.read_text())
    assert list(found["by_distance"]) == ["not squared", "not squared, cameras"]
    history = json.loads((folder / "metrics.jsonl").read_text())
    assert history["evaluation"]["mAP"] == pytest.approx(found["mAP"], abs=1e-6)
    assert history["clusters"]["clusters"] == 0
