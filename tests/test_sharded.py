"""Rows that are spread over processes (gloo, 2 and 4): every result is that of one process with all rows."""

import copy
import itertools
import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pyreid import distributed, ops, sharded
from pyreid.memory import MemoryBank
from pyreid.ops import jaccard as one
from pyreid.ops._work import Work
from pyreid.sharded import ShardedMemoryBank, _contrast, _exchange, _graph

try:
    from benchmarks import sharded as model
except ImportError:  # the directory is elsewhere
    from pyreid.benchmarks import sharded as model

SIZE, DIM, BATCH, K = 301, 16, 13, 9
# Where the rows, and the batch, are cut: unevenly; one process of four has nothing.
ROWS = {2: [0, 75, SIZE], 4: [0, 40, 40, 200, SIZE]}
QUERIES = {2: [0, 5, BATCH], 4: [0, 4, 4, 9, BATCH]}
VARIANTS = ["spcl", "openunreid", "zhong", "mmt", "jvtc", "strong-baseline"]
SOME_VARIANTS = {2: ["openunreid", "zhong", "jvtc"], 4: ["mmt", "strong-baseline"]}
LEVELS = (0.3, 0.5, 0.7)
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
    (losses * grad).sum().backward()
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
            loss = partial(
                cross_entropy,
                targets=part["rows"] if reduce == "row" else part["labels"],
                scale=9.0,
                reduce=reduce,
                label_smoothing=smoothing,
            )
            keep(f"{order} {reduce} {smoothing}", loss)
    for n, options in enumerate(contrasts(part)):
        keep(f"contrast {n}", partial(contrast, **options))


def small_pieces():
    _graph._PANEL, _graph._FETCHED, _graph._ENTRIES = 100 * DIM, 700 * DIM, 6000
    _contrast._TAKEN = 40 * DIM


def join(rank, ranks, place):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
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
    keep("labels of", lambda: bank.labels_of(part["rows"]))
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
    gradient = of_a_layer(bank.cross_entropy, part)
    distributed.mean_([gradient])
    results["layer"] = ranks * gradient

    features = people(SIZE)[rows]
    keep("knn", lambda: sharded.knn(features, K))
    for variant in SOME_VARIANTS[ranks]:
        near = {"max_distance": 0.7, "variant": variant}
        keep(f"graph {variant}", lambda near=near: sharded.jaccard_graph(features, 8, 3, **near))
    keep("labels", lambda: sharded.pseudo_labels(features, k1=8, k2=3, eps=LEVELS))
    _graph._PANEL, _graph._FETCHED, _graph._ENTRIES = 2**20, 2**20, 2**26
    keep("all pairs", lambda: sharded.jaccard_graph(features, 8, 1))
    keep("averaged", lambda: sharded.jaccard_graph(features, 8, 3, max_distance=0.7))
    keep("small clusters", lambda: sharded.dbscan(results["all pairs"], LEVELS, 1))
    pair = dist.new_group([0, 2]) if ranks == 4 else None
    if rank in (0, 2) or ranks == 2:
        keep("group", lambda: sharded.knn(features, K, group=pair))
        bank = make("mixed", group=pair)
        keep("mine in a group", lambda: bank.mine(part["queries"][:4], K))
    few = people(3)
    few = few[rank : rank + 1] if ranks == 4 else few[2 * rank : 2 * rank + 2]
    keep("few", lambda: sharded.pseudo_labels(few, k1=8, k2=3, eps=0.6, min_samples=1))
    return results, traffic


