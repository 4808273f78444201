"""GCL: joint generative and contrastive learning for unsupervised person re-identification (Chen, Wang,
Lagadec, Dantcheva, Bremond, CVPR 2021, arXiv 2012.09071).

Stage 1: any unsupervised training of the encoder; the paper's is JVTC (`methods.jvtc`). Stage 2 trains the
generator and its discriminator, stage 3 these and the encoder.

Before stage 3
    1. bank        <- the encoder, all images once; unit length
Each epoch of stage 3 (in stage 2 there are no clusters, and every image takes part)
    2. labels      <- DBSCAN on the Jaccard distance of the bank's rows, eps from the share rho of all pairs;
                      images in no cluster sit the epoch out
Each step: 16 photos x, as they are, each with its body picture, and this turned by an angle of its own
    3. s, s'       <- the structure encoder, the body as it is and turned
       f, e        <- the encoder, x: appearance and embedding
       x_rec, x_nv <- the decoder: s with f, s' with f
       f_nv, e_nv  <- the encoder, x_nv
       x_cyc       <- the decoder, s with f_nv;  f_rec, f_cyc <- the encoder, x_rec and x_cyc
    4. D           <- the discriminator's step: x to 1; x_rec, x_nv, x_cyc to 0; 0.01 |grad D(x)|^2 (R1)
    5. loss        <- adversarial:    2 (D(.) - 1)^2 of x_rec, x_nv, x_cyc
             +  5 reconstruction: |x_rec - x| + |x_cyc - x|
             +  5 appearance:     |f_rec - f| + |f_cyc - f|, where f is what it is
             +  1 contrast:       stage 3: e_nv to its row of the bank and to a row of its cluster, e to
                                  another of its cluster, each among the same 8192 rows of others
    6. G, encoder  <- the optimisers' steps; in stage 2 the encoder is frozen, and in evaluation mode
    7. bank        <- 0.2 row + 0.8 e; unit length
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import l1_loss, normalize

from pyreid import distributed, ops
from pyreid.data import Batch, samplers
from pyreid.losses import view_invariant_loss
from pyreid.methods.clustering import Clustering, Clusters, cluster
from pyreid.models import Discriminator, Generator, separate_statistics
from pyreid.options import option


@dataclass(frozen=True)
class Config(Clustering):
    """GCL's options. The defaults are the released values, but for the angles: the released code never draws
    315 degrees, which `Config.preset("released")` brings back."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "market1501": {},
        "dukemtmc-reid": {},
        "msmt17": {"rho": 0.0012},
        "released": {"angles": "to 270"},
    }

    rho: float | None = option(
        0.002,
        "sets eps anew each epoch: to the mean of this fraction of all distances, the smallest",
    )
    stage: Literal["2", "3"] = option(
        "3", "2: the generator learns, from an encoder as it is; 3: both learn"
    )
    angles: Literal["to 315", "to 270"] = option(
        "to 315", "by which bodies are turned: all, or as the released code draws them"
    )

    generator_width: int = option(16, "channels of its first layer, from which all follow")
    discriminator_width: int = option(32, "channels of its first layer")
    discriminator_scales: int = option(3, "sizes at which it sees a picture, each half of the last")
    appearance_slices: Literal["channel", "stripe"] = option(
        "channel",
        "what of the appearance each block of the decoder is told: a quarter of the channels, as released, "
        "or one of four stripes",
    )
    gan_rate: float = option(1e-4, "learning rate of generator and discriminator in stage 2")
    gan_rate_joint: float = option(
        1e-5, "likewise in stage 3: what the released code came to by way of its scheduler"
    )
    gan_momentum: float = option(
        0.0, "of the gradients' running mean in their Adam; short runs come further with 0.5"
    )

    adversarial_weight: float = option(1.0, "of what the discriminator makes of generated images")
    pixel_weight: float = option(5.0, "of the reconstruction of pixels, own and cycled")
    appearance_weight: float = option(5.0, "of the reconstruction of the appearance code")
    gradient_weight: float = option(0.01, "of R1, the discriminator's squared gradient at photos")
    contrast_weight: float = option(1.0, "of the contrast with the bank, in stage 3")

    temperature: float = option(0.04, "of the contrast")
    negatives: int = option(8192, "rows of others that each image is contrasted with, if there are")
    neg_query_term3: Literal["generated", "real"] = option(
        "generated", "which view is compared with the negatives of the real view's positive"
    )
    pos_may_be_self: bool = option(True, "a row of an image's cluster may be its own")
    momentum: float = option(0.2, "what is kept of a row of the bank at each update")
    bn_generated: Literal["shared", "apart"] = option(
        "shared",
        "whether generated images move the encoder's running statistics, as photos do; in training "
        "each pass is normalised by its own",
    )


