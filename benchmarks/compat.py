"""What other projects' functions take, and what pyreid.compat's take in their place.

`python -m benchmarks.compat` in a checkout, `python -m pyreid.benchmarks.compat` elsewhere. Both sides get
the same input, and their results are compared before anything is said about time. Theirs are written here
the way they are published: NumPy loops over rows and N x N arrays for distances, loops over the batch for
memories; neighbours by a product and topk, which is what faiss's flat index does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pyreid.compat import cluster_contrast, gcl, ice, mmt, openunreid, spcl

from .bench_jaccard import features_of, published
from .run import describe_machine, machine_line

K1, K2, EPS = 30, 6, 0.6


@dataclass(frozen=True)
class Pair:
    """Two ways to the same result. `make` gives each call a state of its own."""

    project: str
    what: str
    size: str
    make: Callable[[], Any]
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    tolerance: float = 1e-4


def main(argv: list[str] | None = None, made: Callable[..., Iterator[Pair]] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", default="3000,12936", help="numbers of images, with commas")
    parser.add_argument("--projects", help="some of them, with commas")
    parser.add_argument("--dim", type=int, default=2048, help="of features")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side of each pair")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    importlib.import_module("sklearn.cluster")
    machine = describe_machine([])
    print(machine_line(machine), flush=True)
    print("\n| project | what | size | pyreid | theirs | ratio |\n|---|---|---|---|---|---|")
    wanted = arguments.projects.split(",") if arguments.projects else None
    results = []
    sizes = [int(size) for size in arguments.sizes.split(",")]
    for pair in (made or pairs)(sizes, arguments.dim):
        if wanted and pair.project not in wanted:
            continue
        ours, theirs = timed(pair, arguments.seconds)
        cells = (pair.project, pair.what, pair.size, seconds(ours), seconds(theirs))
        print(f"| {' | '.join(cells)} | {theirs / ours:.1f}x |", flush=True)
        named = {"project": pair.project, "what": pair.what, "size": pair.size}
        results.append({**named, "ours": ours, "theirs": theirs})
        if arguments.json:
            content = {"machine": machine, "results": results}
            Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")


def pairs(sizes: list[int], dim: int) -> Iterator[Pair]:
    for size in sizes:
        yield three_clusterings(size, dim)
        yield hybrid_memory(size, dim)
        yield one_clustering(size, dim)
        yield label_generator(size, dim)
        yield eps_from_rho(size, dim)
        yield view_memory(size, dim // 4)
        if size <= 4000:
            yield mmt_distance(size, dim)
            yield re_ranking(size, dim)
    for use_hard in (False, True):
        yield cluster_memory(dim, use_hard)
    yield camera_loss(dim)


def timed(pair: Pair, budget: float) -> tuple[float, float]:
    """Median seconds of each side, in turns; what takes longer than the budget, once. The first results are
    compared."""
    samples: tuple[list[float], list[float]] = ([], [])
    first: list[Any] = []
    turns = [0, 1]
    while turns:
        for side in list(turns):
            state = pair.make()
            start = time.perf_counter()
            result = (pair.ours, pair.theirs)[side](state)
            samples[side].append(time.perf_counter() - start)
            if len(first) < 2:
                first.append(result)
            long = samples[side][0] > budget
            if long or (sum(samples[side]) > budget and len(samples[side]) > 4):
                turns.remove(side)
        if len(first) == 2:
            torch.testing.assert_close(*first, rtol=pair.tolerance, atol=pair.tolerance)
            first.append(None)  # compared
    return statistics.median(samples[0]), statistics.median(samples[1])


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


# --- clustering -----------------------------------------------------------------------------------


def sklearn_labels(distance: np.ndarray, eps: float) -> np.ndarray:
    from sklearn.cluster import DBSCAN  # by main, already: not a part of what is timed

    found = DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=-1)
    return found.fit_predict(distance)


def published_jaccard(x: torch.Tensor) -> np.ndarray:
    return published(x, K1, K2)


def one_clustering(size: int, dim: int) -> Pair:
    """Cluster Contrast, ICE, GCL: features to labels."""

    def ours(x):
        distance = cluster_contrast.compute_jaccard_distance(x, K1, K2, False, 3, sparse=True)
        cluster = cluster_contrast.DBSCAN(eps=EPS, min_samples=4, metric="precomputed")
        return torch.from_numpy(cluster.fit_predict(distance))

    def theirs(x):
        return torch.from_numpy(sklearn_labels(published_jaccard(x), EPS))

    name = "Jaccard distance, DBSCAN"
    return Pair("cluster_contrast", name, f"N={size}", lambda: features_of(size, dim), ours, theirs)


def three_clusterings(size: int, dim: int) -> Pair:
    """SpCL: features to labels at three eps, and how reliable each image's is."""
    levels = (EPS, EPS - 0.02, EPS + 0.02)

    def ours(x):
        distance = spcl.compute_jaccard_distance(x, K1, K2, False, 3, sparse=True)
        found = []
        for eps in levels:
            cluster = spcl.DBSCAN(eps=eps, min_samples=4, metric="precomputed")
            found.append(alone(cluster.fit_predict(distance)))
        scores = [spcl.reliability(found[0], other) for other in found[1:]]
        return torch.stack(found), torch.stack(scores)

    def theirs(x):
        distance = published_jaccard(x)
        found = [alone(sklearn_labels(distance, eps)) for eps in levels]
        same = [(labels[:, None] == labels).float() for labels in found]
        scores = [
            1 - torch.min(same[0], other).sum(-1) / torch.max(same[0], other).sum(-1)
            for other in same[1:]
        ]
        return torch.stack(found), torch.stack(scores)

    name = "Jaccard distance, three DBSCANs, reliability"
    return Pair("spcl", name, f"N={size}", lambda: features_of(size, dim), ours, theirs)


