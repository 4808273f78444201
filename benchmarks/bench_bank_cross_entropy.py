"""bank_cross_entropy, forward and backward, at the sizes of Cluster Contrast, SpCL and JVTC."""

import torch
from torch.nn import functional

from pyreid import ops

from . import peers
from .timing import Case, Growth, pytest_benchmark, sizes

SCALE = 20.0


def cases(device, quick=False):
    yield case(device, 256, 700, 2048, "Cluster Contrast")
    yield case(device, 64, 12936, 2048, "SpCL: 1500 labels", "cluster_mean", 1500)
    yield case(device, 128, 12936, 2048, "JVTC: 700 labels", "label_uniform", 700)
    yield case(device, 1024, 100_000, 256, "large bank")
    for size in sizes(quick):
        line = Growth("B=256 D=128", size, time=1, memory=0)
        yield case(device, 256, size, 128, "rows", growth=line)
    if not quick:
        yield case(device, 64, 32621, 2048, "SpCL on MSMT17", "cluster_mean", 4000)
        for batch in (32, 1024, 4096):
            yield case(device, batch, 12936, 2048, "batches", headline=False)
        for dim in (128, 512):
            yield case(device, 256, 12936, dim, "columns", headline=False)
        for dtype in (torch.float16, torch.bfloat16):
            yield case(device, 256, 12936, 2048, "bank of " + str(dtype)[6:], dtype=dtype)


def case(
    device,
    batch,
    size,
    dim,
    what,
    reduce="row",
    distinct=None,
    *,
    dtype=torch.float32,
    growth=None,
    headline=True,
):
    by_label = reduce != "row"

    def make():
        generator = torch.Generator().manual_seed(0)
        queries, bank = (
            functional.normalize(torch.randn(rows, dim, generator=generator))
            for rows in (batch, size)
        )
        targets = torch.randint(0, distinct or size, (batch,), generator=generator)
        labels = torch.arange(size) % distinct if by_label else targets
        labels = labels[torch.randperm(len(labels), generator=generator)] if by_label else labels
        queries, bank, targets, labels = (x.to(device) for x in (queries, bank, targets, labels))
        return queries.requires_grad_(), bank.to(dtype), targets, labels

    def ours(state):
        queries, bank, targets, labels = state
        losses = ops.bank_cross_entropy(
            queries,
            bank,
            targets,
            scale=SCALE,
            labels=labels if by_label else None,
            reduce=reduce,
        )
        return with_gradient(losses.mean(), queries)

    def dense(formula):
        def run(state):
            queries, bank, targets, labels = state
            return with_gradient(formula(queries, bank.float(), targets, labels), queries)

        return run

    def products(state):
        queries, bank, _, _ = state
        queries, bank = queries.detach(), bank.float()
        return (queries @ bank.T) @ bank

    bank_width = torch.empty((), dtype=dtype).element_size()
    columns = distinct if reduce == "cluster_mean" else size
    return Case(
        op="bank_cross_entropy",
        size=f"B={batch} N={size} D={dim} ({what})",
        device=device,
        make=make,
        ours=ours,
        baselines={
            name: dense(formula)
            for name, formula in peers.compiled(
                device, FORMULAS[reduce], wanted=headline and growth is None
            ).items()
        },
        bounds={"2 products alone": products},
        bytes=dim * (bank_width * size + 12 * batch),
        flops=2 * 2 * batch * columns * dim,
        tolerance=1e-4 if reduce == "cluster_mean" else 2e-5,
        needs={name: 16 * batch * size for name in FORMULAS[reduce] if "means" not in name},
        growth=growth,
        headline=headline and growth is None,
    )


def with_gradient(loss, queries):
    return loss.detach(), torch.autograd.grad(loss, queries)[0]


def over_rows(queries, bank, targets, _):
    """Cluster Contrast."""
    return functional.cross_entropy(SCALE * queries @ bank.T, targets)


def over_labels(queries, bank, targets, labels):
    """SpCL's hybrid memory as released, but for its epsilons, which are of another loss."""
    logits = SCALE * queries @ bank.T
    sums = torch.zeros(int(labels.max()) + 1, len(queries), device=bank.device)
    sums.index_add_(0, labels, logits.T.contiguous())
    counts = torch.zeros(len(sums), 1, device=bank.device)
    counts.index_add_(0, labels, torch.ones(len(labels), 1, device=bank.device))
    mask = (counts > 0).float()
    exponentials = torch.exp(sums / (mask * counts + (1 - mask))) * mask
    probabilities = exponentials / exponentials.sum(dim=0, keepdim=True)
    return functional.nll_loss(torch.log(probabilities).T, targets)


def over_means(queries, bank, targets, labels):
    """The same with the means taken first, so that there are as many columns as labels."""
    sums = torch.zeros(int(labels.max()) + 1, bank.shape[1], device=bank.device)
    sums.index_add_(0, labels, bank)
    counts = torch.bincount(labels, minlength=len(sums))
    return functional.cross_entropy(SCALE * queries @ (sums / counts[:, None]).T, targets)


def spread_over_label(queries, bank, targets, labels):
    """JVTC's global loss."""
    log_probabilities = functional.log_softmax(SCALE * queries @ bank.T, dim=1)
    multi = (targets[:, None] == labels).float()
    return -(multi / multi.sum(dim=1, keepdim=True) * log_probabilities).sum(dim=1).mean()


FORMULAS = {
    "row": {"dense torch": over_rows},
    "cluster_mean": {"as released": over_labels, "torch, means first": over_means},
    "label_uniform": {"dense torch": spread_over_label},
}


def test_speed(case, contender, benchmark):
    pytest_benchmark(case, contender, benchmark)
