"""evaluate_ranking at the size of Market-1501 and beyond, from features and from distances."""

import numpy as np
import torch

from pyreid import ops

from .timing import Case, Growth, pytest_benchmark, sizes


def cases(device, quick=False):
    yield features(device, 500 if quick else 3368, 15913, 2048, "Market-1501")
    yield distances(device, 500 if quick else 3368, 15913, "Market-1501")
    for size in sizes(quick):
        line = Growth("Q=100 D=128", size, time=1, memory=1)
        yield features(device, 100, size, 128, "a gallery of N", growth=line)
    if not quick:
        yield features(device, 2228, 17661, 2048, "DukeMTMC-reID")
        yield features(device, 200, 200_000, 128, "200,000 in the gallery")
        if device == "cuda":
            yield features(device, 11659, 82161, 2048, "MSMT17")


def problem(device, queries, size, dim):
    """Features in clusters by person, and ids of persons and cameras as (queries, gallery) pairs."""
    generator = torch.Generator().manual_seed(0)
    persons = size // 21
    ids = [torch.randint(0, persons, (n,), generator=generator) for n in (queries, size)]
    cameras = [torch.randint(0, 6, (n,), generator=generator) for n in (queries, size)]
    centres = torch.randn(persons, dim, generator=generator)
    rows = [
        torch.nn.functional.normalize(
            centres[i] + 4 * torch.randn(len(i), dim, generator=generator)
        )
        for i in ids
    ]
    ids[1][torch.rand(size, generator=generator) < 0.15] = -1
    return [[x.to(device) for x in pair] for pair in (rows, ids, cameras)]


def features(device, queries, size, dim, name, *, growth=None):
    def make():
        return problem(device, queries, size, dim)

    def ours(state):
        rows, ids, cameras = state
        return evaluate(*rows, ids, cameras)

    def product(state):
        return state[0][0] @ state[0][1].T

    return Case(
        op="evaluate_ranking",
        size=f"Q={queries} G={size} D={dim} ({name})",
        device=device,
        make=make,
        ours=ours,
        baselines={
            "argsort + loop": lambda state: loop(-product(state), *state[1:]),
            "argsort, batched": lambda state: batched(-product(state), *state[1:]),
        },
        bounds={"product alone": product},
        bytes=4 * (size + queries) * dim,
        flops=2 * queries * size * dim,
        needs={"argsort + loop": 13 * queries * size, "argsort, batched": 4 * queries * size},
        growth=growth,
        headline=growth is None,
    )


def distances(device, queries, size, name):
    """What is left of it where the distances are there already."""

    def make():
        rows, ids, cameras = problem(device, queries, size, 64)
        return 1 - rows[0] @ rows[1].T, ids, cameras

    def ours(state):
        distance, ids, cameras = state
        return evaluate(None, None, ids, cameras, distance=distance)

    return Case(
        op="evaluate_ranking",
        size=f"Q={queries} G={size}, distances ({name})",
        device=device,
        make=make,
        ours=ours,
        baselines={
            "argsort + loop": lambda state: loop(*state),
            "argsort, batched": lambda state: batched(*state),
        },
        bytes=4 * queries * size,
    )


def evaluate(queries, gallery, ids, cameras, **options):
    found = ops.evaluate_ranking(
        queries,
        gallery,
        query_ids=ids[0],
        gallery_ids=ids[1],
        query_cameras=cameras[0],
        gallery_cameras=cameras[1],
        **options,
    )
    return found.cmc.cpu(), torch.tensor([found.mAP, found.mINP])


def loop(distance, ids, cameras, max_rank=50):
    """The evaluation that re-identification repositories share: one NumPy ranking per query."""
    distance = distance.cpu().numpy()
    (query_ids, gallery_ids), (query_cameras, gallery_cameras) = (
        [x.cpu().numpy() for x in pair] for pair in (ids, cameras)
    )
    order = np.argsort(distance, axis=1)
    matches = gallery_ids[order] == query_ids[:, None]
    all_cmc, all_ap, all_inp = [], [], []
    for i, ranking in enumerate(order):
        removed = (gallery_ids[ranking] == query_ids[i]) & (
            gallery_cameras[ranking] == query_cameras[i]
        )
        hits = matches[i][~removed & (gallery_ids[ranking] != -1)].astype(np.int32)
        if not hits.any():
            continue
        cmc = hits.cumsum()
        last = np.flatnonzero(hits)[-1]
        all_inp.append(cmc[last] / (last + 1))
        all_ap.append((cmc / (np.arange(len(hits)) + 1) * hits).sum() / hits.sum())
        all_cmc.append(np.minimum(cmc, 1)[:max_rank])
    means = torch.tensor([np.mean(all_ap), np.mean(all_inp)], dtype=torch.float32)
    return torch.tensor(np.mean(all_cmc, 0), dtype=torch.float32), means


def batched(distance, ids, cameras, max_rank=50):
    """The same in torch, some hundred queries at a time."""
    totals = torch.zeros(3 + max_rank, dtype=torch.float64, device=distance.device)
    parts = [x.split(256) for x in (distance, ids[0], cameras[0])]
    for rows, query_ids, query_cameras in zip(*parts, strict=True):
        order = rows.argsort(dim=1)
        same = ids[1][order] == query_ids[:, None]
        kept = ~(same & (cameras[1][order] == query_cameras[:, None])) & (ids[1][order] >= 0)
        hits = same & kept
        position, rank = kept.cumsum(1), hits.cumsum(1)
        count = hits.sum(1)
        valid = count > 0
        ap = (hits * rank / position.clamp(min=1)).sum(1) / count.clamp(min=1)
        inp = count / (hits * position).amax(1).clamp(min=1)
        first = torch.where(hits, position, rows.shape[1] + 1).amin(1)
        at = torch.arange(1, max_rank + 1, device=rows.device)
        cmc = (first[valid, None] <= at).sum(0)
        totals += torch.cat([torch.stack([valid.sum(), ap.sum(), inp.sum()]), cmc])
    means = (totals[1:] / totals[0]).float().cpu()
    return means[2:], means[:2]


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