class Generated(NamedTuple):
    """What generator and encoder make of B photos: images (B, 3, H, W), appearance codes (B, F) and
    embeddings (B, D)."""

    reconstructed: torch.Tensor
    turned: torch.Tensor
    cycled: torch.Tensor
    appearance: torch.Tensor  # of the photos
    appearance_reconstructed: torch.Tensor
    appearance_cycled: torch.Tensor
    embedding: torch.Tensor  # of the photos
    embedding_turned: torch.Tensor

    @property
    def images(self) -> tuple[torch.Tensor, ...]:
        return self.reconstructed, self.turned, self.cycled


def discriminator_loss(
    discriminator: nn.Module,
    images: torch.Tensor,
    generated: Sequence[torch.Tensor],
    *,
    gradient_weight: float = 0.01,
) -> dict[str, torch.Tensor]:
    """What the discriminator descends, as least squares with R1, summed over its scales and over the sets of
    generated images y:

        L = sum_y [ mean D(y)^2 + mean (D(x) - 1)^2 + w mean_b |grad_x sum D(x)|^2 ]

    The generated images, which are detached, go through it as one batch; the photos once, and what they add
    counts as often as there are sets. Photos are worked on in float32 under autocast too, for the sake of the
    gradient's gradient.

    Args:
        discriminator: (B, 3, H, W) -> a list of maps, one for each scale.
        images: (B, 3, H, W) photos. generated: sets of B images each.
    """
    fakes = discriminator(torch.cat(list(generated)).detach())
    fake = torch.stack([_wide(each).square().mean() for each in fakes]).sum()
    photos = _wide(images.detach()).requires_grad_()
    slopes = []
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        maps = discriminator(photos)
        real = torch.stack([(each - 1).square().mean() for each in maps]).sum()
        if gradient_weight:
            for each in maps:
                (slope,) = torch.autograd.grad(each.sum(), photos, create_graph=True)
                slopes.append(slope.square().flatten(1).sum(dim=1).mean())
    sets = len(generated)
    terms = {"fake": sets * fake, "real": sets * real}
    if slopes:
        terms["gradient"] = sets * gradient_weight * torch.stack(slopes).sum()
    return terms


def generator_loss(
    discriminator: nn.Module,
    images: torch.Tensor,
    generated: Generated,
    *,
    adversarial_weight: float = 1.0,
    pixel_weight: float = 5.0,
    appearance_weight: float = 5.0,
) -> dict[str, torch.Tensor]:
    """The terms of line 5 but the last: what the generator descends in stage 2, and the encoder too in stage
    3. The discriminator gets no gradient from them; what is reconstructed is what it is: of `images` and of
    their appearance there is none either.

    Args:
        images: (B, 3, H, W) photos, what `generated` was made of.
    """
    with _frozen(discriminator):
        maps = discriminator(torch.cat(generated.images))
    adversarial = torch.stack([(_wide(each) - 1).square().mean() for each in maps]).sum()
    target = _wide(generated.appearance.detach())
    return {
        "adversarial": 2 * adversarial_weight * len(generated.images) * adversarial,
        "reconstruction": pixel_weight * l1_loss(_wide(generated.reconstructed), images),
        "cycle": pixel_weight * l1_loss(_wide(generated.cycled), images),
        "appearance": appearance_weight
        * (
            l1_loss(_wide(generated.appearance_reconstructed), target)
            + l1_loss(_wide(generated.appearance_cycled), target)
        ),
    }


