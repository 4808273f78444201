"""ICE: inter-instance contrastive encoding for unsupervised person re-identification (Chen, Lagadec, Bremond,
ICCV 2021, arXiv 2103.16364).

Each epoch
    1. features  <- the teacher, all images as they are; unit length
    2. labels    <- DBSCAN on the Jaccard distance of the features; images in no cluster sit the epoch out
    3. centroids <- mean feature of each cluster
       proxies   <- mean feature of each cluster in each camera; unit length
Each step: 8 clusters x 4 images, from as many cameras as there are; strongly augmented twice, and once not
    4. f         <- the encoder, first strong view
       k, w      <- the teacher, second strong view and the view that is not augmented
    5. loss      <- agnostic:  f to the centroid of its cluster, among the centroids of all
             +  0.5 camera:    f to the proxies of its cluster, among these and the 50 hardest of others
             +  1 hard:        f to the least similar k of its cluster, among this and the k of others
             + 10 soft:        how alike f is to each k, after how alike w is to each w
    6. encoder   <- the optimiser's step
    7. teacher   <- 0.999 teacher + 0.001 encoder

Without the camera term (weight 0) it is the paper's camera-agnostic ICE.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div, normalize

from pyreid import distributed, ops
from pyreid.data import Batch, samplers
from pyreid.losses import rows_of_each
from pyreid.methods.clustering import Clustering, Clusters, cluster
from pyreid.models import Teacher
from pyreid.options import option


@dataclass(frozen=True)
class Config(Clustering):
    """ICE's options. The defaults are the released values, but for three oversights of the released code,
    which `Config.preset("released")` brings back: proxy_norm, few_proxies and extra_forwards."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "market1501": {},
        "dukemtmc-reid": {},
        "msmt17": {"eps": 0.55},  # the released code; the paper may have used 0.6
        "released": {"proxy_norm": "column", "few_proxies": "positives", "extra_forwards": True},
    }

    eps: float = option(0.55, "images up to this distance, in (0, 1], are neighbours to DBSCAN")
    instances: int = option(4, "images per cluster in a batch")
    teacher_momentum: float = option(0.999, "what is kept of the teacher's weights at each step")
    shuffle: bool = option(
        True,
        "give the teacher each batch in random order, so that its norm groups are not the encoder's",
    )
    stack_views: bool = option(
        False, "give the teacher both its views as one batch: one pass, shared batch statistics"
    )
    extra_forwards: bool = option(
        False, "two passes more, as in the released code, that nothing but batch statistics sees"
    )

    agnostic_temperature: float = option(0.5, "of the camera-agnostic term")
    label_smoothing: float = option(0.1, "of the camera-agnostic term")

    camera_weight: float = option(0.5, "of the camera term; 0: camera-agnostic ICE")
    camera_temperature: float = option(0.07, "of the camera term")
    hardest: int = option(50, "negative proxies per image in the camera term")
    cam_reduction: Literal["sum", "mean"] = option("sum", "of the camera term over cameras")
    same_cam_positive: Literal["include", "exclude"] = option(
        "include", "whether the proxy of the image's own camera is a positive"
    )
    proxy_norm: Literal["row", "column"] = option(
        "row",
        "column: divide each feature dimension by its norm over proxies, as the released code does",
    )
    few_proxies: Literal["fewer", "positives"] = option(
        "fewer",
        "where too few negatives exist: take those, or fill up with positives, as the released code",
    )
    proxy_momentum: float | None = option(
        None,
        "what is kept of a proxy when an image of its cluster and camera has been seen; none: all",
    )

    hard_weight: float = option(1.0, "of the hard instance term")
    hard_temperature: float = option(0.1, "of the hard instance term")

    soft_weight: float = option(10.0, "of the soft instance term")
    soft_temperature: float = option(0.4, "of the soft instance term, both its distributions")


class Proxies(NamedTuple):
    """The mean feature of each cluster in each camera that sees it, by camera, then cluster."""

    features: torch.Tensor  # (M, D) unit rows
    labels: torch.Tensor  # (M,)
    cameras: torch.Tensor  # (M,)
    of_label: torch.Tensor  # (C, J) the rows of labels 0, ..., C - 1, padded with -1
    norms: torch.Tensor  # (D,) of each feature dimension, over all proxies