def label_generator(size: int, dim: int) -> Pair:
    """OpenUnReID: features to labels at three eps, doubtful clusters taken apart, and centres."""
    levels = [EPS - 0.02, EPS, EPS + 0.02]
    settings = SimpleNamespace(k1=K1, k2=K2, eps=levels, min_samples=4, use_outliers=True)
    settings.search_type, settings.dist_metric = 3, "jaccard"
    cfg = SimpleNamespace(TRAIN=SimpleNamespace(PSEUDO_LABELS=settings))

    def ours(x):
        with contextlib.redirect_stdout(io.StringIO()):
            labels, centres, classes, _ = openunreid.label_generator_dbscan(cfg, x, False)
        return labels, centres, torch.tensor(classes)

    def centres_of(labels, x):
        members = defaultdict(list)
        for label, row in zip(labels.tolist(), x, strict=True):
            members[label].append(row)
        return torch.stack([torch.stack(members[label]).mean(0) for label in sorted(members)])

    def theirs(x):
        distance = published_jaccard(x)
        found = [alone(sklearn_labels(distance, eps)) for eps in levels]
        for labels in found:
            centres_of(labels, x)  # theirs makes those of each
        same = [(labels[:, None] == labels).float() for labels in found]
        comp, indep = (
            1 - torch.min(same[1], same[other]).sum(-1) / torch.max(same[1], same[other]).sum(-1)
            for other in (0, 2)
        )
        labels = found[1]
        scores = defaultdict(list)
        for c, i, label in zip(comp, indep, labels, strict=True):
            scores[label.item()].append((c.item(), i.item()))
        least = {label: tuple(map(min, zip(*each, strict=True))) for label, each in scores.items()}
        left = {label: len(each) for label, each in scores.items()}
        several = sorted(least[label][1] for label in left if left[label] > 1)
        threshold = several[min(len(several) - 1, int(np.round(len(several) * 0.9)))]
        classes = len(left)
        for i, label in enumerate(labels.tolist()):
            doubtful = least[label][1] > threshold or comp[i].item() > least[label][0]
            if doubtful and left[label] > 1:
                labels[i] = classes
                left[label] -= 1
                classes += 1
        return labels, centres_of(labels, x), torch.tensor(classes)

    name, make = "label generator at three eps", lambda: features_of(size, dim)
    return Pair("openunreid", name, f"N={size}", make, ours, theirs)


def alone(labels: np.ndarray) -> torch.Tensor:
    """Outliers get a label each."""
    labels = labels.copy()
    outliers = labels == -1
    labels[outliers] = labels.max() + 1 + np.arange(outliers.sum())
    return torch.from_numpy(labels)


