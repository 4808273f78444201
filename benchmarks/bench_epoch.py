"""A step of training and an epoch, network and all, before and after: what the ops are worth to a user.

Cluster Contrast, on made-up images. Before: labels by the published pipeline, centroids by a loop over
labels, logits of the whole bank, and its update by a loop over the batch. The network, the images and the
optimiser are the same on both sides. Clusters are those of features as a half-trained encoder makes them, not
of this network, which has learned nothing; what it takes to compute features of all images is paid.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import functional as F

from pyreid import losses, memory, ops

from . import bench_class_means, bench_labels, bench_memory_update
from .bench_jaccard import features_of, published_name
from .timing import Case, pytest_benchmark

TEMPERATURE, MOMENTUM = 0.05, bench_memory_update.MOMENTUM


def cases(device, quick=False):
    if importlib.util.find_spec("torchvision") is None:  # nor is the training layer here
        return
    if device == "cpu":
        yield step(device, "small", (64, 32), 64, 700)
        yield epoch(device, "small", (64, 32), 64, images=3000, steps=10 if quick else 50)
        if not quick:
            yield step(device, "small", (64, 32), 256, 700)
    else:
        yield step(device, "resnet50", (256, 128), 256, 700)
        images, steps = (3000, 20) if quick else (12_936, 50)
        yield epoch(device, "resnet50", (256, 128), 256, images=images, steps=steps)


class Trainer:
    """A network, its optimiser, and a bank of one centroid a cluster."""

    def __init__(self, device, name, shape, batch, images):
        from pyreid.models import build_encoder

        torch.manual_seed(0)
        self.encoder = build_encoder(name).to(device)
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=1e-4)
        self.images = torch.randint(0, 256, (images, 3, *shape), dtype=torch.uint8, device=device)
        self.batch = batch

    def set_bank(self, centroids):
        self.rows = centroids
        self.bank = memory.MemoryBank(centroids, momentum=MOMENTUM)
        self.criterion = losses.ClusterContrast(self.bank, temperature=TEMPERATURE)

    def forward(self, first):
        return self.encoder(self.images[first : first + self.batch].float() / 255)

    def features(self):
        """Of all images."""
        self.encoder.eval()
        with torch.no_grad():
            rows = [self.forward(i) for i in range(0, len(self.images), self.batch)]
        self.encoder.train()
        return F.normalize(torch.cat(rows))

    def step(self, first, targets):
        features = self.forward(first)
        loss = self.criterion(features, targets)
        self.learn(loss)
        self.bank.update(F.normalize(features.detach()), targets)
        return loss.detach()

    def released_step(self, first, targets):
        features = F.normalize(self.forward(first))
        loss = F.cross_entropy(features @ self.rows.T / TEMPERATURE, targets)
        self.learn(loss)
        bench_memory_update.loop((self.rows, features.detach(), targets))
        return loss.detach()

    def learn(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def step(device, name, shape, batch, clusters):
    def make():
        trainer = Trainer(device, name, shape, batch, batch)
        dim = trainer.features().shape[1]
        generator = torch.Generator().manual_seed(0)
        centroids = F.normalize(torch.randn(clusters, dim, generator=generator))
        trainer.set_bank(centroids.to(device))
        targets = torch.randint(0, clusters, (max(batch // 16, 1),), generator=generator)
        return trainer, targets.repeat_interleave(16)[:batch].to(device)

    return Case(
        op="training step",
        size=f"Cluster Contrast, {name}, {shape[0]}x{shape[1]}, B={batch} M={clusters}",
        device=device,
        make=make,
        ours=lambda state: state[0].step(0, state[1]),
        baselines={"as released": lambda state: state[0].released_step(0, state[1])},
        tolerance=1e-4,
        whole=True,
    )


def epoch(device, name, shape, batch, images, steps):
    def make():
        return Trainer(device, name, shape, batch, images), features_of(images, 2048).to(device)

    def run(trainer, labels, centroids, one_step):
        """As many batches as there are, round and round; outliers take part in none."""
        trainer.set_bank(centroids)
        rows = (labels >= 0).nonzero()[:, 0]
        kept = trainer.images
        trainer.images = kept[rows]
        last = len(rows) - batch + 1
        for i in range(steps):
            first = i * batch % last
            loss = one_step(first, labels[rows[first : first + batch]])
        trainer.images = kept
        return loss, labels.max()

    def ours(state):
        trainer, given = state
        own = trainer.features()
        labels = ops.pseudo_labels(given, eps=bench_labels.EPS)
        centroids = ops.class_means(own, labels, normalize=True).means
        return run(trainer, labels, centroids, trainer.step)

    def released(state):
        trainer, given = state
        own = trainer.features()
        labels = bench_labels.released(given)
        centroids = bench_class_means.loop((own, labels, None))[0]
        return run(trainer, labels, centroids, trainer.released_step)

    before = f"{published_name(device)}, scikit-learn, loops"
    return Case(
        op="epoch",
        size=f"Cluster Contrast, {name}, {shape[0]}x{shape[1]}, {images} images, {steps} x B={batch}",
        device=device,
        make=make,
        ours=ours,
        baselines={before: released},
        tolerance=1e-2,
        whole=True,
        patience=60.0,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
