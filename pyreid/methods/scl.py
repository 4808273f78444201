"""SCL: fully unsupervised person re-identification via selective contrastive learning (Pang, Zhai, Jiang,
Liu, ACM TOMM 2022, arXiv 2010.07608).

Once
    1. ranking bank <- the encoder, all images as they are: a global part and 8 stripes, unit length each
       mixture bank <- 0
Each step: 8 images, some mirrored; every image is a class of its own
    2. g, l         <- the encoder: the global part; the stripes, one after another in one vector
    3. positives    <- the image and the 7 others with the least
                       0.5 ||g - G||^2 + 0.5 mean over stripes ||l_s - L_s||^2 + 0.05 [same camera]
       negatives    <- the 500 behind them. In the first 3 epochs: no neighbours, and random negatives
    4. loss         <- 0.5 local + 0.5 global: l and g to the mixture's rows of the positives, among these and
                       the negatives
    5. encoder      <- the optimiser's step
    6. mixture bank <- for l, then g; for each place among the positives, the last first; image after image:
                       row <- 0.5 row + 0.5 query; unit length
    7. ranking bank <- the image's own row <- 0.5 row + 0.5 (g, l); unit parts

An encoder may tell the sizes of its `parts`, the global one first; one that does not is all global.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from pyreid import distributed, ops
from pyreid.data import Batch, samplers
from pyreid.losses import selective_loss, selective_weights
from pyreid.options import Presets, option


@dataclass(frozen=True)
class Config(Presets):
    """SCL's options. The defaults are the released values, but for two oversights of the released code, which
    `Config.preset("released")` brings back: grad_bank and init_negatives."""

    # Released for Market-1501 only; a log tells of DukeMTMC-VideoReID.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "market1501": {},
        "dukemtmc-reid": {},
        "msmt17": {},
        "mars": {},
        "dukemtmc-videoreid": {"local_weight": 0.3},
        "released": {"grad_bank": "progressive", "init_negatives": "released"},
    }

    neighbours: int = option(7, "positives beside the image itself")
    negatives: int = option(500, "negatives, at most: the ranks behind the neighbours")
    window: Literal["fixed", "gap", "quantile", "random"] = option(
        "fixed",
        "which of them: all; those up to a gap, or a quantile, of similarity; random: of all other rows",
    )
    gap: float = option(0.2, "window gap: how much less alike than the last neighbour they may be")
    quantile: float = option(
        0.5, "window quantile: this share of the batch's negatives is left out"
    )
    global_weight: float = option(
        0.5, "of the global part in distances; the stripes share the rest"
    )
    camera_weight: float = option(0.05, "added to the distance of images of one camera")
    test_camera_weight: float = option(0.05, "likewise, in a ranking of test images of its own")
    local_weight: float = option(0.5, "of the stripes in the loss; the global part has the rest")
    self_weight: float = option(0.5, "of the image itself among the positives")
    alpha: float = option(1.75, "times 1 - self_weight: of its neighbours together")
    temperature: float = option(0.1, "of the loss")
    momentum: float = option(0.5, "what is kept of a row of the ranking bank at each update")
    mixture_momentum: float = option(0.5, "likewise, of the mixture bank")
    initial_epochs: int = option(3, "epochs without neighbours, with random negatives")

    grad_bank: Literal["snapshot", "progressive"] = option(
        "snapshot",
        "progressive: gradients against a mixture bank that each term has moved, as in the released code",
    )
    init_negatives: Literal["random", "released"] = option(
        "random",
        "of the first epochs; released: a random row is left out for each image, in place of its own",
    )
    local_query_norm: Literal["concat", "unit"] = option(
        "concat", "length of the stripes' query: the root of their number, as released, or 1"
    )
    neighbour_write: Literal["neighbours", "anchor"] = option(
        "neighbours", "rows of the mixture bank that an image moves: all its positives, or its own"
    )

    def __post_init__(self) -> None:
        if self.neighbours < 0 or self.negatives < 1:
            raise ValueError(
                "SCL: neighbours must not be negative and negatives at least 1, "
                f"got {self.neighbours} and {self.negatives}"
            )
        for name in ("global_weight", "local_weight", "self_weight", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"SCL: {name} must lie in [0, 1], got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"SCL: temperature must be positive, got {self.temperature}")


class Selection(NamedTuple):
    """Bank rows that the loss of each image is made of."""

    positives: torch.Tensor  # (B, 1 + P), the image's own row first, then the nearest
    negatives: torch.Tensor  # (B, K), the nearest first; -1 behind the last


def select(
    features: torch.Tensor,
    bank: torch.Tensor,
    rows: torch.Tensor,
    *,
    parts: Sequence[int],
    neighbours: int = 7,
    negatives: int = 500,
    global_weight: float = 0.5,
    cameras: torch.Tensor | None = None,
    bank_cameras: torch.Tensor | None = None,
    camera_weight: float = 0.05,
    window: str = "fixed",
    gap: float = 0.2,
    quantile: float = 0.5,
    seed: int = 0,
) -> Selection:
    """The rows nearest to each image as positives, and those behind them as negatives.

        d(i, n) = w_0 ||f_i0 - b_n0||^2 + sum_s w_s ||f_is - b_ns||^2 + camera_weight [same camera]

    with w_0 = global_weight and w_s = (1 - global_weight) / S. Parts have unit length, so that this is
    2 - 2 <w f_i, b_n> + camera_weight [same camera]: the ranks come from one product with the bank.

    How many of the `negatives` ranks are kept is, for each image,
        "fixed":    all of them.
        "gap":      those whose d is at most 2 * gap more than that of the last neighbour: few where
                    the neighbours stand apart from the others, many where they are among their like.
        "quantile": those whose d is not among the largest `quantile` of all that the batch's images have to
                    their `negatives` ranks: images in dense places have more than those in empty ones.
    The first is always kept. And
        "random":   `negatives` rows of all but the positives, anywhere, by `random_negatives` with `seed`.
                    Places of positives are pads.

    Args:
        features: (B, D), and bank: (N, D), each part a unit vector. rows: (B,) the images' own.
        parts: sizes, the global one first. One part is all global.
        cameras, bank_cameras: (B,) and (N,) ids, or None.

    Returns:
        Selection((B, 1 + P), (B, K)), P = min(neighbours, N - 2), K = min(negatives, N - 1 - P). Ties go to
        the lower row.
    """
    neighbours = max(min(neighbours, len(bank) - 2), 0)
    by_camera = cameras is not None and bank_cameras is not None and camera_weight != 0
    scores, found = ops.mine_negatives(
        features * part_weights(parts, global_weight, device=features.device),
        bank,
        max(min(neighbours + (0 if window == "random" else negatives), len(bank) - 1), 1),
        self_rows=rows,
        query_cameras=cameras if by_camera else None,
        bank_cameras=bank_cameras if by_camera else None,
        camera_penalty=camera_weight / 2 if by_camera else 0.0,
    )
    behind, others = scores[:, neighbours:], found[:, neighbours:].contiguous()
    nearest = found[:, :neighbours]
    if window == "random":
        others = random_negatives(rows, len(bank), negatives, seed=seed)
        others = others.masked_fill((others[:, :, None] == nearest[:, None]).any(dim=2), -1)
    elif window != "fixed":
        if window == "gap":
            least = scores[:, max(neighbours - 1, 0)] - gap
        else:
            least = behind_quantile(distributed.gather_rows(behind, equal=True), quantile)
        kept = behind >= least[:, None]
        kept[:, 0] = True
        others = others.masked_fill(~kept, -1)
    return Selection(torch.cat([rows[:, None], nearest], dim=1), others)


def behind_quantile(scores: torch.Tensor, quantile: float) -> torch.Tensor:
    """(1,) the `quantile` of all (B, K) scores, without interpolation: the lower of two neighbours."""
    ordered = scores.flatten().sort().values
    return ordered[int(quantile * (len(ordered) - 1))][None]


def random_negatives(
    rows: torch.Tensor, size: int, count: int, *, seed: int, rule: str = "random"
) -> torch.Tensor:
    """(B, K) bank rows in one random order for the whole batch, K = min(count, size - 1).

    Each image leaves out its own row ("random"), or whatever stands at the place of that number ("released":
    the released code deletes by position, and so an image may be among its own negatives).

    Args:
        rows: (B,) the images' own. size: of the bank. seed: as for `ops.sample_rows`.
    """
    count = min(count, size - 1)
    nobody = torch.full((size,), -1, dtype=torch.int64, device=rows.device)
    drawn = ops.sample_rows(nobody, nobody[:1], positives=1, negatives=count + 1, seed=seed)[1][0]
    place = rows[:, None]
    if rule == "random":
        own = drawn == place
        place = torch.where(own.any(dim=1), own.int().argmax(dim=1), count)[:, None]
    slots = torch.arange(count, device=rows.device)
    return drawn[slots + (slots >= place)]


def progressive_loss(
    queries: torch.Tensor,
    bank: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    *,
    self_weight: float = 0.5,
    alpha: float = 1.75,
    scale: float = 10.0,
    momentum: float = 0.5,
    all_queries: torch.Tensor | None = None,
    all_positives: torch.Tensor | None = None,
    write: str = "neighbours",
) -> torch.Tensor:
    """`selective_loss` (Q,) of (Q, B, D) queries with the gradients of the released code.

    There backward itself moves the bank: term after term, in the order of `mixture_events`, each takes its
    gradient with the softmax of the bank as it was but the rows of the bank as the terms before have left
    them. `bank` is not changed here.

    Args:
        all_queries (Q, K, D), all_positives (K, 1 + P): those of the whole batch, where this is a process's
            share of it.
    """
    if all_queries is None or all_positives is None:
        all_queries, all_positives = queries.detach(), positives
    options: dict[str, Any] = {"self_weight": self_weight, "alpha": alpha}
    fixed = queries.detach()
    value = selective_loss(fixed, bank, positives, negatives, scale=scale, **options)
    weights = selective_weights(positives.shape[1] - 1, **options).tolist()
    listed = torch.cat([positives, negatives], dim=1)
    rows = listed.clamp(min=0)
    logits = scale * torch.einsum("qbd,bad->qba", fixed, bank[rows])
    shares = logits.masked_fill(listed < 0, -torch.inf).softmax(dim=2)
    moving, gradient = bank.clone(), torch.zeros_like(fixed)
    for q in range(len(fixed)):
        for j in reversed(range(len(weights))):
            mean = torch.einsum("ba,bad->bd", shares[q], moving[rows])
            gradient[q] += weights[j] * (mean - moving[positives[:, j]])
            if j == 0 or write == "neighbours":
                own = all_positives[:, j].contiguous()
                ops.memory_update_(moving, all_queries[q].contiguous(), own, momentum=momentum)
    gradient *= scale / positives.shape[0]
    return value + ((queries - fixed) * gradient).sum(dim=(1, 2))


def mixture_events(
    queries: torch.Tensor, positives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The updates of the mixture bank by (Q, B, D) queries with (B, J) positives, in the released order:
    branch after branch; positives from the last to the image itself; the batch in its order.

    Returns:
        features (Q J B, D) and rows (Q J B,), for one `ops.memory_update_`.
    """
    branches, batch, dim = queries.shape
    places = positives.shape[1]
    features = queries[:, None].expand(branches, places, batch, dim).reshape(-1, dim)
    return features, positives.flip(1).T.reshape(-1).repeat(branches)