def eps_from_rho(size: int, dim: int) -> Pair:
    """GCL, of distances that are there: the four lines of its script, by the array or by what stands in for
    it, and DBSCAN."""
    x = features_of(size, dim)
    made: dict[str, Any] = {}

    def rule(distance):
        above = np.triu(distance, 1)
        above = above[np.nonzero(above)]
        above = np.sort(above, axis=None)
        return above[: np.round(0.002 * above.size).astype(int)].mean()

    def ours(_):
        distance = made["sparse"]
        cluster = gcl.DBSCAN(eps=rule(distance), min_samples=4, metric="precomputed")
        return torch.from_numpy(cluster.fit_predict(distance))

    def theirs(_):
        return torch.from_numpy(sklearn_labels(made["dense"], rule(made["dense"])))

    def make():
        if not made:
            made["sparse"] = gcl.compute_jaccard_distance(x, K1, K2, False, 3, sparse=True)
            made["dense"] = np.asarray(made["sparse"])

    return Pair("gcl", "eps from rho, DBSCAN", f"N={size}", make, ours, theirs)


def mmt_distance(size: int, dim: int) -> Pair:
    """MMT: loops over rows of torch tensors."""

    def ours(x):
        return mmt.compute_jaccard_dist(x, 20, 6, False)

    def theirs(x):
        squared = 2 * x.square().sum(dim=1, keepdim=True) - 2 * x @ x.T
        near = (squared / squared.max(dim=0)[0]).T
        ties = torch.arange(size, dtype=torch.float64) * 1e-10
        rank = torch.argsort(near.double() + ties, dim=1)

        def reciprocal(i, k):
            forward = rank[i, :k]
            return forward[torch.nonzero(rank[forward, :k] == i)[:, 0]]

        whole = [reciprocal(i, 21) for i in range(size)]
        half = [reciprocal(i, 11) for i in range(size)]
        weights = torch.zeros(size, size)
        for i in range(size):
            members = whole[i]
            for j in whole[i]:
                if len(np.intersect1d(half[j], whole[i])) > 2 / 3 * len(half[j]):
                    members = torch.cat([members, half[j]])
            members = torch.unique(members)
            raw = torch.exp(-near[i, members])
            weights[i, members] = raw / raw.sum()
        weights = weights[rank[:, :6].reshape(-1)].view(size, 6, -1).sum(1) / 6
        holders = [torch.nonzero(weights[:, j])[:, 0] for j in range(size)]
        distance = torch.zeros(size, size)
        for i in range(size):
            shared = torch.zeros(size)
            for j in torch.nonzero(weights[i])[:, 0]:
                shared[holders[j]] += torch.min(weights[i, j], weights[holders[j], j])
            distance[i] = 1 - shared / (2 - shared)
        return distance.clamp(min=0)

    def make():
        return F.normalize(features_of(size, dim))  # theirs take rows to be unit

    return Pair("mmt", "Jaccard distance", f"N={size}", make, ours, theirs)


def re_ranking(size: int, dim: int) -> Pair:
    """The evaluators' own, of distances that have been computed: a tenth of the images are queries."""
    queries = size // 10
    x = features_of(size, dim)
    whole = (2 - 2 * x @ x.T).clamp(min=0).numpy()
    blocks = [
        np.ascontiguousarray(whole[rows, columns])
        for rows, columns in (
            (slice(queries), slice(queries, None)),
            (slice(queries), slice(queries)),
            (slice(queries, None), slice(queries, None)),
        )
    ]

    def ours(_):
        return torch.from_numpy(spcl.re_ranking(*blocks))

    def theirs(_):
        across, among, gallery = blocks
        joined = np.block([[among, across], [across.T, gallery]]).astype(np.float32) ** 2
        near = (joined / joined.max(axis=0)).T
        rank = np.argsort(near, axis=1, kind="stable")
        return torch.from_numpy(reranked(near, rank, queries))

    return Pair("spcl", "re_ranking", f"{queries} x {size - queries}", lambda: None, ours, theirs)


