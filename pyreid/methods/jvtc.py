"""JVTC: joint visual and temporal consistency for unsupervised person re-identification (Li, Zhang, ECCV
2020, arXiv 2007.10854), without its labelled source data: the warm-up of GCL.

Once
    1. bank      <- the encoder, all images as they are; unit length. Every image is a class of its own
Each epoch, every fifth from the eleventh on
    2. labels    <- DBSCAN on re-ranked distances of the bank's rows; no image is left out
       labels    <- from the 31st epoch on, where frame numbers are known: DBSCAN on re-ranked joint
                    distances, of looks and of the times that people take from camera to camera, which the
                    labels tell; by which test images are ranked too (JVTC+)
Each step: 32 images, in 4 views each; v: the mean of an image's views
    3. x         <- the encoder, every view
    4. loss      <- local:  x to its image's v, among the v of the batch
             +  0.2 global: x to all rows of the bank that have its label, among all rows
                    (once there are labels)
    5. encoder   <- the optimiser's step
    6. bank      <- row <- m row + (1 - m) v, m = 0.01 epoch, at most 0.8; unit length

The released views are the image in the styles of other cameras, drawn by a network (CamStyle): such files are
`data.camstyle`, to be trained on with `views` 1. Without them, views are augmentations of the image itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from pyreid import distributed, ops
from pyreid.data import Batch, samplers
from pyreid.methods.clustering import Clustering, Clusters, cluster_distances, joint_labels
from pyreid.options import option


@dataclass(frozen=True)
class Config(Clustering):
    """JVTC's options. The defaults are the released values, but that rows of the bank keep unit length and
    begin as features: `Config.preset("released")` has neither."""

    # The factors are those in the names of the warm-ups that were released with GCL.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "market1501": {"eps_factor": 0.75},
        "dukemtmc-reid": {"eps_factor": 0.75},
        "msmt17": {"eps_factor": 0.85},
        "released": {"bank_norm": False, "bank_init": "uniform"},
    }

    variant: Literal["mmt", "jvtc", "strong-baseline"] = option(
        "jvtc", "whose re-ranking: see help(ops.rerank_distances)"
    )
    k1: int = option(20, "neighbours that reciprocity is asked of")
    rho: float | None = option(
        0.0016,
        "sets eps anew each time: to the mean of this fraction of all distances, the smallest",
    )
    eps_factor: float = option(0.8, "what eps is multiplied by")
    min_samples: int = option(
        1, "neighbours, itself included, that make an image the core of a cluster"
    )
    lambda_value: float = option(0.3, "weight of the distance itself in the re-ranking")
    joint_lambda: float = option(0.5, "likewise, of the joint distance")
    first_labels: int = option(10, "epochs before the first labels, with the local loss alone")
    relabel_every: int = option(5, "epochs between labels")
    joint_from: int | None = option(
        30, "epochs before labels by joint distances, where frame numbers are known; none: never"
    )
    views: int = option(4, "views of an image in a batch")
    local_temperature: float = option(0.1, "of the local loss")
    temperature: float = option(0.05, "of the global loss")
    global_weight: float = option(0.2, "of the global loss")
    momentum_step: float = option(
        0.01, "what is kept of a row of the bank at each update: so much times the epoch"
    )
    most_momentum: float = option(0.8, "but at most this")
    bank_norm: bool = option(True, "rows of the bank keep unit length; released: on MSMT17 alone")
    bank_init: Literal["features", "uniform"] = option(
        "features", "rows of the bank at first; uniform: random numbers in [0, 1), as released"
    )
    new_rate: float = option(
        10.0, "step size of what is not the encoder's backbone, in that of the backbone"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("relabel_every", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"Config: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lambda_value", "joint_lambda", "most_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Config: {name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("temperature", "local_temperature", "eps_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Config: {name} must be positive, got {getattr(self, name)}")


def local_loss(features: torch.Tensor, *, temperature: float = 0.1) -> torch.Tensor:
    """Each view to the mean of its image's views, among those of the batch.

        L = mean_{i,k} -log( exp(<x_ik, v_i> / t) / sum_j exp(<x_ik, v_j> / t) ),    v_i = mean_k x_ik

    Args:
        features: (B, K, D) of K views, not normalised: v is the mean of them as they are. Both are, in the
            products.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        means = normalize(features.mean(dim=1))
        logits = normalize(features, dim=2) @ means.T / temperature  # (B, K, B)
        images = torch.arange(len(features), device=features.device)
        return cross_entropy(logits.flatten(0, 1), images.repeat_interleave(features.shape[1]))