def camera_proxies(features: torch.Tensor, labels: torch.Tensor, cameras: torch.Tensor) -> Proxies:
    """Proxies of (N, D) features; images with label -1 are left out."""
    means, of, seen_by, _ = ops.class_means(features, labels, cameras, normalize=True)
    return Proxies(means, of, seen_by, rows_of_each(of), means.norm(dim=0))


def agnostic_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    centroids: torch.Tensor,
    *,
    temperature: float = 0.5,
    label_smoothing: float = 0.1,
) -> torch.Tensor:
    """Camera-agnostic proxy contrast: each image to the centroid of its cluster.

        L = mean_i -sum_k t_ik log( exp(<f_i, c_k> / t) / sum_k' exp(<f_i, c_k'> / t) )

    with t_ik = (1 - smoothing) [k = labels[i]] + smoothing / C. Neither side is normalised.

    Args:
        features: (B, D) as the encoder gives them. labels: (B,) rows of the centroids. centroids: (C, D).
    """
    loss = ops.bank_cross_entropy(
        features.float(), centroids, labels, scale=1 / temperature, label_smoothing=label_smoothing
    )
    return loss.mean()


def camera_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    cameras: torch.Tensor,
    proxies: Proxies,
    *,
    temperature: float = 0.07,
    hardest: int = 50,
    cam_reduction: str = "sum",
    same_cam_positive: str = "include",
    proxy_norm: str = "row",
    few_proxies: str = "fewer",
    batch_cameras: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-camera proxy contrast: each image to all proxies of its cluster, against hard ones of others.

        l_i = -1/|P_i| sum_{u in P_i} log( exp(s_iu / t) / sum_{v in P_i + Q_i} exp(s_iv / t) )
        L   = sum over cameras of the mean l_i of their images

    with s_iu = <f_i, p_u>, P_i the proxies of i's cluster, Q_i the `hardest` proxies of other clusters with
    the largest s_iu.

    Args:
        features: (B, D), normalised here. labels, cameras: (B,).
        cam_reduction: "sum" over cameras, so that a batch from more cameras has a larger loss, or "mean".
        same_cam_positive: "include"; "exclude": P_i is without the proxy of i's camera, and l_i = 0 where
            no other camera sees the cluster.
        proxy_norm: "row"; "column": s_iu = sum_d f_id p_ud / n_d, n_d the norm of dimension d over all
            proxies.
        few_proxies: where less than `hardest` negatives exist. "fewer": Q_i is all of them. "positives":
            proxies of P_i fill it up, the last ones first, and count in the denominator once more.
        batch_cameras: those of the whole batch, where this is a process's share of it.
    """
    queries = normalize(features.float())
    if proxy_norm == "column":
        queries = queries / proxies.norms.clamp(min=1e-12)
    own = proxies.of_label[labels]
    negatives = ops.mine_negatives(
        queries.detach(),
        proxies.features,
        hardest,
        query_groups=labels,
        bank_groups=proxies.labels,
    ).rows
    if few_proxies == "positives":
        negatives = _filled(negatives, own)
    positives = own
    if same_cam_positive == "exclude":
        positives = own.masked_fill(proxies.cameras[own] == cameras[:, None], -1)
    losses = ops.set_contrast(
        queries, proxies.features, positives, negatives, scale=1 / temperature
    )

    whole = cameras if batch_cameras is None else batch_cameras
    loss = (losses / (cameras[:, None] == whole).sum(dim=1)).sum() * (len(whole) / len(cameras))
    if cam_reduction == "mean":
        loss = loss / (whole[:, None] == whole).sum(dim=1).reciprocal().sum()
    return loss


def hard_instance_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 0.1,
    key_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hard instance contrast: each image to the least similar view of its cluster in the batch.

        h_i = min of s_ij over j of i's label;    s_ij = <q_i, k_j>
        L   = mean_i -log( exp(h_i / t) / (exp(h_i / t) + sum_{j of other labels} exp(s_ij / t)) )

    Images may have any number of negatives; without one, their loss is 0. Each has a key of its label.

    Args:
        queries: (B, D) the encoder's, keys: (B, D) the teacher's, of another view; both normalised here.
        labels: (B,).
        key_labels: (K,) where the keys are those of the whole batch (K, D) and the queries a process's share.
    """
    similarity = _cosines(queries, keys)
    same = labels[:, None] == (labels if key_labels is None else key_labels)
    hardest = similarity.masked_fill(~same, torch.inf).min(dim=1, keepdim=True).values
    among = torch.cat([hardest, similarity.masked_fill(same, -torch.inf)], dim=1)
    return -(among / temperature).log_softmax(dim=1)[:, 0].mean()


