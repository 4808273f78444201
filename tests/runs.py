"""Small runs for tests/test_train.py, in processes of their own: some are killed, some work together."""

from __future__ import annotations

import numpy as np
import torch

from pyreid import train
from pyreid.data import ImageArrays, ReidData
from pyreid.methods import METHODS
from pyreid.models import ghost_

PEOPLE, CAMERAS, PICTURES = 16, 3, 2


def images(people, *, seed):
    """Crops of two colours each, those of a person, through cameras with colours of their own."""
    rng = np.random.default_rng(seed)
    gain = np.random.default_rng(7).uniform(0.8, 1.2, (CAMERAS, 1, 1, 3))
    pixels, ids, cameras = [], [], []
    for person in people:
        halves = np.random.default_rng(1000 + person).uniform(50, 160, (2, 1, 1, 3))
        crop = np.concatenate([np.broadcast_to(half, (16, 16, 3)) for half in halves])
        for camera in range(CAMERAS):
            for _ in range(PICTURES):
                seen = (
                    crop * gain[camera] + rng.normal(0, 8, (1, 1, 3)) + rng.normal(0, 9, crop.shape)
                )
                pixels.append(seen.clip(0, 255).astype(np.uint8))
                ids.append(person)
                cameras.append(camera)
    names = [f"{row:03}.png" for row in range(len(ids))]
    return ImageArrays(np.stack(pixels), names, np.array(ids), np.array(cameras))


def data():
    test = images(range(PEOPLE, 2 * PEOPLE), seed=1)
    first = np.arange(0, len(test), PICTURES)
    return ReidData(
        "colours",
        train=images(range(PEOPLE), seed=0),
        query=test.select(first),
        gallery=test.select(first + 1),
    )


class Encoder(torch.nn.Module):
    """Small enough for an epoch in a moment, with a statistic that training moves."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.AvgPool2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(3 * 8 * 4, 24),
            torch.nn.BatchNorm1d(24),
            torch.nn.ReLU(),
            torch.nn.Linear(24, 16),
        )

    def forward(self, images):
        return self.layers(images)


def training(**changes):
    values = {
        "epochs": 4,
        "steps": 6,
        "batch_size": 16,
        "learning_rate": 3e-3,
        "warmup_epochs": 2,
        "height": 32,
        "width": 16,
        "device": "cpu",
        "seed": 3,
    }
    return train.Training(**values | changes)


def fit(name, output=None, *, norm_group=None, resume=False, **changes):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = Encoder() if norm_group is None else ghost_(Encoder(), norm_group)
    own = {"instances": 2, "min_samples": 2, "eps": 0.6, "k1": 6, "k2": 2}
    if name == "ice":
        own["teacher_momentum"] = 0.9
    if name == "scl":
        own = {"neighbours": 3, "negatives": 40, "initial_epochs": 1}
        encoder.parts = (8, 4, 4)
    if name == "jvtc":
        own = {"views": 2, "first_labels": 1, "relabel_every": 1, "k1": 6, "k2": 2}
        own |= {"rho": 0.08, "eps_factor": 1.0}
    return train.fit(
        METHODS[name].Config(**own),
        encoder,
        data(),
        training(**changes),
        output=output,
        resume=resume,
    )


def fit_as_one_of(rank, ranks, place, name, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=ranks
    )
    result = fit(name, norm_group=4)
    weights = torch.cat([value.flatten() for value in result.encoder.state_dict().values()])
    results.put((rank, result.labels.tolist(), result.history, weights.tolist()))
    torch.distributed.destroy_process_group()
