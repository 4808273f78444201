"""sample_rows at the sizes of real trainers: once an iteration."""

import itertools

import torch

from pyreid import ops

from .timing import Case, Growth, pytest_benchmark, sizes


def cases(device, quick=False):
    yield case(device, 12936, 700, 16, 8192, "GCL: Market-1501")
    yield case(device, 12936, 700, 64, 8192, "64 images")
    for size in sizes(quick):
        line = Growth("B=16 K=2048", size, time=1, memory=1)
        yield case(device, size, size // 17, 16, 2048, "17 rows a group", growth=line)
    if not quick:
        yield case(device, 32621, 1041, 16, 8192, "MSMT17")
        yield case(device, 12936, 700, 64, 256, "few negatives")
        yield case(device, 1_000_000, 20_000, 16, 8192, "a large bank")


def case(device, size, groups, batch, negatives, what, *, positives=2, growth=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, groups, (size,), generator=generator)
    rows = (labels >= 0).nonzero()[:, 0]
    targets = labels[rows[torch.randint(0, len(rows), (batch,), generator=generator)]]
    labels, targets = labels.to(device), targets.to(device)
    seeds = itertools.count()

    def ours(_):
        return ops.sample_rows(
            labels, targets, positives=positives, negatives=negatives, seed=next(seeds)
        )

    def gcl(_):
        """As GCL's memory does, sample by sample."""
        drawn = [], []
        for target in targets:
            own = (labels == target).nonzero()[:, 0]
            others = (labels != target).nonzero()[:, 0]
            drawn[0].append(own[torch.randint(len(own), (positives,), device=device)])
            drawn[1].append(others[torch.randperm(len(others), device=device)[:negatives]])
        return [torch.stack(rows) for rows in drawn]

    def vectorised(_):
        """The best that torch offers: random numbers for all rows, the largest of those that may be drawn."""
        mine = labels == targets[:, None]
        numbers = torch.rand(mine.shape, device=device)
        own = torch.multinomial(mine.float(), positives, replacement=True)
        return [own, numbers.masked_fill_(mine, -1).topk(negatives, sorted=False).indices]

    def properties(drawn):
        """What two draws must agree on: whose rows they are, and that no negative repeats."""
        own, others = (labels[rows] == targets[:, None] for rows in drawn)
        distinct = [len(row.unique()) for row in drawn[1]]
        return [own, others, torch.tensor(distinct)]

    return Case(
        op="sample_rows",
        size=f"B={batch} N={size} P={positives} K={negatives} ({what})",
        device=device,
        make=lambda: None,
        ours=ours,
        baselines={"rand + topk": vectorised, "randperm a sample": gcl},
        bytes=8 * (size + batch * (1 + positives + negatives)),
        compared=properties,
        needs={"rand + topk": 9 * batch * size},
        growth=growth,
        headline=growth is None,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