def of_a_layer(cross_entropy, part):
    """The gradient of the sum of the losses of what a layer makes of queries."""
    layer = torch.nn.Linear(DIM, DIM, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(DIM).flip(0))
    cross_entropy(layer(part["queries"]), part["rows"], scale=9.0).sum().backward()
    return layer.weight.grad


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
    rank = dist.get_rank()
    for call, op in [(lambda x: sharded.knn(x, 3), "sharded.knn"),
                     (ShardedMemoryBank, "ShardedMemoryBank.reset")]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call(people(9)[:, : 8 + rank // (ranks - 1)].contiguous())
        widths = ", ".join(["8 of 4 bytes"] * (ranks - 1) + ["9 of 4 bytes"])
        assert str(error.value) == (
            f"{op}: features must have the same columns on all ranks, got {widths}"
        )
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
    found["labels of"] = labels[whole["rows"]]
    for name in ("whole", "loaded", "loaded whole", "loaded own"):
        found[name] = {"features": features, "labels": labels, "cameras": cameras}
    found["layer"] = of_a_layer(
        lambda queries, rows, scale: ops.bank_cross_entropy(queries, features, rows, scale=scale),
        whole,
    )
    x = people(SIZE)
    found["knn"] = ops.knn(x, K)
    for variant in VARIANTS:
        found[f"graph {variant}"] = ops.jaccard_graph(x, 8, 3, max_distance=0.7, variant=variant)
    found["all pairs"] = ops.jaccard_graph(x, 8, 1)
    found["averaged"] = ops.jaccard_graph(x, 8, 3, max_distance=0.7)
    found["small clusters"] = ops.dbscan(found["all pairs"], LEVELS, 1)
    found["labels"] = ops.pseudo_labels(x, k1=8, k2=3, eps=LEVELS)
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
            process.join(2 if expect is None else 0)
            process.kill()
            process.join()
    if expect is None:
        assert found == dict.fromkeys(range(ranks), "done")
    return found


def joined(parts):
    """Rows of one process after another's."""
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
    for name in ("rows", "labels of"):
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


def test_gradients_of_what_is_alike_on_all(alone, several):
    """As data-parallel training adds them up."""
    _, found = several
    for results, _ in found:
        torch.testing.assert_close(results["layer"], alone["layer"], rtol=1e-5, atol=1e-5)


def test_neighbours_and_graphs(alone, several):
    ranks, found = several
    scores, rows = joined([results["knn"] for results, _ in found])
    assert torch.equal(rows, alone["knn"].rows)
    assert torch.equal(scores, alone["knn"].scores)
    for name in [f"graph {variant}" for variant in SOME_VARIANTS[ranks]] + [
        "all pairs",
        "averaged",
    ]:
        graphs = [results[name] for results, _ in found]
        counts = torch.cat([graph.indptr.diff() for graph in graphs])
        assert torch.equal(counts, alone[name].indptr.diff())
        assert torch.equal(torch.cat([graph.indices for graph in graphs]), alone[name].indices)
        distances = torch.cat([graph.distances for graph in graphs])
        assert torch.equal(distances, alone[name].distances)
        assert [graph.rows.start for graph in graphs] == ROWS[ranks][:-1]


def test_a_group(several):
    ranks, found = several
    held = [0, 2] if ranks == 4 else [0, 1]
    x = people(SIZE)[: 200 if ranks == 4 else SIZE]
    scores, rows = joined([found[rank][0]["group"] for rank in held])
    assert torch.equal(rows, ops.knn(x, K).rows)
    assert torch.equal(scores, ops.knn(x, K).scores)
    cuts = [QUERIES[ranks][rank] for rank in held]
    queries = torch.cat([batch()["queries"][first : first + 4] for first in cuts])
    scores, rows = joined([found[rank][0]["mine in a group"] for rank in held])
    assert torch.equal(rows, ops.mine_negatives(queries, bank_rows()[0][: len(x)], K).rows)


def test_labels(alone, several):
    _, found = several
    for name in ("labels", "small clusters"):
        labels = torch.cat([results[name] for results, _ in found], 1)
        assert torch.equal(labels, alone[name])
        assert (labels.max(1).values > 5).all()
    assert torch.equal(torch.cat([results["few"] for results, _ in found]), alone["few"])


# --- volumes ------------------------------------------------------------------------------------------


class Volume:
    """What a process should send and receive, in bytes, of `ranks` of which it is `rank`."""

    def __init__(self, ranks, rank):
        self.ranks, self.rank = ranks, rank
        self.rows, self.queries = np.diff(ROWS[ranks]), np.diff(QUERIES[ranks])
        self.sent, self.received = 0, 0

    def owner(self, ids):
        return np.searchsorted(ROWS[self.ranks][1:-1], np.asarray(ids), side="right")

    def gather(self, size):
        """All give as much: whoever has least pads."""
        self.sent += (self.ranks - 1) * size
        self.received += (self.ranks - 1) * size

    def reduce(self, size):
        self.sent += 2 * size * (self.ranks - 1) // self.ranks
        self.received += 2 * size * (self.ranks - 1) // self.ranks

    def route(self, ids, told=0, answered=0):
        """`ids[r]`: those of rank r; bytes for each, to the owners and back."""
        self.gather(8 * self.ranks)
        for rank, of_rank in enumerate(ids):
            owners = self.owner(of_rank)
            if rank == self.rank:
                away = int((owners != rank).sum())
                self.sent += (4 + told) * away
                self.received += answered * away
            else:
                here = int((owners == self.rank).sum())
                self.sent += answered * here
                self.received += (4 + told) * here

    def everybodys_queries(self, *more):
        self.gather(8)
        self.gather(self.queries.max() * DIM * 4)
        for width in more:
            self.gather(self.queries.max() * width)

    def sent_back(self, width):
        own = self.queries[self.rank]
        self.sent += (BATCH - own) * width
        self.received += (self.ranks - 1) * own * width

    def of_each(self, table):
        """A table of the batch, as each process has it."""
        bounds = QUERIES[self.ranks]
        return [np.asarray(table[first:last]) for first, last in itertools.pairwise(bounds)]


def bank_volumes(ranks, rank):
    whole = batch()

    def volume():
        return Volume(ranks, rank)

    update = volume()
    update.route(update.of_each(whole["rows"]), told=DIM * 4)
    yield "update last", update
    momenta = volume()
    momenta.route(momenta.of_each(whole["rows"]), told=DIM * 4 + 4)
    yield "momenta", momenta
    mine = volume()
    mine.everybodys_queries(8)
    mine.sent_back((K + 2) * (4 + 8))
    yield "mine 1", mine
    rows = volume()
    rows.route(
        [part.ravel() for part in rows.of_each(whole["negatives"].clamp(min=0))], answered=DIM * 4
    )
    yield "rows", rows
    entropy = volume()
    entropy.everybodys_queries(8)
    entropy.reduce(8 * len(whole["rows"].unique()))
    entropy.reduce(4 * BATCH)
    entropy.reduce(3 * 4 * BATCH)
    entropy.sent_back(DIM * 4)
    yield "mixed row 0.1", entropy
    labels = np.split(bank_rows()[1].numpy(), ROWS[ranks][1:-1])
    holders = sum(np.bincount(np.unique(part[part >= 0]), minlength=36) for part in labels)
    means = volume()
    means.everybodys_queries(8)
    means.reduce(8 * len(whole["labels"].unique()))
    means.reduce(4 * BATCH * int((holders > 1).sum()))
    means.reduce(4 * BATCH)
    means.reduce(3 * 4 * BATCH)
    means.sent_back(DIM * 4)
    yield "mixed cluster_mean 0.2", means
    contrast = volume()
    contrast.everybodys_queries()
    listed = contrast.of_each(torch.cat([whole["positives"], whole["negatives"]], 1))
    # With an id go the number of its query and a slope; a product comes back.
    contrast.route([part[part >= 0] for part in listed], told=4 + 4, answered=4)
    contrast.sent_back(DIM * 4)
    yield "contrast 1", contrast


def graph_volume(ranks, rank, k1, k2):
    """Of `jaccard_graph`, each stage in one go."""
    volume = Volume(ranks, rank)
    x = people(SIZE)
    own = volume.rows[rank]
    volume.gather(3 * 8)
    volume.sent += own * DIM * 4
    volume.received += (SIZE - own) * DIM * 4
    for _ in range((5 + (k2 > 1)) * 2):  # rounds: the one, and that there is no other
        volume.gather(8)

    def distinct(table):
        found = [np.unique(np.asarray(part)) for part in np.split(table, ROWS[ranks][1:-1])]
        return [part[part >= 0] for part in found]

    def encoded(k2):
        """Starts and ids of the rows of weights."""
        rules = (None, "spcl", None, None, (5, 2), (20, 4), Work(SIZE))
        return [part.numpy() for part in one._checked("", x, k1, k2, *rules)[1].weights[:2]]

    def of_each(starts, ids):
        cuts = starts[ROWS[ranks]]
        return [ids[first:last] for first, last in itertools.pairwise(cuts)]

    def sparse(wanted, lengths):
        """Rows of entries, of 8 bytes each, and how many they are."""
        volume.route(wanted, answered=4)
        for other, rows in enumerate(wanted):
            owners = volume.owner(rows)
            if other == rank:
                volume.received += 8 * int(lengths[rows[owners != rank]].sum())
            else:
                volume.sent += 8 * int(lengths[rows[owners == rank]].sum())

    lists = ops.knn(x, k1).rows.numpy()
    volume.route(distinct(lists), answered=4 * k1)
    back = (lists[lists] == np.arange(SIZE)[:, None, None]).any(2)
    volume.route(distinct(np.where(back, lists, -1)), answered=4 * (k1 // 2 + 1))
    sets = encoded(1)
    # None of the rows that are here is among the ids of the one piece, but they would cost nothing.
    volume.route([np.unique(part) for part in of_each(*sets)], answered=4 * DIM)
    if k2 > 1:
        sparse(distinct(lists[:, :k2]), np.diff(sets[0]))
    weights = encoded(k2)
    volume.route(of_each(*weights), told=4 + 4)
    columns = [np.unique(part) for part in of_each(*weights)]
    sparse(columns, np.bincount(weights[1], minlength=SIZE))
    return volume


def test_volumes(several):
    ranks, found = several
    for rank, (_, traffic) in enumerate(found):
        expected = dict(bank_volumes(ranks, rank))
        expected["all pairs"] = graph_volume(ranks, rank, 8, 1)
        expected["averaged"] = graph_volume(ranks, rank, 8, 3)
        for name, volume in expected.items():
            calls, sent, received = traffic[name]
            assert sum(sent.values()) == volume.sent, name
            assert sum(received.values()) == volume.received, name
        # Names of clusters, in rounds, for each eps.
        calls, sent, _ = traffic["small clusters"]
        once = 2 * 4 * SIZE * (ranks - 1) // ranks
        assert sent["all_reduce"] == calls["all_reduce"] * once
        assert len(LEVELS) * 2 <= calls["all_reduce"] <= len(LEVELS) * 6


# --- a process by itself ------------------------------------------------------------------------------


def same(graph, expected):
    for part, other in zip(graph[:3], expected[:3], strict=True):
        assert torch.equal(part, other)


@settings(max_examples=40)
@given(
    size=st.integers(0, 70),
    k1=st.integers(1, 40),
    k2=st.integers(1, 12),
    variant=st.sampled_from(VARIANTS),
    piece=st.integers(1, 40),
    most=st.sampled_from([None, 0.6]),
    copies=st.integers(0, 20),
)
def test_graph_in_pieces(size, k1, k2, variant, piece, most, copies):
    features = people(size)
    features[: min(copies, size)] = features[:1]
    sizes = {"_PANEL": piece * DIM, "_FETCHED": piece * DIM, "_ENTRIES": 50 * piece}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(_graph, name, value)
        graph = sharded.jaccard_graph(features, k1, k2, max_distance=most, variant=variant)
        found = sharded.knn(features, k1)
    same(graph, ops.jaccard_graph(features, k1, k2, max_distance=most, variant=variant))
    expected = ops.knn(features, k1)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scores, expected.scores)
    labels = sharded.dbscan(graph, 0.55, 3)
    assert torch.equal(labels, ops.dbscan(ops_graph(graph), 0.55, 3))


def ops_graph(graph):
    return ops.Graph(graph.indptr, graph.indices, graph.distances, graph.shape, graph.max_distance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    features = people(150).to(dtype)
    graph = sharded.jaccard_graph(features, 8, 3, max_distance=0.7)
    same(graph, ops.jaccard_graph(features, 8, 3, max_distance=0.7))
    queries, targets = people(6), torch.arange(6)
    bank = ShardedMemoryBank(features)
    losses, gradient = with_gradient(
        partial(bank.cross_entropy, targets=targets, scale=9.0), queries, torch.ones(6)
    )
    expected = with_gradient(
        partial(ops.bank_cross_entropy, bank=features, targets=targets, scale=9.0),
        queries,
        torch.ones(6),
    )
    torch.testing.assert_close((losses, gradient), expected, rtol=1e-5, atol=1e-6)
    low = queries.to(dtype).requires_grad_()
    bank.set_contrast(low, targets[:, None], scale=9.0).sum().backward()
    assert low.grad.dtype == dtype
    bank.update(queries, targets)
    ops.memory_update_(features, queries, targets, momentum=0.2)
    assert torch.equal(bank.features, features)


@pytest.mark.parametrize("variant", ["spcl", "jvtc"])
def test_kernels(emulator, variant):
    features = people(60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_graph, "_FETCHED", 300 * DIM)
        patch.setattr(_graph, "_ENTRIES", 1500)
        graph = sharded.jaccard_graph(features, 8, 3, max_distance=0.7, variant=variant)
    same(graph, ops.jaccard_graph(features, 8, 3, max_distance=0.7, variant=variant))


def chain_graph(pairs, size):
    """Pairs at distance 0.5, both ways, and all rows at 0 from themselves."""
    rows = torch.tensor([*pairs, *((b, a) for a, b in pairs), *((i, i) for i in range(size))])
    rows = rows.unique(dim=0)
    distances = torch.where(rows[:, 0] == rows[:, 1], 0.0, 0.5)
    indptr = torch.nn.functional.pad(torch.bincount(rows[:, 0], minlength=size).cumsum(0), (1, 0))
    parts = (indptr, rows[:, 1].int(), distances)
    return sharded.ShardedGraph(*parts, range(size), (size, size))


@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=80),
    st.integers(1, 4),
)
def test_labels_of_any_graph(pairs, samples):
    graph = chain_graph(pairs, 40)
    assert torch.equal(
        sharded.dbscan(graph, 0.5, samples), ops.dbscan(ops_graph(graph), 0.5, samples)
    )


def test_a_long_chain_takes_few_rounds():
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).tolist()
    graph = chain_graph(list(itertools.pairwise(order)), 2000)
    with pytest.MonkeyPatch.context() as patch:
        rounds = []
        patch.setattr(
            _exchange.Exchange, "reduce_", lambda self, what, values, kind: rounds.append(values)
        )
        assert sharded.dbscan(graph, 0.5, 2).eq(0).all()
    assert len(rounds) <= 12


def test_refusals():
    x = people(20)
    for call, message in [
        (lambda: sharded.jaccard_graph(x, variant="ca-jaccard"),
         "sharded.jaccard_graph: variant must be one without cameras, got 'ca-jaccard'"),
        (lambda: sharded.knn(x, 0), "knn: k must be at least 1, got 0"),
        (lambda: sharded.pseudo_labels(x, eps=0.0),
         "sharded.pseudo_labels: eps must lie in (0, 1], got 0.0"),
        (lambda: sharded.dbscan(sharded.jaccard_graph(x, 5, 2, max_distance=0.5), 0.6),
         "sharded.dbscan: eps must be at most 0.5, the graph's max_distance, got 0.6"),
        (lambda: ShardedMemoryBank(x, torch.arange(3)),
         "ShardedMemoryBank: labels must have shape (20,), got (3,)"),
        (lambda: ShardedMemoryBank(x).mine(x[:, :5], 3),
         "ShardedMemoryBank.mine: queries must have shape (20, 16), got (20, 5)"),
        (lambda: ShardedMemoryBank(x).update(x[:2], torch.arange(3)),
         "ShardedMemoryBank.update: features must have shape (3, 16), got (2, 16)"),
        (lambda: ShardedMemoryBank(x).cross_entropy(x, torch.arange(20), scale=1.0, reduce="all"),
         "ShardedMemoryBank.cross_entropy: reduce must be 'row', 'cluster_mean' or 'label_uniform', "
         "got 'all'"),
        (lambda: ShardedMemoryBank(x).set_contrast(
            x, torch.arange(20)[:, None], scale=1.0, denominator="all"),
         "ShardedMemoryBank.set_contrast: denominator must be 'joint' or 'own', got 'all'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


def test_copies_and_foreign_writes():
    bank = ShardedMemoryBank(people(20))
    twin = copy.deepcopy(bank).double().float()
    twin.update(people(1), torch.tensor([2]))
    assert not torch.equal(twin.features, bank.features)
    assert "20 x 16, of them 20 here (0 to 20)" in repr(bank)
    bank.features[3] = 0
    with pytest.raises(RuntimeError) as error:
        bank.mine(people(5), 3)
    assert str(error.value).startswith(
        "ShardedMemoryBank.mine: the rows of this process were written to by something else."
    )
    bank.reset(people(5))
    bank.mine(people(5), 3)


def test_a_folder_of_two_saves(tmp_path):
    bank = ShardedMemoryBank(people(20))
    bank.save(tmp_path)
    (tmp_path / "bank-00001-of-00003.pt").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        bank.load(tmp_path)
    assert str(error.value) == (
        "ShardedMemoryBank.load: folder must hold the files of one save, got "
        "bank-00000-of-00001.pt, bank-00001-of-00003.pt"
    )
    bank.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bank-00000-of-00001.pt"]


def test_on_a_gpu(cuda):
    features = people(5000, 256).to(cuda)
    assert torch.equal(sharded.pseudo_labels(features), ops.pseudo_labels(features))
    bank = ShardedMemoryBank(features)
    queries, targets = features[:40] + 0.1, torch.arange(40, device=cuda)
    assert torch.equal(bank.mine(queries, 9).rows, ops.mine_negatives(queries, features, 9).rows)
    ones = torch.ones(40, device=cuda)
    found = with_gradient(partial(bank.cross_entropy, targets=targets, scale=9.0), queries, ones)
    expected = with_gradient(
        partial(ops.bank_cross_entropy, bank=features, targets=targets, scale=9.0), queries, ones
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_tables_of_the_docs_are_the_model_s(capsys):
    model.main([])
    said = capsys.readouterr().out.splitlines()
    docs = (Path(__file__).parents[1] / "docs/many-gpus.md").read_text().splitlines()
    assert len(said) > 20
    assert [line for line in said if line not in docs] == []


# --- when a process is gone ---------------------------------------------------------------------------

PATIENCE = 2  # seconds


def abandoned(rank, ranks, place, said):
    """The last one dies between two calls or within one, or stops without dying."""
    killed, midway = place.name != "stopped", place.name == "midway"
    join(rank, ranks, place)
    dist.barrier()  # they start at different times
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    bank = ShardedMemoryBank(people(20 + rank), group=group)
    rows = torch.arange(2)
    bank.update(people(2), rows)
    if rank == ranks - 1:
        if midway:
            _graph._sets = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            sharded.pseudo_labels(people(20), group=group)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(4 * PATIENCE)
        os._exit(0)
    began = time.monotonic()
    try:
        if midway:
            sharded.pseudo_labels(people(20), group=group)
        bank.mine(people(5), 3)
        outcome = "no error"
    except RuntimeError as error:
        outcome = str(error)
    said.put((rank, (outcome, time.monotonic() - began)))
    said.close()
    said.join_thread()
    if killed:
        os._exit(0)
    time.sleep(2 * PATIENCE)  # alive, so that the others notice the timeout and nothing else
    os._exit(0)


@pytest.mark.parametrize(
    "ranks, how", [(2, "killed"), (4, "killed"), (4, "midway"), (2, "stopped")]
)
def test_a_lost_process_is_an_error(processes, tmp_path, ranks, how):
    place = tmp_path / how
    place.mkdir()
    found = run(processes, abandoned, ranks, place, 60, expect=ranks - 1)
    for rank, (outcome, seconds) in found.items():
        what = (
            "sharded.jaccard_graph: rounds"
            if how == "midway"
            else "ShardedMemoryBank.mine: queries"
        )
        assert outcome.startswith(
            f"{what} (all_gather) failed on rank {rank} of {ranks}: another rank has ended, or did not come "
            "within the group's timeout: "
        )
        assert seconds < 10 * PATIENCE
        if how == "stopped":
            assert seconds > PATIENCE - 1
