"""lightly's memory banks: ours against a list of columns, in one process and in several, and in the package's
loss where it is installed."""

import importlib
import importlib.util
import os

import pytest
import torch
import trainers
from torch.nn import functional as F

from pyreid import compat, distributed
from pyreid.compat import fast_reid, lightly

STAND_IN = {
    "lightly/models/modules/memory_bank.py": "class MemoryBankModule: pass\n",
    "lightly/models/modules/nn_memory_bank.py": """
from lightly.models.modules.memory_bank import MemoryBankModule

class NNMemoryBankModule(MemoryBankModule): pass
""",
    "lightly/loss/ntx_ent_loss.py": """
import torch
from lightly.models.modules.memory_bank import MemoryBankModule

class NTXentLoss(torch.nn.Module):
    def __init__(self, temperature=0.5, memory_bank_size=0):
        super().__init__()
        self.memory_bank = MemoryBankModule(size=memory_bank_size)
        self.temperature = temperature

    def forward(self, out0, out1):
        out0, out1 = (torch.nn.functional.normalize(x, dim=1) for x in (out0, out1))
        out1, negatives = self.memory_bank.forward(out1, update=out0.requires_grad)
        logits = torch.cat([(out0 * out1).sum(1, keepdim=True), out0 @ negatives], 1)
        target = torch.zeros(len(out0), dtype=torch.long)
        return torch.nn.functional.cross_entropy(logits / self.temperature, target)
""",
}


class Columns:
    """The bank as a list that a pointer goes through; what does not fit at its end is dropped."""

    def __init__(self, bank):
        self.rows, self.begin = [row.clone() for row in bank], 0

    def update(self, batch):
        for place, row in enumerate(batch.detach(), self.begin):
            if place < len(self.rows):
                self.rows[place] = row.float()
        self.begin += len(batch)
        if self.begin >= len(self.rows):
            self.begin = 0


@pytest.mark.parametrize("feature_dim_first", [True, False])
@pytest.mark.parametrize("batches", [[4, 4, 4, 4], [3, 3, 3, 3, 3], [1, 11, 2], [10], [25, 3]])
def test_bank(batches, feature_dim_first):
    bank = lightly.MemoryBankModule((10, 6), feature_dim_first=feature_dim_first)
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(10))
    theirs = Columns(bank.bank)
    for size in batches:
        output = torch.randn(size, 6, requires_grad=True)
        before = torch.stack(theirs.rows)
        for update in (False, True):
            same, read = bank(output, update=update)
            assert same is output
            assert torch.equal(read.T if feature_dim_first else read, before)
            assert not read.requires_grad
        theirs.update(output)
        assert torch.equal(bank.bank, torch.stack(theirs.rows))
        assert bank.bank_ptr.tolist() == [theirs.begin]
        assert torch.equal(read.T if feature_dim_first else read, before)  # still


def test_no_bank_and_sizes_that_are_none():
    bank, output = lightly.MemoryBankModule(size=0), torch.randn(3, 2)
    assert bank(output, update=True) == (output, None)
    for size in (-5, (-1, 4), (), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"size must be \(rows, dim\), rows or 0, got"):
            lightly.MemoryBankModule(size)


def test_rows_alone():
    """As until lightly 1.5: the first features tell how long rows are."""
    bank, nearest = lightly.MemoryBankModule(5), lightly.NNMemoryBankModule(4)
    output = torch.randn(3, 2)
    _, read = bank(output, update=True)
    assert read.shape == (2, 5)
    assert torch.equal(bank.bank[:3], output)
    assert nearest(output).shape == (3, 2)
    assert bank.size == (5, 2)


