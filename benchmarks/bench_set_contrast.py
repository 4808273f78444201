"""set_contrast at the sizes of real trainers: loss and gradient."""

import torch

from pyreid import ops

from . import peers
from .timing import Case, Growth, pytest_benchmark, sizes


def cases(device, quick=False):
    yield case(device, 64, 12936, 2048, 8, 500, "SCL, two branches", sets=2)
    yield case(device, 32, 4000, 2048, 6, 50, "ICE, camera proxies", loops=True)
    yield case(device, 16, 12936, 512, 2, 8192, "GCL", denominator="own")
    for size in sizes(quick):
        line = Growth("B=64 J=8 K=500 D=128", size, time=0, memory=0)
        yield case(device, 64, size, 128, 8, 500, "from N rows", growth=line)
    if not quick:
        for batch in (32, 256, 1024):
            yield case(device, batch, 12936, 2048, 8, 50, f"batch of {batch}")
        for dim in (128, 512):
            yield case(device, 64, 12936, dim, 8, 500, f"{dim} columns", headline=False)
        yield case(device, 64, 12936, 2048, 8, 500, "float16 bank", dtype=torch.float16)
        yield case(device, 64, 12936, 2048, 8, 500, "SCL, one branch")
        yield case(device, 256, 4000, 2048, 6, 50, "ICE, batch of 256", loops=True)
        yield case(device, 64, 12936, 2048, 8, 500, "bfloat16 bank", dtype=torch.bfloat16)


def case(
    device,
    batch,
    size,
    dim,
    positives,
    negatives,
    what,
    *,
    sets=1,
    denominator="joint",
    dtype=torch.float32,
    loops=False,
    scale=10.0,
    growth=None,
    headline=True,
):
    def make():
        generator = torch.Generator().manual_seed(0)
        bank = torch.nn.functional.normalize(torch.randn(size, dim, generator=generator))
        queries = torch.nn.functional.normalize(
            torch.randn(sets, batch, dim, generator=generator), dim=-1
        )
        count = positives + negatives
        rows = torch.stack(
            [torch.randperm(size, generator=generator)[:count] for _ in range(batch)]
        )
        lists = rows[:, :positives].contiguous(), rows[:, positives:].contiguous()
        queries, bank, *lists = (x.to(device) for x in (queries, bank.to(dtype), *lists))
        return queries.requires_grad_(), bank, *lists

    def step(loss_of):
        def run(state):
            loss = loss_of(*state)
            return loss.detach(), *torch.autograd.grad(loss.mean(), state[0])

        return run

    def ours(queries, bank, positives, negatives):
        return ops.set_contrast(
            queries, bank, positives, negatives, scale=scale, denominator=denominator
        )

    def gather(queries, bank, positives, negatives):
        """The best that torch offers: all rows gathered, one batched product."""
        rows = torch.cat([positives, negatives], 1)
        scores = scale * torch.einsum("qbd,bkd->qbk", queries, bank[rows].float())
        pos, neg = scores.split([positives.shape[1], negatives.shape[1]], -1)
        if denominator == "joint":
            lse = scores.logsumexp(-1, keepdim=True)
        else:
            lse = torch.logaddexp(neg.logsumexp(-1, keepdim=True), pos)
        return (lse - pos).mean(-1)

    def loop(queries, bank, positives, negatives):
        """As ICE does: all similarities, then a softmax for each sample, against soft targets."""
        losses = []
        similarities = scale * (queries[0] @ bank.T)
        for row, chosen, others in zip(similarities, positives, negatives, strict=True):
            scores = row[torch.cat([chosen, others])]
            target = torch.zeros_like(scores)
            target[: len(chosen)] = 1 / len(chosen)
            losses.append(-(torch.log_softmax(scores, 0) * target).sum())
        return torch.stack(losses)[None]

    gathering = peers.compiled(
        device, {"gather, torch": gather}, wanted=headline and growth is None
    )
    baselines = {name: step(call) for name, call in gathering.items()} | (
        {"loop over samples": step(loop)} if loops else {}
    )
    width = torch.empty((), dtype=dtype).element_size()
    listed = batch * (positives + negatives)
    return Case(
        op="set_contrast",
        size=f"B={batch} J={positives} K={negatives} D={dim} N={size} ({what})",
        device=device,
        make=make,
        ours=step(ours),
        baselines=baselines,
        # Each row that is listed, once; the bank where it is smaller. Twice: forward and backward.
        bytes=2 * min(listed, size) * dim * width + 3 * 4 * sets * batch * dim,
        needs={"gather, torch": 8 * listed * dim},
        growth=growth,
        headline=headline and growth is None,
    )


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