def reranked(near: np.ndarray, rank: np.ndarray, queries: int) -> np.ndarray:
    size = len(near)

    def reciprocal(i, k):
        forward = rank[i, :k]
        return forward[(rank[forward, :k] == i).any(axis=1)]

    weights = np.zeros_like(near)
    for i in range(size):
        members = core = reciprocal(i, 21)
        for j in core:
            half = reciprocal(j, 11)
            if len(np.intersect1d(half, core)) > 2 / 3 * len(half):
                members = np.append(members, half)
        members = np.unique(members)
        raw = np.exp(-near[i, members])
        weights[i, members] = raw / raw.sum()
    weights = np.stack([weights[rank[i, :6]].mean(axis=0) for i in range(size)])
    holders = [np.flatnonzero(weights[:, j]) for j in range(size)]
    jaccard = np.empty((queries, size), np.float32)
    for i in range(queries):
        shared = np.zeros(size, np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return (jaccard * 0.7 + near[:queries] * 0.3)[:, queries:]


# --- steps ----------------------------------------------------------------------------------------


class Loop(torch.autograd.Function):
    """Products with a bank that backward changes, one row after another, or each by its hardest."""

    @staticmethod
    def forward(ctx, inputs, rows, bank, momentum, hardest):
        ctx.bank, ctx.momentum, ctx.hardest = bank, torch.tensor(momentum), hardest
        ctx.save_for_backward(inputs, rows)
        return inputs.mm(bank.t())

    @staticmethod
    def backward(ctx, gradient):
        inputs, rows = ctx.saved_tensors
        bank, momentum = ctx.bank, ctx.momentum
        of_inputs = gradient.mm(bank)
        if ctx.hardest:
            members = defaultdict(list)
            for x, row in zip(inputs, rows.tolist(), strict=True):
                members[row].append(x)
            for row, xs in members.items():
                products = [x[None].mm(bank[row][None].t())[0][0].cpu().numpy() for x in xs]
                bank[row] = bank[row] * momentum + (1 - momentum) * xs[np.argmin(products)]
                bank[row] /= bank[row].norm()
        else:
            for x, row in zip(inputs, rows, strict=True):
                bank[row] = momentum * bank[row] + (1 - momentum) * x
                bank[row] /= bank[row].norm()
        return of_inputs, None, None, None, None


def step(loss: torch.Tensor, inputs: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, ...]:
    loss.backward()
    assert inputs.grad is not None
    return loss.detach(), inputs.grad, bank


def hybrid_memory(size: int, dim: int, batch: int = 64) -> Pair:
    bank = features_of(size, dim)
    bank = F.normalize(bank)
    labels = torch.arange(size) // 6
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(size // 4, (batch // 4,), generator=generator).repeat(4)
    inputs = F.normalize(bank[rows] + 0.02 * torch.randn(batch, dim, generator=generator))

    def make():
        memory = spcl.HybridMemory(dim, size)
        memory.features, memory.labels = bank.clone(), labels
        return memory, inputs.clone().requires_grad_()

    def ours(state):
        memory, x = state
        return step(memory(x, rows), x, memory.features)

    def theirs(state):
        memory, x = state
        products = Loop.apply(x, rows, memory.features, 0.2, False) / 0.05
        count = int(labels.max()) + 1
        sums = torch.zeros(count, batch).index_add_(0, labels, products.t().contiguous())
        sizes = torch.zeros(count, 1).index_add_(0, labels, torch.ones(size, 1))
        mask = (sizes > 0).float()
        means = (sums / (mask * sizes + (1 - mask))).t().contiguous()
        exps = torch.exp(means) * mask.t()
        chances = exps / (exps.sum(1, keepdim=True) + 1e-6)
        return step(F.nll_loss(torch.log(chances + 1e-6), labels[rows]), x, memory.features)

    return Pair("spcl", "HybridMemory, a step", f"B={batch} N={size}", make, ours, theirs)


def cluster_memory(dim: int, use_hard: bool, batch: int = 256, clusters: int = 700) -> Pair:
    bank = F.normalize(features_of(clusters, dim))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(clusters, (batch // 16,), generator=generator).repeat_interleave(16)
    inputs = bank[rows] + 0.05 * torch.randn(batch, dim, generator=generator)

    def make():
        memory = cluster_contrast.ClusterMemory(dim, clusters, 0.05, 0.1, use_hard)
        memory.features = bank.clone()
        return memory, inputs.clone().requires_grad_()

    def ours(state):
        memory, x = state
        return step(memory(x, rows), x, memory.features)

    def theirs(state):
        memory, x = state
        products = Loop.apply(F.normalize(x), rows, memory.features, 0.1, use_hard) / 0.05
        return step(F.cross_entropy(products, rows), x, memory.features)

    name = f"ClusterMemory, a step{', use_hard' if use_hard else ''}"
    return Pair("cluster_contrast", name, f"B={batch} C={clusters}", make, ours, theirs)


def view_memory(size: int, dim: int, batch: int = 16, negatives: int = 8192) -> Pair:
    """GCL's, with the same random numbers on both sides."""
    negatives = min(negatives, size - 100)
    bank = F.normalize(features_of(size, dim))
    labels = torch.arange(size) // 17
    labels[::9] = -1
    generator = torch.Generator().manual_seed(1)
    kept = torch.nonzero(labels >= 0)[:, 0]
    rows = kept[torch.randperm(len(kept), generator=generator)[:batch]]
    views = [
        F.normalize(bank[rows] + 0.05 * torch.randn(batch, dim, generator=generator))
        for _ in range(2)
    ]

    def make():
        torch.manual_seed(2)
        memory = gcl.Memory(dim, size, 0.04, 0.2, negatives)
        memory.features, memory.labels = bank.clone(), labels
        return memory, [view.clone().requires_grad_() for view in views]

    def ours(state):
        memory, (f, f_nv) = state
        return step(memory(f, f_nv, rows), f_nv, memory.features)

    def theirs(state):
        memory, (f, f_nv) = state
        k = memory.features.clone()
        itself = (f_nv * k[rows]).sum(1, keepdim=True)
        real, generated = f @ k.t(), f_nv @ k.t()
        drawn: tuple[list, list, list] = ([], [], [])
        for i in range(batch):
            for products, keep, count, into in (
                (real, labels == labels[rows[i]], 1, drawn[0]),
                (generated, labels == labels[rows[i]], 1, drawn[1]),
                (generated, labels != labels[rows[i]], negatives, drawn[2]),
            ):
                chosen = products[i, keep]
                into.append(chosen[torch.randperm(len(chosen))[:count]])
        of_real, of_generated, others = (torch.stack(part) for part in drawn)
        zero = torch.zeros(batch, dtype=torch.int64)
        loss = sum(
            F.cross_entropy(torch.cat([positive, others], dim=1) / 0.04, zero)
            for positive in (itself, of_generated, of_real)
        )
        with torch.no_grad():
            moved = F.normalize(0.2 * memory.features[rows] + 0.8 * f)
            memory.features.index_copy_(0, rows, moved)
        return step(loss, f_nv, memory.features)

    where = f"B={batch} N={size} K={negatives}"
    return Pair("gcl", "Memory, a step", where, make, ours, theirs)


def camera_loss(dim: int, batch: int = 32, proxies: int = 4000) -> Pair:
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(proxies, dim, generator=generator))
    labels = torch.arange(proxies) // 6
    inputs = torch.randn(batch, dim, generator=generator)
    targets = torch.randint(proxies // 6, (batch // 4,), generator=generator).repeat(4)
    cameras = torch.arange(batch) % 6

    def make():
        return inputs.clone().requires_grad_(), ice.CameraLoss(bank, labels)

    def ours(state):
        x, contrast = state
        loss = contrast(x, targets, cameras)
        loss.backward()
        return loss.detach(), x.grad

    def theirs(state):
        x, _ = state
        loss = torch.tensor([0.0])
        for camera in torch.unique(cameras):
            members = torch.nonzero(cameras == camera).squeeze(-1)
            products = F.normalize(x[members]) @ F.normalize(bank.t().clone())
            masked = products.detach().clone()
            products = products / 0.07
            part = torch.tensor(0.0)
            for k, target in enumerate(targets[members]):
                positive = torch.nonzero(labels == target).squeeze(-1)
                masked[k, positive] = -10000.0
                hardest = torch.sort(masked[k])[1][-50:]
                logits = torch.cat([products[k, positive], products[k, hardest]])
                part = part - F.log_softmax(logits, dim=0)[: len(positive)].mean()
            loss = loss + 0.5 * part / len(members)
        loss.backward()
        return loss.detach()[0], x.grad

    return Pair("ice", "camera loss", f"B={batch} M={proxies}", make, ours, theirs)


if __name__ == "__main__":
    main()
