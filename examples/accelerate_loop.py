"""SpCL's hybrid memory under Accelerate: on one device or, by `accelerate launch`, on many.

Every process labels the same images and updates its copy of the memory with the whole batch, in the order of
the ranks, so that all copies stay the same.

    pip install accelerate
    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import normalize

from pyreid import ops
from pyreid.data import batches, shuffled, transforms
from pyreid.evaluation import evaluate_data, extract
from pyreid.losses import HybridMemory
from pyreid.memory import MemoryBank
from pyreid.models import build_encoder
from pyreid.people import people_data

SIZE = {"height": 64, "width": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=60, help="made-up people to train on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=arguments.cpu)
    set_seed(0)
    data = people_data(ids=arguments.ids, cameras=4, gap=0.15, quiet=True)
    encoder = build_encoder("small")
    optimizer = torch.optim.Adam(encoder.parameters(), lr=2e-3, weight_decay=5e-4)
    model, optimizer = accelerator.prepare(encoder, optimizer)
    cameras = torch.as_tensor(data.train.cameras, device=accelerator.device)
    before = evaluate_data(encoder, data, **SIZE).ranking.mAP
    accelerator.print(f"untrained: mAP {before:.1%}")

    # A row for each image, which stays from epoch to epoch; only its label changes.
    bank = MemoryBank(extract(encoder, data.train, **SIZE), cameras=cameras, momentum=0.2)
    memory = HybridMemory(bank)
    rng = np.random.default_rng(0)
    for epoch in range(arguments.epochs):
        labels = ops.pseudo_labels(
            bank.features, eps=0.5, variant="ca-jaccard", cameras=bank.cameras
        )
        alone = labels < 0
        clusters = int(labels.max()) + 1
        labels[alone] = clusters + torch.arange(int(alone.sum()), device=labels.device)
        bank.labels = labels

        plan = shuffled(np.arange(len(bank)), batch_size=32, rng=rng)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        steps = [next(plan)[share] for _ in range(arguments.steps)]
        view = transforms.make("standard", **SIZE)
        model.train()
        losses = []
        for batch in batches(data.train, steps, transforms=[view], labels=labels, seed=epoch):
            batch = batch.to(accelerator.device)
            found = model(batch.views[0])
            loss = memory(found, batch.rows)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            features, rows = accelerator.gather((normalize(found.detach()), batch.rows))
            bank.update(features, rows)
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch + 1}: {clusters} clusters, loss {np.mean(losses):.2f}")
    after = evaluate_data(encoder, data, **SIZE).ranking.mAP
    accelerator.print(f"trained: mAP {after:.1%}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
