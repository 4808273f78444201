"""Three processes over gloo: rows gathered in the order of ranks, means, the first's values."""

import multiprocessing

import torch

from pyreid import distributed

RANKS = 3


def work(rank, place, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=RANKS
    )
    rows = torch.arange(rank * 2).reshape(rank, 2) + 10 * rank  # none, one, two
    with distributed.counted() as traffic:
        distributed.gather_rows(rows)  # padded to two rows of 16 bytes, after a number of 8
        distributed.mean_([torch.zeros(6)])
    mean, whole = torch.full((2, 2), float(rank)), torch.full((3,), rank, dtype=torch.float64)
    distributed.mean_([mean, whole])
    first = torch.full((2,), rank)
    distributed.copy_from_first_([first])
    results.put(
        {
            "rank": distributed.rank(),
            "rows": distributed.gather_rows(rows).tolist(),
            "equal": distributed.gather_rows(first + rank, equal=True).tolist(),
            "mean": [*mean.tolist(), whole.tolist()],
            "first": first.tolist(),
            "any": (distributed.any_of(rank == 2), distributed.any_of(False)),
            "share": list(distributed.share(7)),
            "calls": dict(traffic.calls),
            "bytes": (dict(traffic.sent), dict(traffic.received)),
        }
    )
    torch.distributed.destroy_process_group()


def test_three_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, tmp_path / "store", results))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=120) for _ in processes), key=lambda each: each["rank"])
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for each in found:
        assert each["rows"] == [[10, 11], [20, 21], [22, 23]]
        assert each["equal"] == [0, 0, 1, 1, 2, 2]
        assert each["mean"] == [[1, 1], [1, 1], [1, 1, 1]]
        assert each["first"] == [0, 0]
        assert each["any"] == (True, False)
        assert each["calls"] == {"all_gather": 2, "all_reduce": 1}
        assert each["bytes"] == ({"all_gather": 2 * (8 + 32), "all_reduce": 2 * 2 * 24 // 3},) * 2
    assert [each["share"] for each in found] == [[0, 1], [2, 3], [4, 5, 6]]


def test_one_process_shares_with_nobody():
    rows = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(distributed.gather_rows(rows), rows)
    assert not distributed.gather_rows(rows).requires_grad
    distributed.mean_([rows])
    distributed.copy_from_first_([rows])
    assert torch.equal(rows, torch.ones(2, 3))
    assert list(distributed.share(5)) == [0, 1, 2, 3, 4]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.any_of(True)
    assert not distributed.any_of(False)
