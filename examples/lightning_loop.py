"""Cluster Contrast as a LightningModule: pseudo labels before an epoch, the memory's update after a step.

pip install lightning
python examples/lightning_loop.py
"""

from __future__ import annotations

import argparse

import lightning
import numpy as np
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from pyreid import ops
from pyreid.data import ReidData, multiple_gallery, transforms
from pyreid.evaluation import evaluate_data, extract
from pyreid.losses import ClusterContrast
from pyreid.memory import MemoryBank
from pyreid.models import build_encoder
from pyreid.people import people_data

SIZE = {"height": 64, "width": 32}


class Labelled(torch.utils.data.Dataset):
    """Views of images with the pseudo labels of the epoch."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.view = transforms.make("standard", **SIZE)

    def __getitem__(self, row):
        image, _, _ = self.images[row]
        return self.view(image), self.labels[row]


class Reid(lightning.LightningModule):
    def __init__(self, data: ReidData, steps: int):
        super().__init__()
        self.encoder = build_encoder("small")
        self.data, self.steps = data, steps

    def configure_optimizers(self):
        return torch.optim.Adam(self.encoder.parameters(), lr=2e-3, weight_decay=5e-4)

    def train_dataloader(self) -> DataLoader:
        """Called each epoch: Trainer(reload_dataloaders_every_n_epochs=1)."""
        images = self.data.train
        features = extract(self.encoder, images, **SIZE)
        cameras = torch.as_tensor(images.cameras, device=features.device)
        labels = ops.pseudo_labels(features, eps=0.5, variant="ca-jaccard", cameras=cameras)
        self.bank = MemoryBank(
            ops.class_means(features, labels, normalize=True).means, momentum=0.1
        ).to(self.device)
        self.contrast = ClusterContrast(self.bank)
        rng = np.random.default_rng(self.current_epoch)
        plan = multiple_gallery(labels.cpu(), images.cameras, batch_size=16, instances=4, rng=rng)
        steps = [next(plan) for _ in range(self.steps)]
        return DataLoader(Labelled(images, labels.cpu()), batch_sampler=steps)

    def training_step(self, batch, step):
        images, labels = batch
        found = self.encoder(images)
        self.update = normalize(found.detach()), labels
        loss = self.contrast(found, labels)
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_):
        self.bank.update(*self.update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ids", type=int, default=60, help="made-up people to train on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    model = Reid(people_data(ids=arguments.ids, cameras=4, gap=0.15, quiet=True), arguments.steps)
    print(f"untrained: mAP {evaluate_data(model.encoder, model.data, **SIZE).ranking.mAP:.1%}")
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=arguments.epochs,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    print(f"trained: mAP {evaluate_data(model.encoder, model.data, **SIZE).ranking.mAP:.1%}")


if __name__ == "__main__":
    main()
