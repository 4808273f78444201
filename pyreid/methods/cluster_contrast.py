"""Cluster Contrast for unsupervised person re-identification (Dai, Wang, Yuan, Zhu, Tan, ACCV 2022,
arXiv 2103.11568).

Each epoch
    1. features  <- the encoder, all images as they are; unit length
    2. labels    <- DBSCAN on the Jaccard distance of the features; images in no cluster sit the epoch out
    3. centroids <- mean feature of each cluster; unit length
Each step: 16 clusters x 16 images, augmented
    4. f         <- the encoder; unit length
    5. loss      <- ClusterNCE: f to the centroid of its cluster, among the centroids of all
    6. encoder   <- the optimiser's step
    7. centroids <- image after image: c <- 0.1 c + 0.9 f; unit length
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from pyreid import distributed, ops
from pyreid.data import Batch, samplers
from pyreid.methods.clustering import Clustering, Clusters, cluster
from pyreid.options import option


@dataclass(frozen=True)
class Config(Clustering):
    """Cluster Contrast's options; the defaults are the released ones."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "market1501": {},
        "dukemtmc-reid": {},
        "msmt17": {},
    }

    temperature: float = option(0.05, "of ClusterNCE")
    momentum: float = option(0.1, "what is kept of a centroid at each update")
    use_hard: bool = option(
        False, "update a centroid once per step, by its least similar image, instead of by each"
    )
    instances: int = option(16, "images per cluster in a batch")
    use_cameras: bool = option(True, "prefer other cameras when a batch takes images of a cluster")


def cluster_nce(
    features: torch.Tensor,
    labels: torch.Tensor,
    centroids: torch.Tensor,
    *,
    temperature: float = 0.05,
) -> torch.Tensor:
    """ClusterNCE: each image to the centroid of its cluster.

        L = mean_i -log( exp(<f_i, c_y> / t) / sum_k exp(<f_i, c_k> / t) ),    y = labels[i]

    Args:
        features: (B, D), normalised here. labels: (B,) rows of the centroids.
        centroids: (C, D) unit rows.
    """
    queries = normalize(features.float())
    return ops.bank_cross_entropy(queries, centroids, labels, scale=1 / temperature).mean()


class ClusterContrast(nn.Module):
    """Cluster Contrast around an encoder of images (B, 3, H, W) to (B, D)."""

    views = ("standard",)

    # What the released trainer runs with: its schedule and its encoder.
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 50,
        "steps": 200,
        "batch_size": 256,
        "learning_rate": 3.5e-4,
        "weight_decay": 5e-4,
        "warmup_epochs": 0,
        "step_size": 20,
        "gamma": 0.1,
        "height": 256,
        "width": 128,
    }
    recipe_presets: ClassVar[dict[str, dict[str, Any]]] = {"msmt17": {"steps": 400}}
    encoder_options: ClassVar[dict[str, Any]] = {"pooling": "gem", "norm_group": 64}

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        self.encoder = encoder
        self.clusters: Clusters | None = None
        self.centroids: Any = None
        self._features: Any = None

    @property
    def inference(self) -> nn.Module:
        """What labels images, is evaluated and kept: the encoder itself."""
        return self.encoder

    @torch.no_grad()
    def label(self, features: torch.Tensor, cameras: Any) -> torch.Tensor:
        """Lines 2 and 3, from (N, D) unit features and (N,) cameras -> (N,) labels, -1: in no cluster."""
        cameras = torch.as_tensor(cameras, device=features.device)
        self.clusters = cluster(features, cameras, self.config)
        self.centroids = ops.class_means(features, self.clusters.labels, normalize=True).means
        return self.clusters.labels

    def sampler(
        self, labels: Any, cameras: Any, *, batch_size: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Batches without end: (batch_size,) rows of images."""
        if not self.config.use_cameras:
            cameras = np.zeros(len(labels), np.int64)
        return samplers.multiple_gallery(
            labels, cameras, batch_size=batch_size, instances=self.config.instances, rng=rng
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Lines 4 and 5: the terms of the loss."""
        if self.centroids is None:
            raise ValueError("ClusterContrast.loss: label() must have been called")
        if len(batch.views) != 1:
            raise ValueError(
                f"ClusterContrast.loss: batch must have view standard, got {len(batch.views)} views"
            )
        features = self.encoder(batch.views[0]).float()
        self._features = normalize(features.detach())
        nce = cluster_nce(
            features, batch.labels, self.centroids, temperature=self.config.temperature
        )
        return {"cluster": nce}

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Line 7, with the features of the latest `loss`. The released code does it inside backward, with the
        same features before the same step: the same centroids come out.

        Data-parallel processes all make the updates of the whole batch, in the order of their ranks."""
        ops.memory_update_(
            self.centroids,
            distributed.gather_rows(self._features, equal=True),
            distributed.gather_rows(batch.labels, equal=True),
            momentum=self.config.momentum,
            repeats="hardest" if self.config.use_hard else "sequential",
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What `label` has left for the steps of its epoch: so a run can go on within one."""
        return {"centroids": self.centroids}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.centroids = state["centroids"]

    Config = Config  # METHODS[name].Config
