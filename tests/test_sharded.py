"""Rows that are spread over processes (gloo, 2 and 4): every result is that of one process with all rows."""

import itertools
import os
import queue
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pyreid import distributed, ops, sharded
from pyreid.memory import MemoryBank
from pyreid.sharded import ShardedMemoryBank, _contrast, _exchange, _graph

SIZE, DIM, BATCH, K = 301, 16, 13, 9
# Where the rows, and the batch, are cut: unevenly; one process of four has nothing.
ROWS = {2: [0, 75, SIZE], 4: [0, 40, 40, 200, SIZE]}
QUERIES = {2: [0, 5, BATCH], 4: [0, 4, 4, 9, BATCH]}
VARIANTS = ["spcl", "openunreid", "zhong", "mmt", "jvtc", "strong-baseline"]
REPEATS = ["sequential", "last", "hardest", "mean"]
# reduce, label smoothing
ENTROPIES = [("row", 0.0), ("row", 0.1), ("label_uniform", 0.1), ("cluster_mean", 0.0),
             ("cluster_mean", 0.2)]  # fmt: skip
# sorted by label, or not
ORDERS = ["mixed", "sorted"]


def people(size, dim=DIM, seed=0):
    rng = np.random.default_rng(size + seed)
    x = rng.standard_normal((max(size // 8, 1), dim))[np.arange(size) % max(size // 8, 1)]
    x = x + 0.6 * rng.standard_normal((size, dim))
    return torch.tensor((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def bank_rows(order="mixed"):
    """Features with equal rows among them, labels (some rows have none), cameras."""
    features = people(SIZE)
    features[200] = features[3]
    features[77] = features[3]
    labels = torch.arange(SIZE) % 37 - 1
    if order == "sorted":
        labels = labels.sort().values
    return features, labels, torch.arange(SIZE) % 3


def batch():
    """Queries, and for each a row, a label, a camera, lists of rows, a momentum; some rows repeat."""
    rng = np.random.default_rng(5)
    rows = torch.tensor(rng.integers(0, SIZE, BATCH))
    rows[[2, 7, 12]] = int(rows[0])
    positives = torch.tensor(rng.integers(0, SIZE, (BATCH, 3)))
    negatives = torch.tensor(rng.integers(0, SIZE, (BATCH, 20)))
    positives[1, 2], positives[4], negatives[3, 5:], negatives[6] = -1, -1, -1, -1
    return {
        "queries": people(BATCH, seed=1),
        "rows": rows,
        "labels": torch.tensor(rng.integers(0, 36, BATCH)),
        "cameras": torch.tensor(rng.integers(0, 3, BATCH)),
        "positives": positives,
        "negatives": negatives,
        "momentum": torch.tensor(rng.random(BATCH), dtype=torch.float32),
        "grad": torch.tensor(rng.random(BATCH), dtype=torch.float32),
    }


def mining(part):
    yield {}
    yield {"skip": 2, "self_rows": part["rows"]}
    yield {
        "query_labels": part["labels"],
        "query_cameras": part["cameras"],
        "camera_penalty": 0.1,
    }


def contrasts(part):
    weights = torch.tensor([0.5, 0.3, 0.2])
    for denominator, given_weights, negatives in [
        ("joint", None, part["negatives"]),
        ("own", weights, part["negatives"]),
        ("joint", weights.repeat(len(part["rows"]), 1), None),
        ("own", None, None),
    ]:
        yield {
            "positives": part["positives"],
            "negatives": negatives,
            "weights": given_weights,
            "denominator": denominator,
            "scale": 7.0,
        }


def with_gradient(loss, queries, grad):
    queries = queries.clone().requires_grad_()
    losses = loss(queries)
    losses.backward(grad)
    return losses.detach(), queries.grad


# --- what the processes do, and what one does ---------------------------------------------------------


def of_a_bank(make, part, keep):
    """Everything by `part`'s share of the batch; `keep(name, call)` keeps what a call returns."""
    for repeats in REPEATS:
        bank = make("mixed", repeats=repeats, parts=2, search_dtype=torch.float16)
        keep(f"update {repeats}", lambda bank=bank: bank.update(part["queries"], part["rows"]))
        keep("momenta", lambda bank=bank: bank.update(
            part["queries"], part["rows"], momentum=part["momentum"]))  # fmt: skip
        keep(f"bank {repeats}", lambda bank=bank: bank.features)
        keep(f"half {repeats}", lambda bank=bank: bank.search_features)
    bank = make("mixed")
    for n, options in enumerate(mining(part)):
        keep(f"mine {n}", lambda options=options: bank.mine(part["queries"], K, **options))
    keep("mine all", lambda: bank.mine(part["queries"], 400))


def losses_of(bank_of, part, keep):
    """`bank_of(order)`: the losses of a bank, as functions of its methods' arguments."""
    for order in ORDERS:
        cross_entropy, contrast = bank_of(order)
        for reduce, smoothing in ENTROPIES:
            targets = part["rows"] if reduce == "row" else part["labels"]
            keep(f"{order} {reduce} {smoothing}", lambda q, o=(targets, reduce, smoothing), e=cross_entropy: e(
                q, o[0], scale=9.0, reduce=o[1], label_smoothing=o[2]))  # fmt: skip
    for n, options in enumerate(contrasts(part)):
        keep(f"contrast {n}", lambda q, options=options: contrast(q, **options))


def small_pieces():
    _graph._PANEL, _graph._FETCHED, _graph._ENTRIES = 50 * DIM, 60 * DIM, 3000
    _contrast._TAKEN = 40 * DIM


def join(rank, ranks, place, seconds=60):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )


def work(rank, ranks, place, said):
    try:
        join(rank, ranks, place)
        small_pieces()
        torch.save(everything(rank, ranks, place), place / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        said.put((rank, "done"))
    except BaseException as error:
        said.put((rank, f"{type(error).__name__}: {error}"))
        raise


def everything(rank, ranks, place):
    rows = slice(*ROWS[ranks][rank : rank + 2])
    some = slice(*QUERIES[ranks][rank : rank + 2])
    part = {name: value[some] for name, value in batch().items()}
    results, traffic = {}, {}

    def keep(name, call):
        with distributed.counted() as counted:
            results[name] = call()
        traffic[name] = dict(counted.calls), dict(counted.sent), dict(counted.received)

    def make(order, **options):
        return ShardedMemoryBank(*(array[rows] for array in bank_rows(order)), **options)

    def bank_of(order):
        bank = make(order)
        assert len(bank) == SIZE
        assert bank.own == range(rows.start, rows.stop)
        return bank.cross_entropy, bank.set_contrast

    of_a_bank(make, part, keep)
    losses_of(
        bank_of,
        part,
        lambda name, loss: keep(name, lambda: with_gradient(loss, part["queries"], part["grad"])),
    )
    bank = make("mixed")
    keep("rows", lambda: bank.rows(part["negatives"].clamp(min=0)))
    keep("labels", lambda: bank.labels_of(part["rows"]))
    keep("whole", bank.whole_state)
    bank.save(place / "saved")
    other = ShardedMemoryBank(bank.features[:0])
    other.load(place / "saved")
    assert len(other.own) in (SIZE // ranks, SIZE // ranks + 1)
    keep("loaded", other.whole_state)
    other = ShardedMemoryBank(bank.features[:0])
    other.load_whole_state(results["whole"])
    keep("loaded whole", other.whole_state)
    other = ShardedMemoryBank(bank.features[:0])
    other.load_state_dict(bank.state_dict())
    assert other.own == bank.own
    keep("loaded own", other.whole_state)
    refusals(bank, part, ranks)

    features = people(SIZE)[rows]
    keep("knn", lambda: sharded.knn(features, K))
    for variant in VARIANTS:
        near = {"max_distance": 0.7, "variant": variant}
        keep(f"graph {variant}", lambda near=near: sharded.jaccard_graph(features, 8, 3, **near))
    keep("all pairs", lambda: sharded.jaccard_graph(features, 8, 1))
    for samples in (1, 4):
        levels = {"eps": (0.3, 0.5, 0.7), "min_samples": samples}
        keep(
            f"labels {samples}",
            lambda levels=levels: sharded.pseudo_labels(features, k1=8, k2=3, **levels),
        )
    few = people(3)
    few = few[rank : rank + 1] if ranks == 4 else few[2 * rank : 2 * rank + 2]
    keep("few", lambda: sharded.pseudo_labels(few, k1=8, k2=3, eps=0.6, min_samples=1))
    return results, traffic


def refusals(bank, part, ranks):
    """What one process gets wrong, all are told of."""
    wrong = part["rows"].clone()
    others = "another on rank " + {2: "0", 4: "3"}[ranks]
    if bank.own.stop == (SIZE if ranks == 4 else 75):
        wrong[1], others = SIZE, str(SIZE)
    for call, name in [
        (lambda: bank.update(part["queries"], wrong), "update: rows"),
        (lambda: bank.rows(wrong), "rows: ids"),
        (lambda: bank.set_contrast(part["queries"], wrong[:, None], scale=1.0),
         "set_contrast: positives and negatives"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        expected = f"ShardedMemoryBank.{name} must lie in [0, {SIZE}), got {others}"
        assert str(error.value) == expected
    labels = part["labels"] * 0 + 1000
    for reduce, rule in [
        ("row", f"lie in [0, {SIZE})"), ("label_uniform", "be labels that a row of the bank has"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            bank.cross_entropy(part["queries"], labels, scale=1.0, reduce=reduce)
        assert str(error.value) == (
            f"ShardedMemoryBank.cross_entropy: targets must {rule}, got 1000"
        )


@pytest.fixture(scope="module")
def alone():
    """Of one process: {name: result}."""
    found = {}

    def keep(name, call):
        found[name] = call()

    whole = batch()
    of_a_bank(lambda order, **options: MemoryBank(*bank_rows(order), **options), whole, keep)

    def bank_of(order):
        features, labels, _ = bank_rows(order)

        def cross_entropy(queries, targets, *, reduce, **options):
            names = None if reduce == "row" else labels
            return ops.bank_cross_entropy(
                queries, features, targets, labels=names, reduce=reduce, **options
            )

        return cross_entropy, lambda queries, positives, negatives, **options: ops.set_contrast(
            queries, features, positives, negatives, **options
        )

    losses_of(
        bank_of,
        whole,
        lambda name, loss: keep(name, lambda: with_gradient(loss, whole["queries"], whole["grad"])),
    )
    features, labels, cameras = bank_rows()
    found["rows"] = features[whole["negatives"].clamp(min=0)]
    found["labels"] = labels[whole["rows"]]
    for name in ("whole", "loaded", "loaded whole", "loaded own"):
        found[name] = {"features": features, "labels": labels, "cameras": cameras}
    x = people(SIZE)
    found["knn"] = ops.knn(x, K)
    for variant in VARIANTS:
        found[f"graph {variant}"] = ops.jaccard_graph(x, 8, 3, max_distance=0.7, variant=variant)
    found["all pairs"] = ops.jaccard_graph(x, 8, 1)
    for samples in (1, 4):
        found[f"labels {samples}"] = ops.pseudo_labels(
            x, k1=8, k2=3, eps=(0.3, 0.5, 0.7), min_samples=samples
        )
    found["few"] = ops.pseudo_labels(people(3), k1=8, k2=3, eps=0.6, min_samples=1)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def several(request, processes, tmp_path_factory):
    """Of several processes: their number, and what each says."""
    place, ranks = tmp_path_factory.mktemp("sharded"), request.param
    run(processes, work, ranks, place, 100)
    return ranks, [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def run(processes, target, ranks, place, seconds, expect=None):
    """Starts processes and returns what each says; all must say "done", unless told otherwise."""
    said = processes.Queue()
    started = [
        processes.Process(target=target, args=(rank, ranks, place, said)) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    try:
        found = dict(said.get(timeout=seconds) for _ in range(expect or ranks))
    finally:
        for process in started:
            process.join(2)
            process.kill()
            process.join()
    if expect is None:
        assert found == dict.fromkeys(range(ranks), "done")
    return found


def joined(parts):
    """Rows of one process after another's."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, int(parts[0].dim() == 2 and parts[0].dtype == torch.int64))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def test_bank(alone, several):
    _, found = several
    for repeats in REPEATS:
        for name in (f"bank {repeats}", f"half {repeats}"):
            assert torch.equal(torch.cat([results[name] for results, _ in found]), alone[name])
    for name in ("mine 0", "mine 1", "mine 2", "mine all"):
        scores, rows = joined([results[name] for results, _ in found])
        assert torch.equal(rows, alone[name].rows)
        assert torch.equal(scores, alone[name].scores)
    assert (alone["mine all"].rows == -1).any()
    for name in ("rows", "labels"):
        assert torch.equal(torch.cat([results[name] for results, _ in found]), alone[name])


@pytest.mark.parametrize("name", ["whole", "loaded", "loaded whole", "loaded own"])
def test_states(alone, several, name):
    _, found = several
    for results, _ in found:
        for part, expected in alone[name].items():
            assert torch.equal(results[name][part], expected)


@pytest.mark.parametrize(
    "name",
    [f"{order} {reduce} {smoothing}" for order in ORDERS for reduce, smoothing in ENTROPIES]
    + [f"contrast {n}" for n in range(4)],
)
def test_losses(alone, several, name):
    _, found = several
    losses, gradients = joined([results[name] for results, _ in found])
    torch.testing.assert_close(losses, alone[name][0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradients, alone[name][1], rtol=1e-5, atol=1e-6)


def test_neighbours_and_graphs(alone, several):
    ranks, found = several
    scores, rows = joined([results["knn"] for results, _ in found])
    assert torch.equal(rows, alone["knn"].rows)
    assert torch.equal(scores, alone["knn"].scores)
    for name in [f"graph {variant}" for variant in VARIANTS] + ["all pairs"]:
        graphs = [results[name] for results, _ in found]
        counts = torch.cat([graph.indptr.diff() for graph in graphs])
        assert torch.equal(counts, alone[name].indptr.diff())
        assert torch.equal(torch.cat([graph.indices for graph in graphs]), alone[name].indices)
        distances = torch.cat([graph.distances for graph in graphs])
        assert torch.equal(distances, alone[name].distances)
        assert [graph.rows.start for graph in graphs] == ROWS[ranks][:-1]


def test_labels(alone, several):
    _, found = several
    for name in ("labels 1", "labels 4"):
        labels = torch.cat([results[name] for results, _ in found], 1)
        assert torch.equal(labels, alone[name])
        assert (labels.max(1).values > 5).all()
    assert torch.equal(torch.cat([results["few"] for results, _ in found]), alone["few"])