def blended_distance(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    *,
    parts: Sequence[int],
    global_weight: float = 0.5,
    query_cameras: torch.Tensor | None = None,
    gallery_cameras: torch.Tensor | None = None,
    camera_weight: float = 0.0,
) -> torch.Tensor:
    """(Q, G) the distance that SCL tests with: of norms that are not squared, unlike in training.

        d(q, g) = w_0 ||q_0 - g_0|| + sum_s w_s ||q_s - g_s|| + camera_weight [same camera]

    Args:
        queries: (Q, D), gallery: (G, D); each part is normalised here. parts, global_weight: as for `select`.
        query_cameras, gallery_cameras: (Q,), (G,).
    """
    total = queries.new_zeros(len(queries), len(gallery), dtype=torch.float32)
    queries, gallery = (unit_parts(x, parts).split(tuple(parts), dim=1) for x in (queries, gallery))
    for q, g, weight in zip(queries, gallery, _weights(parts, global_weight), strict=True):
        total.add_((q @ g.T).mul_(-2).add_(2).clamp_(min=0).sqrt_(), alpha=weight)
    if camera_weight and query_cameras is not None and gallery_cameras is not None:
        total += camera_weight * (query_cameras[:, None] == gallery_cameras)
    return total


def unit_parts(features: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
    """(B, D) float32 with each part divided by its length."""
    return torch.cat([normalize(p.float()) for p in features.split(tuple(parts), dim=1)], dim=1)


def part_weights(
    parts: Sequence[int], global_weight: float, *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(D,) the weight in distances of the part that each column belongs to."""
    weights = _weights(parts, global_weight)
    sized = zip(parts, weights, strict=True)
    return torch.cat([torch.full((size,), weight, device=device) for size, weight in sized])


def _weights(parts: Sequence[int], global_weight: float) -> list[float]:
    stripes = len(parts) - 1
    return [global_weight, *[(1 - global_weight) / stripes] * stripes] if stripes else [1.0]


class SCL(nn.Module):
    """SCL around an encoder of images (B, 3, H, W) to (B, D), whose `parts` are (D / 2, then stripes).

    The encoder's `global_weight`, if it has one, is set to the config's."""

    views = ("mirrored",)

    # What the released trainer runs with: its schedule and its encoder. An epoch is a pass over the images.
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 50,
        "steps": 1617,
        "batch_size": 8,
        "optimizer": "sgd",
        "learning_rate": 1e-3,
        "weight_decay": 5e-4,
        "warmup_epochs": 0,
        "step_size": None,
        "height": 256,
        "width": 128,
    }
    recipe_presets: ClassVar[dict[str, dict[str, Any]]] = {
        "dukemtmc-reid": {"steps": 2066},
        "msmt17": {"steps": 4078},
        "mars": {"steps": 1038},
        "dukemtmc-videoreid": {"steps": 275, "epochs": 55},
    }
    encoder_options: ClassVar[dict[str, Any]] = {
        "pooling": "average",
        "embedding": 2048,
        "stripes": 8,
        "stripe_embedding": 256,
    }

    def __init__(self, encoder: nn.Module, config: Config | None = None):
        super().__init__()
        self.config = config or Config()
        self.encoder = encoder
        parts = getattr(encoder, "parts", None)
        if parts and len(parts) > 1 and parts[0] != sum(parts[1:]):
            raise ValueError(
                "SCL: encoder must have a global part as wide as its stripes together, since both are "
                f"contrasted with one bank, got parts {tuple(parts)}"
            )
        if isinstance(weight := getattr(encoder, "global_weight", None), torch.Tensor):
            weight.fill_(self.config.global_weight)
        self.epoch = 0
        self.bank: Any = None  # (N, D) unit parts: for ranking
        self.mixture: Any = None  # (N, D / 2): for the loss
        self.cameras: Any = None
        self._latest: Any = None

    @property
    def inference(self) -> nn.Module:
        """What is evaluated and kept: the encoder itself."""
        return self.encoder

    @property
    def wants_features(self) -> bool:
        """Whether `label` makes use of features: once."""
        return self.bank is None

    @torch.no_grad()
    def label(self, features: torch.Tensor | None, cameras: Any) -> torch.Tensor:
        """Line 1, the first time, from (N, D) features and (N,) cameras; and an epoch begins. There are no
        clusters: (N,) labels -1."""
        if self.bank is None:
            if features is None:
                raise ValueError("SCL.label: features must be given the first time, got None")
            neighbours = self.config.neighbours
            if len(features) < neighbours + 2:
                raise ValueError(
                    f"SCL.label: features must be of at least {neighbours + 2} images "
                    f"(neighbours {neighbours}), got {len(features)}"
                )
            self.cameras = torch.as_tensor(cameras, device=features.device)
            parts = getattr(self.encoder, "parts", None) or (features.shape[1],)
            self.bank = unit_parts(features, parts).contiguous()
            self.mixture = self.bank.new_zeros(len(features), parts[0])
        elif len(cameras) != len(self.bank):
            raise ValueError(
                f"SCL.label: cameras must be those of the {len(self.bank)} images it began with, "
                f"got {len(cameras)}"
            )
        self.epoch += 1
        return torch.full((len(self.bank),), -1, device=self.bank.device)

    def sampler(
        self, labels: Any, cameras: Any, *, batch_size: int, rng: np.random.Generator
    ) -> Iterator[np.ndarray]:
        """Batches without end: (batch_size,) rows of images."""
        return samplers.shuffled(np.arange(len(labels)), batch_size=batch_size, rng=rng)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Lines 2 to 4: the weighted terms of the loss."""
        if self.bank is None:
            raise ValueError("SCL.loss: label() must have been called")
        if len(batch.views) != 1:
            raise ValueError(
                f"SCL.loss: batch must have view mirrored, got {len(batch.views)} views"
            )
        config = self.config
        features = unit_parts(self.encoder(batch.views[0]), self.parts)
        positives, negatives = self.select(features.detach(), batch.rows, batch.cameras)
        self._latest = features.detach(), positives
        weights, queries = self._branches(features)
        options: dict[str, Any] = {
            "self_weight": config.self_weight,
            "alpha": config.alpha,
            "scale": 1 / config.temperature,
        }
        if config.grad_bank == "progressive":
            everything, all_positives = self._gathered()
            losses = progressive_loss(
                queries,
                self.mixture,
                positives,
                negatives,
                momentum=config.mixture_momentum,
                all_queries=self._branches(everything)[1],
                all_positives=all_positives,
                write=config.neighbour_write,
                **options,
            )
        else:
            losses = selective_loss(queries, self.mixture, positives, negatives, **options)
        terms = zip(weights.items(), losses, strict=True)
        return {name: weight * loss for (name, weight), loss in terms}

    @torch.no_grad()
    def select(
        self, features: torch.Tensor, rows: torch.Tensor, cameras: torch.Tensor
    ) -> Selection:
        """Line 3, for (B, D) features in unit parts and their (B,) rows and cameras."""
        config = self.config
        initial = self.epoch <= config.initial_epochs
        seed = 0
        if initial or config.window == "random":
            seed = int(
                torch.randint(2**62, ())
            )  # of the CPU's generator: the same on all processes
        if not initial:
            return select(
                features,
                self.bank,
                rows,
                parts=self.parts,
                neighbours=config.neighbours,
                negatives=config.negatives,
                global_weight=config.global_weight,
                cameras=cameras,
                bank_cameras=self.cameras,
                camera_weight=config.camera_weight,
                window=config.window,
                gap=config.gap,
                quantile=config.quantile,
                seed=seed,
            )
        negatives = random_negatives(
            rows,
            len(self.bank),
            config.neighbours + config.negatives,
            seed=seed,
            rule=config.init_negatives,
        )
        return Selection(rows[:, None], negatives)

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Lines 6 and 7, with what the latest `loss` has found: before the step, as the released code.

        Data-parallel processes all make the updates of the whole batch, in the order of their ranks."""
        features, positives = self._gathered()
        _, queries = self._branches(features)
        if self.config.neighbour_write == "anchor":
            positives = positives[:, :1]
        ops.memory_update_(
            self.mixture,
            *mixture_events(queries, positives),
            momentum=self.config.mixture_momentum,
        )
        ops.memory_update_(
            self.bank,
            features,
            positives[:, 0].contiguous(),
            momentum=self.config.momentum,
            repeats="last",
            parts=self.parts,
        )

    @property
    def parts(self) -> tuple[int, ...]:
        """Sizes of the parts of a row: the global one, then stripes."""
        return tuple(getattr(self.encoder, "parts", None) or (self.bank.shape[1],))

    def distances(
        self,
        queries: torch.Tensor,
        gallery: torch.Tensor,
        query_cameras: torch.Tensor,
        gallery_cameras: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The distance of the released evaluation, without and with its camera term, of (Q, D) and (G, D)
        features: each (Q, G), by name."""
        parts = getattr(self.encoder, "parts", None) or (queries.shape[1],)
        plain = blended_distance(
            queries, gallery, parts=parts, global_weight=self.config.global_weight
        )
        if not self.config.test_camera_weight:
            return {"not squared": plain}
        same = query_cameras[:, None] == gallery_cameras
        return {
            "not squared": plain,
            "not squared, cameras": plain + self.config.test_camera_weight * same,
        }

    def get_extra_state(self) -> dict[str, Any]:
        """The banks, which live as long as the run, and how far it is."""
        return {
            "epoch": self.epoch,
            "bank": self.bank,
            "mixture": self.mixture,
            "cameras": self.cameras,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.bank = state["epoch"], state["bank"]
        self.mixture, self.cameras = state["mixture"], state["cameras"]

    def _branches(self, features: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
        """Weights by name and queries (Q, B, D / 2) of the branches of the loss, in the order of the mixture
        bank's updates: stripes, global. A branch that weighs nothing is left out."""
        first, weight = self.parts[0], self.config.local_weight
        whole, striped = features[:, :first], features[:, first:]
        if not striped.shape[1]:
            return {"global": 1.0}, whole[None]
        if self.config.local_query_norm == "unit":
            striped = striped / (len(self.parts) - 1) ** 0.5
        branches = {"local": (weight, striped), "global": (1 - weight, whole)}
        kept = {name: branch for name, branch in branches.items() if branch[0]}
        queries = torch.stack([query for _, query in kept.values()])
        return {name: branch[0] for name, branch in kept.items()}, queries

    def _gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and positives of the whole batch, in the order of ranks."""
        features, positives = (distributed.gather_rows(x, equal=True) for x in self._latest)
        return features, positives

    Config = Config  # METHODS[name].Config
