"""No (B, N) array: peak memory of ops that go through a bank in panels, measured in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from pyreid import ops

batch, size, dim = 1024, {size}, 128
queries = torch.nn.functional.normalize(torch.randn(batch, dim)).requires_grad_()
bank = torch.randn(size, dim)
bank /= bank.norm(dim=1, keepdim=True)
labels = torch.arange(size) % (size // 8)
targets = torch.arange(batch)

def run(queries, bank, labels):
    {call}

run(queries[:4], bank[:4096], torch.arange(4096) % 512)  # libraries, threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(queries, bank, labels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""

CALLS = {
    "mine_negatives": "ops.mine_negatives(queries, bank, 50).scores.sum().backward()",
    "evaluate_ranking": "ids = targets[: len(queries)]; ops.evaluate_ranking(queries, bank, query_ids=ids,"
    " gallery_ids=labels, query_cameras=ids, gallery_cameras=labels * 0 - 1)",
    "row": "ops.bank_cross_entropy(queries, bank, targets[: len(queries)], scale=20)"
    ".sum().backward()",
    "label_uniform": "ops.bank_cross_entropy(queries, bank, targets[: len(queries)] % 512, scale=20,"
    " labels=labels, reduce='label_uniform').sum().backward()",
    "cluster_mean": "ops.bank_cross_entropy(queries, bank, targets[: len(queries)] % 512, scale=20,"
    " labels=labels, reduce='cluster_mean').sum().backward()",
}


def extra_megabytes(call, size):
    script = SCRIPT.format(size=size, call=CALLS[call])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_extra_memory(call):
    # Dense scores would take 800 MB here, 4 GB for a million rows.
    assert extra_megabytes(call, 200_000) < 150


if __name__ == "__main__":
    for name in CALLS:
        print(f"{name:16} B=1024 N=1,000,000 D=128: {extra_megabytes(name, 1_000_000):.0f} MB")