def test_two_looks_before_one_backward():
    """What a loss has read does not change under it."""
    bank = lightly.MemoryBankModule((8, 4))
    theirs = Columns(bank.bank)
    x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    terms, meant = [], []
    for one in (x, y):
        _, read = bank(one, update=True)
        terms.append((one @ read).logsumexp(1).sum())
        meant.append((one @ torch.stack(theirs.rows).T).logsumexp(1).sum())
        theirs.update(one)
    gradients = torch.autograd.grad(sum(terms), (x, y))
    for a, b in zip(gradients, torch.autograd.grad(sum(meant), (x, y)), strict=True):
        torch.testing.assert_close(a, b)


def test_nearest_neighbours():
    bank = lightly.NNMemoryBankModule((12, 6))
    bank.bank *= torch.linspace(0.5, 3, 12)[:, None]  # not unit any more
    theirs = Columns(bank.bank)
    for _ in range(4):
        output = torch.randn(5, 6)
        rows = torch.stack(theirs.rows)
        expected = rows[F.cosine_similarity(output[:, None], rows, dim=2).argmax(dim=1)]
        found = bank(output, update=True)
        assert torch.equal(found, expected)
        theirs.update(output)
        assert torch.equal(found, expected)  # not a view of the bank
        assert torch.equal(bank.bank, torch.stack(theirs.rows))


def gathered(rank, place, results):
    """Batches of different sizes, banks that begin differently; and fast-reid's queue."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    bank = lightly.MemoryBankModule((12, 3), gather_distributed=True)
    theirs = Columns(distributed.gather_rows(bank.bank)[:12])  # rank 0's
    for step in range(3):
        batches = [torch.full((2 + r, 3), float(10 * step + r)) for r in range(2)]
        bank(batches[rank], update=True)
        theirs.update(torch.cat(batches))
    queue = fast_reid.Memory(dim=2, K=8)
    for step in range(3):
        queue(torch.eye(2) + 1, torch.tensor([rank, step]))
    results.put((torch.equal(bank.bank, torch.stack(theirs.rows)), queue.queue_label.tolist()))
    results.close()
    results.join_thread()
    os._exit(0)  # how gloo ends is not what is tested: with torch 2.6 it has hung


def test_all_processes_have_one_bank(processes, tmp_path):
    results = processes.Queue()
    started = [
        processes.Process(target=gathered, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    found = [results.get(timeout=120) for _ in started]
    for process in started:
        process.join()
        assert process.exitcode == 0
    assert found == [(True, [[0, 2, 1, 2, 0, 1, 1, 1]])] * 2


def test_what_it_replaces_in_a_loss(tmp_path, monkeypatch):
    """lightly's NTXentLoss with our bank and with its own: losses and gradients over three steps."""
    real = importlib.util.find_spec("lightly") is not None
    if not real:
        trainers.write(tmp_path, STAND_IN)

    def steps(loss):
        loss.memory_bank.bank.copy_(F.normalize(torch.linspace(-1, 2, 36).sin().view(9, 4)))
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(4):
            x, y = (torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2))
            value = loss(x, y)
            found += [value.detach(), *torch.autograd.grad(value, (x, y))]
        return found

    with trainers.importable(tmp_path, "lightly"):
        with compat.patch("lightly", quiet=True):
            made = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss(
                memory_bank_size=(9, 4)
            )
            assert type(made.memory_bank) is lightly.MemoryBankModule
            found = steps(made)
        module = importlib.import_module("lightly.loss.ntx_ent_loss")
        if real:
            expected = steps(module.NTXentLoss(memory_bank_size=(9, 4)))
        else:
            monkeypatch.setattr(module, "MemoryBankModule", Dense)
            expected = steps(module.NTXentLoss(memory_bank_size=(9, 4)))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Dense(torch.nn.Module):
    """A bank that is copied whenever it is read."""

    def __init__(self, size):
        super().__init__()
        self.bank, self.columns = torch.zeros(size), None

    def forward(self, output, update):
        self.columns = self.columns or Columns(self.bank)
        read = torch.stack(self.columns.rows).T.clone()
        if update:
            self.columns.update(output)
        return output, read
