"""`benchmarks.compat` for projects that have labels: tests, mining, neighbours, memories.

`python -m pyreid.benchmarks.compat_supervised` in a checkout, `python -m pyreid.benchmarks.compat_supervised`
elsewhere, with the same options.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pyreid.compat import (
    fast_reid,
    lightly,
    open_metric_learning,
    person_reid_baseline,
    pytorch_metric_learning,
    strong_baseline,
    torchreid,
)

from .bench_jaccard import features_of, published
from .bench_negative_mining import unit
from .compat import Pair, main, reranked


def pairs(sizes: list[int], dim: int) -> Iterator[Pair]:
    yield single_shot(400, 960)
    for size in sizes:
        yield evaluation(min(size // 6, 500), size)
        yield neighbours(size, dim // 4)
        yield retrieval(size // 10, size, dim // 4)
        if size <= 4000:
            yield torchreid_re_ranking(size, dim)
            yield fast_reid_re_ranking(size, dim)
            yield strong_baseline_re_ranking(size, dim)
            yield graph_re_ranking(size, dim)
    memory = 65536 if max(sizes) >= 3000 else 1024
    yield triplets(64, dim)
    yield mining(256)
    yield queue(64, dim // 4, memory)
    yield memory_read(256, 128, memory)
    yield nearest_of_memory(256, 128, memory)


# --- tests ----------------------------------------------------------------------------------------


def problem(queries: int, size: int, people: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, people, n) for n in (queries, size)]
    cameras = [rng.integers(0, 6, n) for n in (queries, size)]
    distance = rng.random((queries, size), np.float32)
    distance -= 0.3 * (ids[0][:, None] == ids[1])
    return distance, [*ids, *cameras]


def matched(distance, q_pids, g_pids, q_camids, g_camids) -> Iterator[tuple]:
    order = np.argsort(distance, axis=1, kind="stable")
    matches = (g_pids[order] == q_pids[:, None]).astype(np.int32)
    for i in range(len(distance)):
        keep = (g_pids[order[i]] != q_pids[i]) | (g_camids[order[i]] != q_camids[i])
        if matches[i][keep].any():
            yield matches[i][keep], g_pids[order[i]][keep]


def precision(hits: np.ndarray) -> float:
    found = hits.cumsum()
    upto = np.asarray([x / (i + 1.0) for i, x in enumerate(found)]) * hits
    return upto.sum() / hits.sum()


def evaluation(queries: int, size: int) -> Pair:
    distance, ids = problem(queries, size, 751)

    def ours(_):
        cmc, mean_ap = torchreid.evaluate_rank(distance, *ids)
        return torch.from_numpy(cmc), torch.tensor(mean_ap)

    def theirs(_):
        curves, aps = [], []
        for hits, _ in matched(distance, *ids):
            curves.append(np.minimum(hits.cumsum(), 1)[:50])
            aps.append(precision(hits))
        return torch.from_numpy(np.mean(curves, axis=0).astype(np.float32)), torch.tensor(
            float(np.mean(aps))
        )

    return Pair(
        *("torchreid", "evaluate_rank, in Python", f"{queries} x {size}"),
        *(lambda: None, ours, theirs),
    )


def single_shot(queries: int, size: int) -> Pair:
    distance, ids = problem(queries, size, 100)

    def ours(_):
        np.random.seed(0)
        cmc, mean_ap = torchreid.evaluate_rank(distance, *ids, use_metric_cuhk03=True)
        return torch.from_numpy(cmc), torch.tensor(mean_ap)

    def theirs(_):
        np.random.seed(0)
        curves, aps = [], []
        for hits, persons in matched(distance, *ids):
            images = defaultdict(list)
            for place, person in enumerate(persons):
                images[person].append(place)
            curve = 0.0
            for _ in range(10):
                kept = np.zeros(len(hits), bool)
                for places in images.values():
                    kept[np.random.choice(places)] = True
                curve = curve + np.minimum(hits[kept].cumsum(), 1)[:50].astype(np.float32)
            curves.append(curve / 10)
            aps.append(precision(hits))
        return torch.from_numpy(np.mean(curves, axis=0).astype(np.float32)), torch.tensor(
            float(np.mean(aps))
        )

    return Pair(
        *("torchreid", "evaluate_rank, cuhk03", f"{queries} x {size}"),
        *(lambda: None, ours, theirs),
    )


def split(x: torch.Tensor, queries: int) -> list[torch.Tensor]:
    """Squared distances of queries to the gallery, among queries, among the gallery."""
    whole = (2 - 2 * x @ x.T).clamp(min=0)
    return [
        whole[:queries, queries:].contiguous(),
        whole[:queries, :queries].contiguous(),
        whole[queries:, queries:].contiguous(),
    ]


def torchreid_re_ranking(size: int, dim: int) -> Pair:
    queries = size // 10
    across, among, gallery = split(features_of(size, dim), queries)

    def ours(_):
        return torch.from_numpy(torchreid.re_ranking(across.numpy(), among, gallery))

    def theirs(_):
        joined = torch.cat([torch.cat([among, across], 1), torch.cat([across.T, gallery], 1)])
        joined = joined.numpy() ** 2
        near = (joined / joined.max(axis=0)).T
        rank = np.argsort(near, axis=1, kind="stable")
        return torch.from_numpy(reranked(near, rank, queries))

    where = f"{queries} x {size - queries}"
    return Pair("torchreid", "re_ranking", where, lambda: None, ours, theirs)


def fast_reid_re_ranking(size: int, dim: int) -> Pair:
    """What its evaluator calls when re-ranking is on."""
    queries = size // 10

    def ours(x):
        return torch.from_numpy(
            fast_reid.build_dist(x[:queries], x[queries:], "jaccard", k1=20, k2=6)
        )

    def theirs(x):
        distance = published(x, 20, 6)
        return torch.from_numpy(distance[:queries, queries:])

    def make():
        return F.normalize(features_of(size, dim))

    where = f"{queries} x {size - queries}"
    return Pair("fast_reid", 'build_dist, "jaccard"', where, make, ours, theirs)


def strong_baseline_re_ranking(size: int, dim: int) -> Pair:
    queries = size // 10

    def ours(x):
        return torch.from_numpy(strong_baseline.re_ranking(x[:queries], x[queries:], 20, 6, 0.3))

    def theirs(x):
        squares = x.square().sum(dim=1)
        squared = squares[:, None] + squares - 2 * x @ x.T
        near = (squared / squared.max(dim=0)[0]).T.numpy()
        rank = np.argsort(near, axis=1, kind="stable")
        return torch.from_numpy(reranked(near, rank, queries))  # float32, which is quicker

    name = "re_ranking (theirs in float32)"
    where = f"{queries} x {size - queries}"
    return Pair(
        *("strong_baseline", name, where),
        *(lambda: features_of(size, dim), ours, theirs),
        tolerance=4e-3,
    )


def graph_re_ranking(size: int, dim: int, k1: int = 26, k2: int = 7) -> Pair:
    """Against the same by dense arrays in torch, as its extension does it. What is compared is the person of
    the first: similarities of graphs tie, and theirs are sorted in no order then."""
    queries = size // 10
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    people = order // 17

    def first(ranks):
        return people[queries:][ranks[:, 0]]

    def ours(x):
        ranks = person_reid_baseline.gnn_reranking(x[:queries], x[queries:], k1, k2)
        return first(torch.from_numpy(ranks))

    def theirs(x):
        weights, rank = (x @ x.T).topk(k1)
        graph = torch.zeros(size, size).scatter_(1, rank, 1.0)
        for _ in range(2):
            graph = graph + graph.T
            summed = torch.zeros_like(graph)
            for j in range(k2):
                summed += graph[rank[:, j]] * weights[:, j, None].square()
            graph = summed / summed.norm(dim=1, keepdim=True)
        return first(torch.sort(-(graph[:queries] @ graph[queries:].T), dim=1)[1])

    def make():
        return F.normalize(features_of(size, dim))[order]

    where = f"{queries} x {size - queries}"
    return Pair("person_reid_baseline", "gnn_reranking", where, make, ours, theirs)


# --- neighbours -----------------------------------------------------------------------------------


def neighbours(size: int, dim: int, k: int = 30) -> Pair:
    """A data set among itself, as `AccuracyCalculator` does it; theirs by cdist and topk."""

    def ours(x):
        return pytorch_metric_learning.FaissKNN()(x, k, x, True)[0]

    def theirs(x):
        distance = torch.cdist(x, x).square()
        return distance.fill_diagonal_(torch.inf).topk(k, largest=False)[0]

    return Pair(
        *("pytorch_metric_learning", f"knn_func, k={k}", f"N={size} D={dim}"),
        *(lambda: features_of(size, dim), ours, theirs),
        tolerance=1e-3,
    )


def retrieval(queries: int, size: int, dim: int, top_n: int = 100) -> Pair:
    x = F.normalize(features_of(size, dim))
    rows = torch.arange(size)
    chosen = torch.arange(0, size, size // queries)
    labels = rows // 17

    def ours(_):
        distances, _, truth = open_metric_learning.batched_knn(
            x, chosen, rows, top_n, labels_gt=labels
        )
        return torch.stack(distances), torch.cat(truth)

    def theirs(_):
        distance = torch.cdist(x[chosen], x)
        same = chosen[:, None] == rows
        relevant = (labels[chosen][:, None] == labels) & ~same
        truth = [row.nonzero().view(-1) for row in relevant]
        distance[same] = torch.inf
        found = torch.topk(distance, top_n, largest=False)[0]
        return torch.stack([row[~row.isinf()] for row in found]), torch.cat(truth)

    return Pair(
        *("open_metric_learning", f"batched_knn, top {top_n}", f"{len(chosen)} x {size} D={dim}"),
        *(lambda: None, ours, theirs),
        tolerance=1e-3,
    )


# --- steps ----------------------------------------------------------------------------------------


def triplets(batch: int, dim: int) -> Pair:
    inputs = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(batch) // 4

    def ours(x):
        loss = torchreid.TripletLoss()(x, targets)
        loss.backward()
        return loss.detach(), x.grad

    def theirs(x):
        squares = x.pow(2).sum(dim=1, keepdim=True).expand(batch, batch)
        squared = (squares + squares.t()).addmm_(x, x.t(), beta=1, alpha=-2)
        distance = squared.clamp(min=1e-12).sqrt()
        same = targets[:, None] == targets
        farthest = [distance[i][same[i]].max()[None] for i in range(batch)]
        nearest = [distance[i][same[i] == 0].min()[None] for i in range(batch)]
        near = torch.cat(nearest)
        loss = F.margin_ranking_loss(near, torch.cat(farthest), torch.ones_like(near), margin=0.3)
        loss.backward()
        return loss.detach(), x.grad

    def make():
        return inputs.clone().requires_grad_()

    return Pair("torchreid", "TripletLoss, a step", f"B={batch} D={dim}", make, ours, theirs)


def mining(batch: int) -> Pair:
    distance = torch.rand(batch, batch, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch) // 4
    same = labels[:, None] == labels

    def ours(_):
        return fast_reid.hard_example_mining(distance, same, ~same)

    def theirs(_):
        other = ~same
        farthest = torch.max(distance[same].contiguous().view(batch, -1), 1)[0]
        return farthest, torch.min(distance[other].contiguous().view(batch, -1), 1)[0]

    return Pair("fast_reid", "hard_example_mining", f"B={batch}", lambda: None, ours, theirs)


def queue(batch: int, dim: int, size: int) -> Pair:
    inputs = unit(torch.Generator().manual_seed(1), batch, dim)
    targets = torch.arange(batch) // 4
    columns = unit(torch.Generator().manual_seed(0), size, dim).T.contiguous()
    labels = torch.arange(size)[None] % 700

    def make():
        memory = fast_reid.Memory(1, size)
        memory.queue, memory.queue_label = columns.clone(), labels.clone()
        return memory, inputs.clone().requires_grad_()

    def ours(state):
        memory, x = state
        loss = memory(x, targets)
        loss.backward()
        return loss.detach(), x.grad

    def theirs(state):
        memory, x = state
        features = F.normalize(x)
        memory.queue[:, :batch] = features.detach().T
        memory.queue_label[:, :batch] = targets
        products = features @ memory.queue
        shape = (batch, size)
        target = targets.view(batch, 1).expand(shape)
        positive = target.eq(memory.queue_label.expand(shape)).float()
        negative = target.ne(memory.queue_label.expand(shape)).float()
        own = torch.cat([torch.eye(batch), torch.zeros(batch, size - batch)], dim=1)
        positive = positive - own
        far = -32 * (products * positive) + -99999999.0 * (1 - positive)
        near = 32 * (products * negative + 0.25) + -99999999.0 * (1 - negative)
        loss = F.softplus(torch.logsumexp(far, dim=1) + torch.logsumexp(near, dim=1)).mean()
        loss.backward()
        return loss.detach(), x.grad

    where = f"B={batch} D={dim} K={size}"
    return Pair("fast_reid", "MoCo's Memory, a step", where, make, ours, theirs)


def filled(made: Any, size: int, dim: int) -> Any:
    made.bank.copy_(unit(torch.Generator().manual_seed(0), size, dim))
    return made


def memory_read(batch: int, dim: int, size: int) -> Pair:
    """A look without an update; one with costs both sides a copy."""
    x = unit(torch.Generator().manual_seed(1), batch, dim)
    bank = filled(lightly.MemoryBankModule((size, dim)), size, dim)

    def theirs(_):
        return bank.bank.clone().detach().transpose(0, -1)

    return Pair(
        *("lightly", "MemoryBankModule, a look", f"{size} x {dim}"),
        *(lambda: None, lambda _: bank(x)[1], theirs),
    )


def nearest_of_memory(batch: int, dim: int, size: int) -> Pair:
    x = unit(torch.Generator().manual_seed(1), batch, dim)

    def make():
        return filled(lightly.NNMemoryBankModule((size, dim)), size, dim)

    def theirs(module):
        bank = module.bank.clone().detach().transpose(0, -1).t()
        products = torch.einsum("nd,md->nm", F.normalize(x, dim=1), F.normalize(bank, dim=1))
        found = torch.index_select(bank, 0, torch.argmax(products, dim=1))
        module.bank[:batch] = x
        return found

    return Pair(
        *("lightly", "NNMemoryBankModule, an update", f"B={batch}, {size} x {dim}"),
        *(make, lambda module: module(x, update=True), theirs),
    )


if __name__ == "__main__":
    main(made=pairs)
