"""memory_update_ at the sizes of real trainers."""

import torch

from pyreid import ops

from .timing import Case, Growth, pytest_benchmark, sizes

MOMENTUM = 0.2


def cases(device, quick=False):
    yield case(device, 12936, 2048, 64, 64, "SpCL: 64 images")
    yield case(device, 12936, 2048, 256, 256, "256 images")
    yield case(device, 700, 2048, 256, 16, "Cluster Contrast: 16 ids x 16")
    yield case(device, 700, 2048, 256, 16, "the same, hardest", repeats="hardest")
    for size in sizes(quick):
        line = Growth("E=256 D=128", size, time=0, memory=0)
        yield case(device, size, 128, 256, 256, "into N rows", loops=False, growth=line)
    if not quick:
        for batch in (32, 1024, 4096):
            yield case(device, 12936, 2048, batch, batch, f"{batch} images", loops=False)
        for dim in (128, 512):
            yield case(device, 12936, dim, 256, 256, f"{dim} columns", headline=False)
        for dtype in (torch.float16, torch.bfloat16):
            what = "bank of " + str(dtype)[6:]
            yield case(device, 12936, 2048, 256, 256, what, loops=False, dtype=dtype)
        yield case(device, 12936, 2048, 256, 1, "a batch of one id")
        large = 100_000 if device == "cpu" else 1_000_000
        yield case(device, large, 512, large, large, f"whole bank of {large:,} rows", loops=False)


def case(
    device,
    size,
    dim,
    events,
    distinct,
    what,
    *,
    repeats="sequential",
    loops=True,
    dtype=torch.float32,
    growth=None,
    headline=True,
):
    def make():
        generator = torch.Generator().manual_seed(0)
        bank = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
        features = torch.nn.functional.normalize(torch.randn(events, dim, generator=generator))
        rows = torch.randperm(size, generator=generator)[:distinct]
        rows = rows.repeat_interleave(events // distinct)
        return [x.to(device) for x in (bank.to(dtype), features, rows)]

    def ours(state):
        return ops.memory_update_(*state, momentum=MOMENTUM, repeats=repeats)

    width = torch.empty((), dtype=dtype).element_size()
    if repeats == "hardest":
        baselines = {"vectorised torch": vectorised_hardest, "Python loop": hardest_loop}
    else:
        baselines = {"vectorised torch": vectorised} | ({"Python loop": loop} if loops else {})
    return Case(
        op="memory_update_",
        size=f"E={events} D={dim} N={size} ({what})",
        device=device,
        make=make,
        ours=ours,
        baselines=baselines,
        bytes=dim * (2 * width * distinct + 4 * events) + 8 * events,
        # Of a rounded bank, the last bit.
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        growth=growth,
        headline=headline and growth is None,
    )


def loop(state):
    """As SpCL and Cluster Contrast do, inside their backward."""
    bank, features, rows = state
    for feature, row in zip(features, rows, strict=True):
        bank[row] = MOMENTUM * bank[row] + (1 - MOMENTUM) * feature
        bank[row] /= bank[row].norm()
    return bank


def hardest_loop(state):
    """As Cluster Contrast does with use_hard."""
    bank, features, rows = state
    members = {}
    for feature, row in zip(features, rows.tolist(), strict=True):
        members.setdefault(row, []).append(feature)
    for row, candidates in members.items():
        similarities = [(feature @ bank[row]).item() for feature in candidates]
        hardest = candidates[similarities.index(min(similarities))]
        bank[row] = MOMENTUM * bank[row] + (1 - MOMENTUM) * hardest
        bank[row] /= bank[row].norm()
    return bank


def vectorised(state):
    """The best that torch offers: the n-th events of all rows together, for n = 0, 1, ..."""
    bank, features, rows = state
    ordered, order = torch.sort(rows, stable=True)
    _, counts = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.cumsum(counts, 0) - counts
    turn = torch.arange(len(rows), device=rows.device) - starts.repeat_interleave(counts)
    for n in range(int(counts.max())):
        events = order[turn == n]
        moved = MOMENTUM * bank[rows[events]].float() + (1 - MOMENTUM) * features[events]
        bank[rows[events]] = torch.nn.functional.normalize(moved).to(bank.dtype)
    return bank


def vectorised_hardest(state):
    """The same by sorting: of each row's events, that of the least similarity comes first."""
    bank, features, rows = state
    order = (features * bank[rows]).sum(dim=1).argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    targets = rows[order]
    first = torch.ones_like(targets, dtype=torch.bool)
    first[1:] = targets[1:] != targets[:-1]
    targets, hardest = targets[first], features[order[first]]
    moved = MOMENTUM * bank[targets] + (1 - MOMENTUM) * hardest
    bank[targets] = torch.nn.functional.normalize(moved)
    return bank


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
