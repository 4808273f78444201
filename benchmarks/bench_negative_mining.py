"""mine_negatives at the sizes of ICE, SCL and a plain bank."""

import torch

from pyreid import ops

from . import peers
from .timing import Case, Growth, pytest_benchmark, sizes


def cases(device, quick=False):
    yield plain(device, 256, 12936, 2048, 50)
    yield ice(device, 32, 4000)
    yield scl(device, 64, 12936)
    for size in sizes(quick):
        line = Growth("B=256 D=128 k=50", size, time=1, memory=0)
        yield plain(device, 256, size, 128, 50, growth=line)
    if not quick:
        yield plain(device, 256, 16522, 2048, 50)
        yield plain(device, 256, 32621, 2048, 50)
        for batch in (32, 1024, 4096):
            yield plain(device, batch, 12936, 2048, 50, headline=False)
        for dim in (128, 512):
            yield plain(device, 256, 12936, dim, 50, headline=False)
        for dtype in (torch.float16, torch.bfloat16):
            yield plain(device, 256, 12936, 2048, 50, dtype=dtype)
        yield plain(device, 1024, 100_000, 256, 50)
        yield plain(device, 64, 32621, 2048, 4096)
        if device == "cuda":
            yield plain(device, 256, 100_000, 2048, 50)


def unit(generator, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def plain(device, batch, size, dim, k, *, dtype=torch.float32, growth=None, headline=True):
    def make():
        generator = torch.Generator().manual_seed(0)
        queries, bank = unit(generator, batch, dim), unit(generator, size, dim)
        return queries.to(device), bank.to(device, dtype)

    def ours(state):
        return ops.mine_negatives(*state, k).scores

    def product_and_topk(state):
        return (state[0] @ state[1].float().T).topk(k).values

    def product(state):
        return state[0] @ state[1].float().T

    libraries = {
        f"{name} search": lambda state, search=search: search(state[0], state[1].float())[0]
        for name, search in peers.searches(device, k).items()
    }
    width = torch.empty((), dtype=dtype).element_size()
    named = "" if dtype == torch.float32 else f" (bank of {str(dtype)[6:]})"
    return Case(
        op="mine_negatives",
        size=f"B={batch} N={size} D={dim} k={k}{named}",
        device=device,
        make=make,
        ours=ours,
        baselines=peers.compiled(
            device, {"product + topk": product_and_topk}, wanted=headline and growth is None
        )
        | libraries,
        bounds={"product alone": product},
        bytes=width * size * dim + 4 * (batch * dim + 3 * batch * k),
        flops=2 * batch * size * dim,
        needs={"product + topk": 4 * batch * size},
        growth=growth,
        headline=headline and growth is None,
    )


def ice(device, batch, proxies, k=50, dim=2048):
    """The 50 hardest proxies of other labels (ICE, CAP)."""

    def make():
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(proxies) // 6
        features = unit(generator, batch, dim)
        targets = torch.randint(0, proxies // 6, (batch,), generator=generator)
        return [x.to(device) for x in (features, unit(generator, proxies, dim), targets, labels)]

    def ours(state):
        features, bank, targets, labels = state
        mined = ops.mine_negatives(features, bank, k, query_groups=targets, bank_groups=labels)
        return mined.scores

    def loop(state):
        features, bank, targets, labels = state
        similarities = features @ bank.T
        hardest = []
        for similarity, target in zip(similarities, targets, strict=True):
            masked = similarity.clone()
            masked[torch.nonzero(labels == target).squeeze(1)] = -10000.0
            hardest.append(similarity[torch.sort(masked).indices[-k:]].flip(0))
        return torch.stack(hardest)

    return Case(
        op="mine_negatives",
        size=f"B={batch} N={proxies} D={dim} k={k} (ICE's proxies)",
        device=device,
        make=make,
        ours=ours,
        baselines={"sort per sample": loop},
        bytes=4 * dim * (proxies + batch) + 8 * proxies,
        flops=2 * batch * proxies * dim,
    )


def scl(device, batch, size, k=507, penalty=0.05):
    """Positives and negatives by SCL's blended distance: one global part and eight stripes."""

    def make():
        generator = torch.Generator().manual_seed(0)
        bank, stripes = unit(generator, size, 2048), unit(generator, 8, size, 256)
        own = torch.randperm(size, generator=generator)[:batch]
        cameras = torch.randint(0, 6, (size,), generator=generator)
        parts = torch.cat([bank * 0.5**0.5, *(stripes * (0.5 / 8) ** 0.5)], dim=1)
        return [x.to(device) for x in (bank, stripes, parts, own, cameras)]

    def ours(state):
        _, _, parts, own, cameras = state
        return ops.mine_negatives(
            parts[own],
            parts,
            k,
            self_rows=own,
            query_cameras=cameras[own],
            bank_cameras=cameras,
            camera_penalty=penalty / 2,
        ).scores

    def distance_and_argsort(state):
        bank, stripes, _, own, cameras = state
        distance = 0.5 * torch.cdist(bank[own], bank) ** 2
        for stripe in stripes:
            distance += 0.5 / 8 * torch.cdist(stripe[own], stripe) ** 2
        distance += penalty * (cameras[own][:, None] == cameras)
        order = torch.argsort(distance, dim=1)
        others = order[order != own[:, None]].view(len(own), -1)[:, :k]
        return 1 - distance.gather(1, others) / 2

    return Case(
        op="mine_negatives",
        size=f"B={batch} N={size} D=4096 k={k} (SCL's selection)",
        device=device,
        make=make,
        ours=ours,
        baselines={"distance + argsort": distance_and_argsort},
        bytes=4 * 4096 * (size + batch),
        flops=2 * batch * size * 4096,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
