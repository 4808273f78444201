"""A trainer of one's own, with pyreid's labels, memory and loss: Cluster Contrast on made-up people.

python examples/plain_loop.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch.nn.functional import normalize

from pyreid import ops
from pyreid.data import batches, multiple_gallery, transforms
from pyreid.evaluation import evaluate_data, extract
from pyreid.losses import ClusterContrast
from pyreid.memory import MemoryBank
from pyreid.models import build_encoder
from pyreid.people import people_data

SIZE = {"height": 64, "width": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=60, help="made-up people to train on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    data = people_data(ids=arguments.ids, cameras=4, gap=0.15, quiet=True)
    cameras = torch.as_tensor(data.train.cameras)
    encoder = build_encoder("small")
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3, weight_decay=5e-4)
    print(f"untrained: mAP {evaluate_data(encoder, data, **SIZE).ranking.mAP:.1%}")

    for epoch in range(arguments.epochs):
        features = extract(encoder, data.train, **SIZE)
        labels = ops.pseudo_labels(features, eps=0.5, variant="ca-jaccard", cameras=cameras)
        bank = MemoryBank(ops.class_means(features, labels, normalize=True).means, momentum=0.1)
        contrast = ClusterContrast(bank)
        plan = multiple_gallery(labels, data.train.cameras, batch_size=16, instances=4, rng=rng)
        steps = [next(plan) for _ in range(arguments.steps)]
        view = transforms.make("standard", **SIZE)

        encoder.train()
        losses = []
        for batch in batches(data.train, steps, transforms=[view], labels=labels, seed=epoch):
            found = encoder(batch.views[0])
            loss = contrast(found, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bank.update(normalize(found.detach()), batch.labels)
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: {len(bank)} clusters, loss {np.mean(losses):.2f}")
    print(f"trained: mAP {evaluate_data(encoder, data, **SIZE).ranking.mAP:.1%}")


if __name__ == "__main__":
    main()
