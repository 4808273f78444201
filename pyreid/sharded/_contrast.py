"""Losses of queries against rows that are spread over processes.

Rows stay where they are: queries go to the rows, products come back. All messages go out in the forward pass,
which makes the gradients too, so that backward is each process's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from pyreid import _native, ops
from pyreid.ops import _panels
from pyreid.ops.set_contrast import _gradient_registered
from pyreid.sharded._exchange import Exchange, Places, Route, starts_of

_TAKEN = 2**24  # elements of rows that are held beside the bank at a time


class Shared(NamedTuple):
    """Which labels have rows on several processes."""

    labels: torch.Tensor  # (S,) ascending
    sizes: torch.Tensor  # (S,) rows of each on all processes
    counted: torch.Tensor  # (S,) bool: which this process counts, so that each is counted once
    total: int  # labels in all


class Differentiable(torch.autograd.Function):
    """Losses (B,) of queries (B, D) whose gradients are known already."""

    @staticmethod
    def forward(ctx, queries, work):
        losses, gradients = work(queries.detach(), ctx.needs_input_grad[0])
        ctx.save_for_backward(gradients)
        ctx.dtype = queries.dtype
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (gradients,) = ctx.saved_tensors
        return (grad[:, None] * gradients).to(ctx.dtype), None


def differentiable(
    queries: torch.Tensor, work: Callable[[torch.Tensor, bool], tuple]
) -> torch.Tensor:
    """`work(queries, whether gradients are wanted)` -> losses (B,), and their gradients (B, D)."""
    return Differentiable.apply(queries, work)


# --- cross entropy with a whole bank ------------------------------------------------------------------


class CrossEntropy:
    """Softmax over all rows, or over all labels, of one batch: see `ops.bank_cross_entropy`."""

    def __init__(
        self,
        exchange: Exchange,
        places: Places,
        features: torch.Tensor,
        labels: torch.Tensor,
        shared: Shared | None,
        *,
        scale: float,
        reduce: str,
        smoothing: float,
    ):
        self.exchange, self.places = exchange, places
        self.features, self.labels, self.shared = features, labels, shared
        self.scale, self.reduce, self.smoothing = scale, reduce, smoothing

    def __call__(
        self, queries: torch.Tensor, targets: torch.Tensor, with_gradients: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        exchange = self.exchange
        everyone, counts = exchange.gather("queries", queries)
        everyone = everyone.float()
        wanted, _ = exchange.gather("targets", targets.long(), counts)
        names, which = wanted.unique(return_inverse=True)
        of_target = self._target_means(names)
        on_target = (everyone * of_target[which]).sum(1)

        running = _Running(everyone, self.scale, with_gradients)
        along = torch.zeros(everyone.shape[1], device=everyone.device)  # the sum of all columns
        for vectors, scores, counted in self._columns(everyone):
            running.fold(vectors, scores, counted)
            if self.smoothing > 0:
                along += vectors.sum(0)
        largest = exchange.reduce_("largest logits", running.largest.clone(), "MAX")
        running.move_to(largest)
        sums = torch.stack([running.total, on_target, (everyone * along).sum(1)])
        total, target, of_all = exchange.reduce_("sums of exponentials", sums)

        columns = self.places.total
        if self.reduce == "cluster_mean":
            assert self.shared is not None
            columns = self.shared.total
        kept, spread = 1 - self.smoothing, self.smoothing / max(columns, 1)
        losses = total.log() + largest - self.scale * (kept * target + spread * of_all)
        begin = sum(counts[: exchange.rank])
        losses = losses[begin : begin + len(queries)]
        if running.sums is None:
            return losses, None
        parts = running.sums / total[:, None] - kept * of_target[which] - spread * along
        return losses, added(exchange, (self.scale * parts), counts)

    def _target_means(self, names: torch.Tensor) -> torch.Tensor:
        """(U, D): what this process's rows add to the mean row of each target."""
        means = torch.zeros((len(names), self.features.shape[1]), device=self.features.device)
        if self.reduce == "row":
            own = self.places.own
            here = (names >= own.start) & (names < own.stop)
            means[here] = self.features[names[here] - own.start].float()
            sizes = here.long()
        else:
            place = torch.searchsorted(names, self.labels)
            place = place.clamp(max=max(len(names) - 1, 0))
            rows = (self.labels >= 0).nonzero()[:, 0] if len(names) else place[:0]
            rows = rows[names[place[rows]] == self.labels[rows]]
            sizes = _add_means(means, names, self.features, self.labels, rows)
        sizes = self.exchange.reduce_("rows of targets", sizes)
        missing = (sizes == 0).nonzero()[:, 0]
        if len(missing):
            bad = int(names[missing[0]])
            rule = f"lie in [0, {self.places.total})"
            if self.reduce != "row":
                rule = "be labels that a row of the bank has"
            raise ValueError(f"{self.exchange.op}: targets must {rule}, got {bad}")
        return means / sizes[:, None]

    def _columns(self, queries: torch.Tensor) -> Iterator[tuple]:
        """(vectors (C, D), scores (B, C), which of them this process counts, or None: all) of blocks of what
        the softmax runs over."""
        if self.reduce != "cluster_mean":
            for _, panel in _panels.panels(len(queries), self.features):
                yield _native.widened_half(panel), _panels.product(queries, panel), None
            return
        assert self.shared is not None
        labels = self.labels
        place = torch.searchsorted(self.shared.labels, labels)
        place = place.clamp(max=max(len(self.shared.labels) - 1, 0))
        apart = labels >= 0
        if len(self.shared.labels):
            apart &= self.shared.labels[place] != labels
        height = max(_TAKEN // max(self.features.shape[1], 1), 1)
        for _, rows in _by_label(labels, apart.nonzero()[:, 0], height):
            vectors = ops.class_means(self.features[rows], labels[rows], normalize=False).means
            yield vectors, _panels.product(queries, vectors), None
        # The same blocks on all processes, whether they have rows in them or not.
        divided = ((labels >= 0) & ~apart).nonzero()[:, 0]
        for first in range(0, len(self.shared.labels), height):
            some = slice(first, first + height)
            names = self.shared.labels[some]
            ids = labels[divided]
            rows = divided[(ids >= names[0]) & (ids <= names[-1])]
            vectors = torch.zeros((len(names), queries.shape[1]), device=queries.device)
            _add_means(vectors, names, self.features, labels, rows)
            vectors /= self.shared.sizes[some, None]
            scores = self.exchange.reduce_(
                "logits of divided labels", _panels.product(queries, vectors)
            )
            yield vectors, scores, self.shared.counted[some]


class _Running:
    """What queries have seen so far of the columns here."""

    def __init__(self, queries: torch.Tensor, scale: float, with_gradients: bool):
        self.scale = scale
        self.largest = queries.new_full((len(queries),), -torch.inf)  # logit
        self.total = torch.zeros_like(self.largest)  # of exp(logit - largest)
        self.sums = torch.zeros_like(queries) if with_gradients else None  # of that times vectors

    def fold(
        self, vectors: torch.Tensor, scores: torch.Tensor, counted: torch.Tensor | None
    ) -> None:
        if not scores.shape[1]:
            return
        logits = self.scale * scores
        self.move_to(torch.maximum(self.largest, logits.amax(1)))
        weights = (logits - self.largest[:, None]).exp()
        self.total += (weights if counted is None else weights * counted).sum(1)
        if self.sums is not None:
            _panels.accumulate(self.sums, weights, vectors)

    def move_to(self, largest: torch.Tensor) -> None:
        shrink = (self.largest - largest).exp()
        self.total *= shrink
        if self.sums is not None:
            self.sums *= shrink[:, None]
        self.largest = largest


def shared_labels(exchange: Exchange, labels: torch.Tensor) -> Shared:
    """What `Shared` says of (n,) labels of this process's rows."""
    own, sizes = labels[labels >= 0].unique(return_counts=True)
    every, counts = exchange.gather("labels", own)
    names, holders = every.unique(return_counts=True)
    divided = names[holders > 1]
    lower = every[: sum(counts[: exchange.rank])]
    counted = torch.isin(divided, own) & ~torch.isin(divided, lower)
    rows = torch.zeros(len(divided), dtype=torch.int64, device=labels.device)
    mine = torch.isin(own, divided)
    rows[torch.searchsorted(divided, own[mine])] = sizes[mine]
    return Shared(divided, exchange.reduce_("rows of labels", rows), counted, len(names))


def _add_means(
    sums: torch.Tensor,
    names: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """sums (U, D) += the rows of each label of ascending names (U,), which are all that `rows` have. Returns
    how many each has, (U,)."""
    sizes = torch.zeros(len(names), dtype=torch.int64, device=labels.device)
    height = max(_TAKEN // max(features.shape[1], 1), 1)
    for ids, some in _by_label(labels, rows, height):
        found = ops.class_means(features[some], ids, normalize=False)
        place = torch.searchsorted(names, found.labels)
        sums[place] += found.means * found.counts[:, None]
        sizes[place] += found.counts
    return sizes


def _by_label(
    labels: torch.Tensor, rows: torch.Tensor, height: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(labels, rows) of blocks of about `height` rows, those of a label together, by ascending label."""
    order = rows[labels[rows].argsort(stable=True)]
    ids = labels[order]
    first = 0
    while first < len(order):
        last = min(first + height, len(order))
        last = int(torch.searchsorted(ids, ids[last - 1], right=True))
        yield ids[first:last], order[first:last]
        first = last


def added(exchange: Exchange, parts: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """(B, D): what all processes have made for this one's queries, added in the order of ranks."""
    came = exchange.sent_back("gradients of queries", parts, counts)
    total = came[0].clone()
    for part in came[1:]:
        total += part
    return total


# --- contrast with listed rows --------------------------------------------------------------------------


def set_contrast(
    exchange: Exchange,
    places: Places,
    features: torch.Tensor,
    queries: torch.Tensor,
    listed: torch.Tensor,
    positives: int,
    *,
    weights: torch.Tensor | None,
    scale: float,
    denominator: str,
    with_gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (B,) and gradients (B, D) of `ops.set_contrast`. `listed`: (B, J + K) rows of all, -1 pads, of
    which the first J are positives."""
    everyone, counts = exchange.gather("queries", queries)
    everyone = everyone.float()
    valid = listed != -1
    query, _ = valid.nonzero(as_tuple=True)
    route = Route(exchange, places, "positives and negatives", listed[valid].long())
    offset = sum(counts[: exchange.rank])
    asking = route.tell("queries of rows", (query + offset).int()).long()
    dots = torch.empty(len(asking), device=features.device)
    step = max(_TAKEN // max(features.shape[1], 1), 1)
    for first in range(0, len(asking), step):
        some = slice(first, first + step)
        dots[some] = (everyone[asking[some]] * features[route.asked[some]].float()).sum(1)
    scores = torch.full(listed.shape, -torch.inf, device=features.device)
    scores[valid] = scale * route.answer("dot products", dots)
    with torch.enable_grad():
        scores.requires_grad_()
        losses = _losses(scores, valid, positives, weights, denominator)
        (slopes,) = torch.autograd.grad(losses.sum(), scores)
    if not with_gradients:
        return losses.detach(), None
    slope = route.tell("slopes", (scale * slopes)[valid])
    # Entries come by rank, and by query of each: those of a query stand together.
    sizes = torch.bincount(asking, minlength=len(everyone))
    starts = starts_of(sizes)
    width = int(sizes.max()) if len(sizes) else 0
    place = torch.arange(len(asking), device=asking.device) - starts[asking]
    rows = torch.full((len(everyone), width), -1, device=asking.device)
    rows[asking, place] = route.asked
    held = torch.zeros((len(everyone), width), device=asking.device)
    held[asking, place] = slope
    ones = torch.ones(len(everyone), device=asking.device)
    parts = _gradient_registered(ones, held, features, rows, None)
    return losses.detach(), added(exchange, parts, counts)


def _losses(
    scores: torch.Tensor,
    valid: torch.Tensor,
    positives: int,
    weights: torch.Tensor | None,
    denominator: str,
) -> torch.Tensor:
    of_positive, real = scores[:, :positives], valid[:, :positives]
    if weights is None:
        share = real / real.sum(1, keepdim=True).clamp(min=1)
    else:
        share = weights.float().expand(real.shape) * real
    some = real.any(1, keepdim=True)
    if denominator == "joint":
        among = torch.where(some, scores, 0.0).logsumexp(1, keepdim=True)
    else:
        negative = scores[:, positives:]
        has = valid[:, positives:].any(1, keepdim=True)
        rest = torch.where(has, negative, 0.0).logsumexp(1, keepdim=True)
        plain = torch.where(real, of_positive, 0.0)
        among = torch.where(has, torch.logaddexp(plain, rest), plain)
    return (share * (among - torch.where(real, of_positive, 0.0))).sum(1)