def global_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    *,
    temperature: float = 0.05,
) -> torch.Tensor:
    """Each view to all rows of its label, in one softmax over the bank.

        L = mean_{i,k} -1/|R_i| sum_{n in R_i} log( exp(<x_ik, b_n> / t) / sum_m exp(<x_ik, b_m> / t) )

    Args:
        features: (B, K, D), normalised here. labels: (B,).
        bank: (N, D), as it is. bank_labels: (N,); R_i: the rows of image i's label.
    """
    queries = normalize(features.float(), dim=2).flatten(0, 1)
    return ops.bank_cross_entropy(
        queries,
        bank,
        labels.repeat_interleave(features.shape[1]),
        scale=1 / temperature,
        labels=bank_labels,
        reduce="label_uniform",
    ).mean()


class JVTC(nn.Module):
    """JVTC around an encoder of images (B, 3, H, W) to (B, D)."""

    wants_frames = True

    # What the released trainer runs with: its schedule and its encoder. The warm-ups of GCL stop after 40 to
    # 45 epochs (99 on MSMT17).
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 100,
        "steps": None,
        "batch_size": 32,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "weight_decay": 5e-4,
        "warmup_epochs": 0,
        "step_size": 40,
        "gamma": 0.1,
        "height": 256,
        "width": 128,
    }
    recipe_presets: ClassVar[dict[str, dict[str, Any]]] = {}
    encoder_options: ClassVar[dict[str, Any]] = {
        "pooling": "average",
        "embedding": 512,
        "norm_group": 64,
    }

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        self.encoder = encoder
        self.views = ("erased",) * self.config.views
        self.epoch = -1  # at hand, from 0 on
        self.bank: Any = None  # (N, D)
        self.labels: Any = None  # (N,) of its rows
        self.clusters: Clusters | None = None
        self.histogram: Any = None  # (C, C, bins) of the latest joint labels
        self._latest: Any = None

    @property
    def inference(self) -> nn.Module:
        """What is evaluated and kept: the encoder itself."""
        return self.encoder

    @property
    def wants_features(self) -> bool:
        """Whether `label` makes use of features: once."""
        return self.bank is None

    def optimizers(self, training: Any) -> dict[str, torch.optim.Optimizer]:
        """One for all, in which the encoder's `backbone`, if it has one, moves more slowly than the rest."""
        backbone = getattr(self.encoder, "backbone", self.encoder)
        old = [weight for weight in backbone.parameters() if weight.requires_grad]
        known = set(map(id, old))
        new = [w for w in self.encoder.parameters() if w.requires_grad and id(w) not in known]
        if not old and not new:
            raise ValueError("fit: encoder must have parameters that require a gradient, got none")
        rate = training.learning_rate
        groups = [
            {"params": weights, "lr": rate * factor, "weight_decay": training.weight_decay}
            for weights, factor in ((old, 1.0), (new, self.config.new_rate))
            if weights
        ]
        if training.optimizer == "sgd":
            return {"all": torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)}
        return {"all": torch.optim.Adam(groups, lr=rate)}

    @torch.no_grad()
    def label(
        self, features: torch.Tensor | None, cameras: Any, frames: Any = None
    ) -> torch.Tensor:
        """Line 1, the first time, from (N, D) features; line 2, when it is time, from (N,) cameras and frame
        numbers, -1 where they are not known; and an epoch begins. (N,) labels, all of which are images'."""
        config = self.config
        if self.bank is None:
            if features is None:
                raise ValueError("JVTC.label: features must be given the first time, got None")
            self.bank = normalize(features.float()).contiguous()
            if config.bank_init == "uniform":
                self.bank = torch.rand(self.bank.shape).to(self.bank.device)
            self.labels = torch.arange(len(self.bank), device=self.bank.device)
        elif len(cameras) != len(self.bank):
            raise ValueError(
                f"JVTC.label: cameras must be those of the {len(self.bank)} images it began with, "
                f"got {len(cameras)}"
            )
        self.epoch += 1
        late = self.epoch - config.first_labels
        if late < 0 or late % config.relabel_every:
            return self.labels
        self.clusters = self._visual()
        timed = frames is not None and bool((torch.as_tensor(frames) >= 0).any())
        if timed and config.joint_from is not None and self.epoch >= config.joint_from:
            where, when = (torch.as_tensor(x, device=self.bank.device) for x in (cameras, frames))
            self.histogram = ops.time_histogram(self.clusters.labels, where, when)
            self.clusters = joint_labels(
                *(self.bank, self.clusters.labels, where, when, config),
                histogram=self.histogram,
                lambda_value=config.joint_lambda,
                factor=config.eps_factor,
            )
        self.labels = self.clusters.labels
        return self.labels

    def _visual(self) -> Clusters:
        config = self.config
        sets: dict[str, Any] = {"variant": config.variant}
        distances = ops.rerank(self.bank, None, config.k1, config.k2, config.lambda_value, **sets)
        return cluster_distances(distances, config, factor=config.eps_factor)

    def sampler(
        self, labels: Any, cameras: Any, *, batch_size: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Batches without end: (batch_size,) rows of images in clusters, which all are unless `min_samples`
        is more than 1."""
        rows = np.flatnonzero(np.asarray(torch.as_tensor(labels).cpu()) >= 0)
        return samplers.shuffled(rows, batch_size=batch_size, rng=rng)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Lines 3 and 4: the weighted terms of the loss.

        Data-parallel processes contrast with the views of the whole batch, so that the mean of their
        gradients is the gradient of one process with the whole batch."""
        if self.bank is None:
            raise ValueError("JVTC.loss: label() must have been called")
        if len(batch.views) != len(self.views):
            raise ValueError(
                f"JVTC.loss: batch must have {len(self.views)} views erased, got {len(batch.views)}"
            )
        config = self.config
        # The views of an image follow each other, and are in one group of the norms: (B, K, 3, H, W).
        images = torch.cat([v if v.dim() == 5 else v[:, None] for v in batch.views], dim=1)
        features = self.encoder(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])
        self._latest = normalize(features.detach().mean(dim=1)), batch.rows
        local = local_loss(_of_all(features), temperature=config.local_temperature)
        # Each process has the loss of all images, and gradients for its own alone.
        processes = distributed.world_size()
        terms = {"local": processes * local - (processes - 1) * local.detach()}
        if config.global_weight and self.epoch >= config.first_labels:
            terms["global"] = config.global_weight * global_loss(
                *(features, batch.labels, self.bank, self.labels), temperature=config.temperature
            )
        return terms

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Line 6, with the features of the latest `loss`.

        Data-parallel processes all make the updates of the whole batch."""
        features, rows = (distributed.gather_rows(x, equal=True) for x in self._latest)
        ops.memory_update_(
            self.bank,
            features,
            rows,
            momentum=min(self.config.momentum_step * self.epoch, self.config.most_momentum),
            repeats="last",
            normalize=self.config.bank_norm,
        )

    @torch.no_grad()
    def distances(
        self,
        queries: torch.Tensor,
        gallery: torch.Tensor,
        query_cameras: torch.Tensor,
        gallery_cameras: torch.Tensor,
        query_frames: torch.Tensor,
        gallery_frames: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """JVTC+: the joint distance of (Q, D) and (G, D) test features, by name, once there is a histogram
        and where the times of gallery images are known, by the clocks of the training images."""
        if self.histogram is None or not (gallery_frames >= 0).any():
            return {}
        most = max(int(query_cameras.max()), int(gallery_cameras.max())) + 1
        more = max(most - len(self.histogram), 0)  # cameras that took no training image
        found = ops.joint_distance(
            gallery,
            gallery_cameras,
            gallery_frames,
            nn.functional.pad(self.histogram.to(gallery.device), (0, 0, 0, more, 0, more)),
            queries=queries,
            query_cameras=query_cameras.contiguous(),
            query_frames=query_frames.contiguous(),
        )
        return {"joint": found}

    def get_extra_state(self) -> dict[str, Any]:
        """The bank and its labels, which live as long as the run, and how far it is."""
        names = ("epoch", "bank", "labels", "histogram")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    Config = Config  # METHODS[name].Config


def _of_all(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, of which this one's carry gradients."""
    if distributed.world_size() == 1:
        return rows
    every = distributed.gather_rows(rows, equal=True)
    first = distributed.rank() * len(rows)
    return torch.cat([every[:first], rows, every[first + len(rows) :]])