def memory_contrast(
    features: torch.Tensor,
    views: torch.Tensor,
    bank: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    *,
    temperature: float = 0.04,
    negatives: int = 8192,
    seed: int,
    neg_query_term3: str = "generated",
    pos_may_be_self: bool = True,
) -> torch.Tensor:
    """The view-invariant contrast: a photo's and its generated view's embeddings with the bank.

        L = mean_i [ l(b_i, b_i, F_i) + l(b_i, b_i, F_p) + l(a_i, b_i, F_q) ]
        l(u, v, F) = -log( exp(<u, F> / t) / (exp(<u, F> / t) + sum_k exp(<v, F_k> / t)) )

    with a, b the embeddings of photo and view at unit length, p and q rows of the photo's cluster, and k rows
    that are not: up to `negatives` of them, all where there are fewer, in no cluster included.

    Args:
        features, views: (B, D) embeddings, normalised here.
        bank: (N, D) unit rows; no gradient flows to it. labels: (N,), -1 where in no cluster.
        rows: (B,) the photos' own rows, all in clusters.
        seed: of what is drawn.
        neg_query_term3: "generated", as above; "real": the last term has a for v too.
        pos_may_be_self: p and q may be i.
    """
    targets = labels[rows]
    drawn = min(negatives, len(labels))
    # Data-parallel processes draw for the whole batch, and take what is theirs: what one process would.
    everyone = distributed.gather_rows(rows, equal=True)
    share = distributed.share(len(everyone))
    positives, others = (
        found[share.start : share.stop]
        for found in ops.sample_rows(
            labels,
            labels[everyone],
            positives=2,
            negatives=drawn,
            seed=seed,
            exclude_self=None if pos_may_be_self else everyone,
        )
    )
    # Where there are fewer, they come again from the first; each is to count once.
    there = len(labels) - (targets[:, None] == labels).sum(dim=1, keepdim=True)
    others = others.masked_fill(torch.arange(drawn, device=others.device) >= there, -1)
    return view_invariant_loss(
        normalize(features.float()),
        normalize(views.float()),
        bank,
        rows,
        positives,
        others,
        temperature=temperature,
        neg_query_term3=neg_query_term3,
    )