def soft_instance_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    weak: torch.Tensor,
    *,
    temperature: float = 0.4,
    weak_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Soft instance consistency: augmented views are as alike as the images themselves.

        A_ij = softmax_j( <q_i, k_j> / t ),    Q_ij = softmax_j( <w_i, w_j> / t )
        L    = mean_i KL(Q_i || A_i) = mean_i sum_j Q_ij (log Q_ij - log A_ij)

    Args:
        queries: (B, D) the encoder's, keys: (B, D) the teacher's, of two strong views; weak: (B, D) the
            teacher's, of the images as they are. All normalised here. Gradients flow to the queries.
        weak_keys: (K, D) where these and the keys (K, D) are those of the whole batch, and the queries and
            `weak` a process's share.
    """
    alike = _cosines(queries, keys) / temperature
    with torch.no_grad():
        target = _cosines(weak, weak if weak_keys is None else weak_keys) / temperature
    return kl_div(
        alike.log_softmax(dim=1), target.log_softmax(dim=1), reduction="batchmean", log_target=True
    )


class ICE(nn.Module):
    """ICE around an encoder of images (B, 3, H, W) to (B, D)."""

    views: tuple[str, ...] = ("strong", "strong", "weak")

    # What the released trainer runs with: its schedule, and its encoder, on four GPUs of 8 images each.
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 40,
        "steps": 400,
        "batch_size": 32,
        "learning_rate": 3.5e-4,
        "weight_decay": 5e-4,
        "warmup_epochs": 10,
        "step_size": None,
        "height": 256,
        "width": 128,
    }
    recipe_presets: ClassVar[dict[str, dict[str, Any]]] = {}
    encoder_options: ClassVar[dict[str, Any]] = {"pooling": "average", "norm_group": 8}

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config = config or Config()
        self.encoder = encoder
        # Views that nothing asks for are not even made. A teacher that then sees no batch has no batch
        # statistics of its own and takes the encoder's.
        second = config.hard_weight or config.extra_forwards
        self.views = self.views[: 3 if config.soft_weight else 2 if second else 1]
        buffers = "own" if len(self.views) > 1 else "copy"
        self.teacher = Teacher(encoder, config.teacher_momentum, buffers=buffers)
        self.clusters: Clusters | None = None
        self.centroids: Any = None
        self.proxies: Any = None
        self._features: Any = None

    @property
    def inference(self) -> nn.Module:
        """What labels images, is evaluated and kept: the teacher's network."""
        return self.teacher.module

    @torch.no_grad()
    def label(self, features: torch.Tensor, cameras: Any) -> torch.Tensor:
        """Lines 2 and 3, from (N, D) unit features and (N,) cameras -> (N,) labels, -1: in no cluster."""
        cameras = torch.as_tensor(cameras, device=features.device)
        self.clusters = cluster(features, cameras, self.config)
        labels = self.clusters.labels
        self.centroids = ops.class_means(features, labels, normalize=False).means
        self.proxies = camera_proxies(features, labels, cameras)
        return labels

    def sampler(
        self, labels: Any, cameras: Any, *, batch_size: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Batches without end: (batch_size,) rows of images."""
        return samplers.camera_spread(
            labels, cameras, batch_size=batch_size, instances=self.config.instances, rng=rng
        )

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Lines 4 and 5: the weighted terms of the loss.

        Data-parallel processes contrast with the teacher's views of the whole batch, so that the mean of
        their losses is the loss of one process with the whole batch."""
        if self.centroids is None:
            raise ValueError("ICE.loss: label() must have been called")
        if len(batch.views) != len(self.views):
            wanted, got = ", ".join(self.views), len(batch.views)
            raise ValueError(f"ICE.loss: batch must have views {wanted}, got {got} views")
        config, labels, cameras = self.config, batch.labels, batch.cameras
        features = self.encoder(batch.views[0]).float()
        if config.extra_forwards:
            with torch.no_grad():
                self.encoder(batch.views[1])
        self._features = normalize(features.detach())

        terms = {
            "agnostic": agnostic_loss(
                features,
                labels,
                self.centroids,
                temperature=config.agnostic_temperature,
                label_smoothing=config.label_smoothing,
            )
        }
        if config.camera_weight:
            terms["camera"] = config.camera_weight * camera_loss(
                features,
                labels,
                cameras,
                self.proxies,
                temperature=config.camera_temperature,
                hardest=config.hardest,
                cam_reduction=config.cam_reduction,
                same_cam_positive=config.same_cam_positive,
                proxy_norm=config.proxy_norm,
                few_proxies=config.few_proxies,
                batch_cameras=distributed.gather_rows(cameras, equal=True),
            )
        if len(self.views) > 1:
            keys, *weak = self._taught(batch.views)
        if config.hard_weight:
            terms["hard"] = config.hard_weight * hard_instance_loss(
                features,
                keys,
                labels,
                temperature=config.hard_temperature,
                key_labels=distributed.gather_rows(labels, equal=True),
            )
        if config.soft_weight:
            terms["soft"] = config.soft_weight * soft_instance_loss(
                features,
                keys,
                weak[0][_own(len(keys))],
                temperature=config.soft_temperature,
                weak_keys=weak[0],
            )
        return terms

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Line 7. With `proxy_momentum`, proxies also follow the features of the latest `loss`, image after
        image (as in CAP, not in ICE); data-parallel processes all make the updates of the whole batch."""
        self.teacher.update(self.encoder)
        if self.config.proxy_momentum is not None:
            rows = _row_of_each(self.proxies, batch.labels, batch.cameras)
            ops.memory_update_(
                self.proxies.features,
                distributed.gather_rows(self._features, equal=True),
                distributed.gather_rows(rows, equal=True),
                momentum=self.config.proxy_momentum,
            )

    def get_extra_state(self) -> dict[str, Any]:
        """What `label` has left for the steps of its epoch: so a run can go on within one."""
        return {"centroids": self.centroids, "proxies": self.proxies and tuple(self.proxies)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.centroids = state["centroids"]
        self.proxies = state["proxies"] and Proxies(*state["proxies"])

    @torch.no_grad()
    def _taught(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The teacher's features of all views but the first: each those of the whole batch, in its order."""
        first, *rest = [distributed.gather_rows(view, equal=True) for view in views]
        order = torch.arange(len(first), device=first.device)
        if self.config.shuffle:
            order = torch.randperm(len(first), device=first.device)
            distributed.copy_from_first_([order])
        back = order.argsort()
        own = order[_own(len(order))]  # what this process works on
        if self.config.extra_forwards:
            self.teacher(first[own])
        if self.config.stack_views:
            features = self.teacher(torch.cat([view[own] for view in rest])).split(len(own))
        else:
            features = [self.teacher(view[own]) for view in rest]
        return [distributed.gather_rows(each.float(), equal=True)[back] for each in features]

    Config = Config  # METHODS[name].Config


def _own(count: int) -> slice:
    """This process's share of a batch."""
    share = distributed.share(count)
    return slice(share.start, share.stop)


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(A, B) cosines of rows, in float32 under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return normalize(a.float()) @ normalize(b.float()).T


def _filled(rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """(B, K) rows, the -1 at their ends replaced by rows of `more` (B, J), the largest first."""
    found = (rows >= 0).sum(dim=1, keepdim=True)
    place = torch.arange(rows.shape[1], device=rows.device) - found  # among those that are missing
    largest = more.sort(dim=1, descending=True).values
    largest = nn.functional.pad(largest, (0, rows.shape[1]), value=-1)
    return torch.where(place < 0, rows, largest.gather(1, place.clamp(min=0)))


def _row_of_each(proxies: Proxies, labels: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
    """(B,) the proxy of each image's cluster and camera."""
    own = proxies.of_label[labels]
    here = (proxies.cameras[own] == cameras[:, None]) & (own >= 0)
    return own.gather(1, here.int().argmax(dim=1, keepdim=True))[:, 0]