class GCL(nn.Module):
    """GCL's stages 2 and 3 around an encoder that tells appearance and embedding apart, as
    `models.build_part_encoder` makes them.

    Args:
        encoder: (B, 3, H, W) -> (B, D), with `appearance_and_embedding` and `appearance_dim`.
        generator, discriminator: those of an earlier stage; default: new ones, as the config has them.

    Batches are of MeshedImages: a photo, its body picture and this turned.
    """

    # What the released trainer runs with, and its encoder.
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "steps": None,
        "batch_size": 16,
        "optimizer": "sgd",
        "learning_rate": 3.5e-4,
        "weight_decay": 5e-4,
        "warmup_epochs": 0,
        "step_size": 10,
        "gamma": 0.1,
        "height": 256,
        "width": 128,
    }
    recipe_presets: ClassVar[dict[str, dict[str, Any]]] = {}
    generator_recipe: ClassVar[dict[str, Any]] = recipe | {  # of stage 2
        "epochs": 40,
        "step_size": None,
        "evaluate_every": 0,  # the encoder is as it was
    }
    encoder_options: ClassVar[dict[str, Any]] = {"embedding": 512, "parts": 4}

    def __init__(
        self,
        encoder: Any,
        config: Config | None = None,
        *,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ):
        super().__init__()
        self.config = config = config or Config()
        if not hasattr(encoder, "appearance_and_embedding"):
            raise ValueError(
                "GCL: encoder must tell appearance_and_embedding, as models.build_part_encoder's do, "
                f"got a {type(encoder).__name__}"
            )
        self.encoder = encoder
        self.generator: Any = generator or Generator(
            encoder.appearance_dim, config.generator_width, slices=config.appearance_slices
        )
        self.discriminator = discriminator or Discriminator(
            config.discriminator_width, config.discriminator_scales
        )
        self.joint = config.stage == "3"
        turned = "turned mesh" if config.angles == "to 315" else "turned mesh to 270"
        self.views = ("plain", "mesh", turned)
        for weight in encoder.parameters():
            weight.requires_grad_(self.joint)
        self.clusters: Clusters | None = None
        self.bank: Any = None
        self.labels: Any = None
        self._embedding: Any = None
        self.train(self.training)

    @property
    def inference(self) -> nn.Module:
        """What labels images, is evaluated and kept: the encoder itself."""
        return self.encoder

    @property
    def beside(self) -> dict[str, nn.Module]:
        """What is kept beside the encoder, each in a file of its own."""
        return {"generator": self.generator, "discriminator": self.discriminator}

    @property
    def wants_features(self) -> bool:
        """Whether `label` makes use of features: once in stage 3."""
        return self.joint and self.bank is None

    def train(self, mode: bool = True) -> GCL:
        """In stage 2 the encoder stays in evaluation mode."""
        super().train(mode)
        if not self.joint:
            self.encoder.eval()
        return self

    def optimizers(self, training: Any) -> dict[str, torch.optim.Optimizer]:
        """Of the discriminator, the generator and in stage 3 the encoder, for which the learning rate of
        `training` is."""
        config, decay = self.config, training.weight_decay
        rate = config.gan_rate_joint if self.joint else config.gan_rate
        betas = (config.gan_momentum, 0.999)
        made: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam(network.parameters(), rate, betas, weight_decay=decay)
            for name, network in self.beside.items()
        }
        if self.joint:
            weights = [weight for weight in self.encoder.parameters() if weight.requires_grad]
            common: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": decay}
            if training.optimizer == "sgd":
                made["encoder"] = torch.optim.SGD(weights, momentum=0.9, nesterov=True, **common)
            else:
                made["encoder"] = torch.optim.Adam(weights, **common)
        return made

    @torch.no_grad()
    def label(self, features: torch.Tensor | None, cameras: Any) -> torch.Tensor:
        """Line 1, the first time, from (N, D) features, and line 2 -> (N,) labels, -1: in no cluster. In
        stage 2 all are -1."""
        if not self.joint:
            self.labels = torch.full((len(cameras),), -1)
            return self.labels
        if self.bank is None:
            if features is None:
                raise ValueError("GCL.label: features must be given the first time, got None")
            self.bank = normalize(features.float()).contiguous()
        elif len(cameras) != len(self.bank):
            raise ValueError(
                f"GCL.label: cameras must be those of the {len(self.bank)} images it began with, "
                f"got {len(cameras)}"
            )
        cameras = torch.as_tensor(cameras, device=self.bank.device)
        self.clusters = cluster(self.bank, cameras, self.config)
        self.labels = self.clusters.labels
        if self.clusters.found == 1 and not self.clusters.noise:
            raise ValueError(
                f"GCL.label: clusters must leave each image some others to be told from, got one of all "
                f"{len(self.bank)} images; {self._radius()} is too large"
            )
        return self.labels

    def sampler(
        self, labels: Any, cameras: Any, *, batch_size: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Batches without end: (batch_size,) rows of images, in stage 3 of those in clusters."""
        labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
        rows = np.flatnonzero(labels >= 0) if self.joint else np.arange(len(labels))
        if len(rows) < batch_size:
            where = f" in clusters; {self._radius()} may be too small" if self.joint else ""
            raise ValueError(
                f"GCL.sampler: a batch of {batch_size} must have as many images, got {len(rows)}{where}"
            )
        return samplers.shuffled(rows, batch_size=batch_size, rng=rng)

    def generate(self, images: torch.Tensor, body: torch.Tensor, turned: torch.Tensor) -> Generated:
        """Line 3, for (B, 3, H, W) photos and the (B, 1, H, W) pictures of their bodies. Reconstructions and
        turned views go through decoder and encoder as one batch, and are normed as two."""
        count, decode = len(images), self.generator.decoder
        encode = self.encoder.appearance_and_embedding
        moves = self.config.bn_generated == "shared"
        structure = self.generator.structure(torch.cat([body, turned]))
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            appearance, embedding = encode(images)
        made = decode(structure, appearance.repeat(2, 1))
        with separate_statistics(self.encoder, 2, running=moves):
            codes, embeddings = encode(made)
        cycled = decode(structure[:count], codes[count:])
        with separate_statistics(self.encoder, running=moves):
            appearance_cycled, _ = encode(cycled)
        return Generated(
            reconstructed=made[:count],
            turned=made[count:],
            cycled=cycled,
            appearance=appearance,
            appearance_reconstructed=codes[:count],
            appearance_cycled=appearance_cycled,
            embedding=embedding,
            embedding_turned=embeddings[count:],
        )

    def phases(self, batch: Batch) -> Iterator[tuple[dict[str, torch.Tensor], tuple[str, ...]]]:
        """Lines 3 to 6: losses and whose they are; the step is taken before the next is asked for."""
        if len(batch.views) != 3:
            wanted, got = ", ".join(self.views), len(batch.views)
            raise ValueError(f"GCL.phases: batch must have views {wanted}, got {got} views")
        if self.joint and self.bank is None:
            raise ValueError("GCL.phases: label() must have been called")
        config, images = self.config, batch.views[0]
        made = self.generate(*batch.views)
        losses = discriminator_loss(
            self.discriminator, images, made.images, gradient_weight=config.gradient_weight
        )
        yield losses, ("discriminator",)

        losses = generator_loss(
            self.discriminator,
            images,
            made,
            adversarial_weight=config.adversarial_weight,
            pixel_weight=config.pixel_weight,
            appearance_weight=config.appearance_weight,
        )
        if not self.joint:
            yield losses, ("generator",)
            return
        seed = int(torch.randint(2**62, ()))
        self._embedding = normalize(made.embedding.detach().float())
        losses["contrast"] = config.contrast_weight * memory_contrast(
            made.embedding,
            made.embedding_turned,
            self.bank,
            self.labels,
            batch.rows,
            temperature=config.temperature,
            negatives=config.negatives,
            seed=seed,
            neg_query_term3=config.neg_query_term3,
            pos_may_be_self=config.pos_may_be_self,
        )
        yield losses, ("generator", "encoder")

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Line 7, with the embeddings that the latest step began with. Data-parallel processes all make the
        updates of the whole batch."""
        if self.joint:
            ops.memory_update_(
                self.bank,
                distributed.gather_rows(self._embedding, equal=True),
                distributed.gather_rows(batch.rows, equal=True),
                momentum=self.config.momentum,
                repeats="last",
            )

    @torch.no_grad()
    def render(
        self, images: torch.Tensor, bodies: torch.Tensor, *, back: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Photos in other poses: in evaluation mode, for pictures.

        Args:
            images: (B, 3, H, W). bodies: (B, T, 1, H, W), the first as the photo's is.
            back: the pose from which the cycle comes back; default: the middle one.

        Returns:
            (B, T, 3, H, W) the photo's person in each of the poses, of which the first is the
            reconstruction, and (B, 3, H, W) the cycle.
        """
        count, poses = bodies.shape[:2]
        mode = self.training
        self.eval()
        appearance, _ = self.encoder.appearance_and_embedding(images)
        structure = self.generator.structure(bodies.flatten(0, 1))
        drawn = self.generator.decoder(structure, appearance.repeat_interleave(poses, dim=0))
        drawn = drawn.unflatten(0, (count, poses)).float()
        there = drawn[:, poses // 2 if back is None else back].contiguous()
        appearance, _ = self.encoder.appearance_and_embedding(there)
        cycled = self.generator.decoder(structure[::poses].contiguous(), appearance)
        self.train(mode)
        return drawn, cycled.float()

    def get_extra_state(self) -> dict[str, Any]:
        """The bank, which lives as long as the run, and its rows' clusters."""
        return {"bank": self.bank, "labels": self.labels}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.bank, self.labels = state["bank"], state["labels"]

    def _radius(self) -> str:
        config = self.config
        return f"eps {config.eps}" if config.rho is None else f"rho {config.rho}"

    Config = Config  # METHODS[name].Config


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within it no weight of the module asks for a gradient."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 at least, whatever autocast made of it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
