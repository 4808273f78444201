"""The benchmarks, at toy size: baselines agree, figures add up, tables, pictures and verdicts are right."""

import dataclasses
import importlib
import json
import sys
import time

import pytest
import torch

from pyreid import cli, ops

try:
    from benchmarks import ablation, compare, cost, growth, page, peers, readme, run, store, timing
except ImportError:  # not in a checkout
    from pyreid.benchmarks import (
        ablation,
        compare,
        cost,
        growth,
        page,
        peers,
        readme,
        run,
        store,
        timing,
    )

TINY = [
    *("--encoder", "small", "--height", "32", "--width", "16", "--device", "cpu"),
    *("--images", "60", "--batch-size", "8", "--test-batch", "32", "--steps", "3"),
]


def cells(table):
    """Label -> the other cells, of the markdown in a text."""
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {label.strip(): [cell.strip() for cell in rest] for label, *rest in rows}


def test_cost(tmp_path, capsys):
    own = {name: getattr(ops, name) for name in cost.STEP_OPS}
    file = tmp_path / "cost.json"
    cost.main([*TINY, "--precision", "float32,bfloat16", "--json", str(file)])
    assert {name: getattr(ops, name) for name in cost.STEP_OPS} == own

    results = json.loads(file.read_text())["results"]
    assert [result["precision"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        assert list(result["parts"]) == list(cost.PARTS)
        idle = [part for part, seconds in result["parts"].items() if not seconds > 0]
        assert idle == ["memory: ops"]  # ICE has no bank that a step changes
        assert sum(result["parts"].values()) == pytest.approx(result["step"])
        assert 0 < result["extract_forward"] < result["extract"]
        assert result["epoch"] > result["extract"] + result["label"] + 2 * result["step"]
        assert result["true_ids"] >= 2
        assert min(result["peak_bytes"].values()) > 2**20

    table = cells(capsys.readouterr().out)
    assert table.pop("") == ["float32", "bfloat16"]
    assert all(len(values) == 2 for values in table.values())
    shown = {label.removeprefix("of it, ") for label in table}
    assert set(cost.PARTS) - shown == {"memory: ops"}
    assert {"ops, of a step", "the epoch, 3 steps", "peak memory, steps"} <= set(table)


def test_cost_finds_what_takes_long(tmp_path, monkeypatch):
    mine = ops.mine_negatives
    long = 0.5  # seconds: more than a busy machine makes of a part that is short

    def slow(*arguments, **options):
        time.sleep(long)
        return mine(*arguments, **options)

    monkeypatch.setattr(ops, "mine_negatives", slow)
    cost.main([*TINY, "--json", str(tmp_path / "cost.json")])
    (result,) = json.loads((tmp_path / "cost.json").read_text())["results"]
    parts = result["parts"]
    assert parts["losses, forward: ops"] > long
    assert cost.ops_seconds(result) > long
    for part in ("losses, forward: rest", "losses, backward: ops", "losses, backward: rest"):
        assert parts[part] < long
    assert result["step_unmarked"] > long


def test_cost_of_cluster_contrast_has_no_teacher(tmp_path, capsys):
    tiny = [argument if argument != "8" else "32" for argument in TINY]
    cost.main([*tiny, "--method", "cluster-contrast"])
    table = cells(capsys.readouterr().out)
    assert "of it, memory: ops" in table
    assert "of it, teacher, forward" not in table
    with pytest.raises(SystemExit):
        cost.main([*TINY, "--steps", "1"])


def test_ablation_makes_the_runs_that_are_missing(tmp_path, capsys):
    output = tmp_path / "runs" / "ablation.jsonl"
    arguments = ["--seeds", "1", "--epochs", "1", "--steps", "2", "--ids", "14", "--test-ids", "4"]
    arguments += ["--output", str(output), "--variants", "ICE", "Cluster Contrast"]
    drawn = ablation.replace(ablation.PEOPLE, ids=14, test_ids=4)
    training = ablation.replace(ablation.TRAINING, epochs=1, steps=2, evaluate_every=1, seed=1)
    figures = {"mAP": 0.123, "rank1": 0.5}
    there = {
        "settings": ablation.settings("ICE", training, drawn),
        "before": figures,
        "after": figures,
        "clusters": {"ari": 0.25},
        "seconds": 7.0,
    }
    output.parent.mkdir()
    output.write_text(json.dumps(there) + "\n")

    ablation.main(arguments)
    shown = capsys.readouterr().out
    assert shown.startswith("  2 of 2: Cluster Contrast, seed 1: mAP ")
    table = cells(shown)
    assert len(table.pop("")) == 7
    assert list(table) == ["ICE", "Cluster Contrast"]
    assert table["ICE"] == ["12.3", "12.3", "50.0", "50.0", "25.0", "1", "7 s"]
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["settings"]["variant"] for record in made] == ["ICE", "Cluster Contrast"]
    assert 0 < made[1]["after"]["mAP"] < 1

    ablation.main(arguments)
    again = capsys.readouterr().out
    assert cells(again).keys() == {"", *table}
    assert len(output.read_text().splitlines()) == 2


def test_ablation_runs_differ_in_what_they_are_called_after():
    training, drawn = ablation.TRAINING, ablation.PEOPLE
    whole = ablation.settings("ICE", training, drawn)["config"]
    for name, changed in (
        ("without the camera term", {"camera_weight": 0.0}),
        ("without the hard instance term", {"hard_weight": 0.0}),
        ("without the soft instance term", {"soft_weight": 0.0}),
        ("ICE on ca-jaccard", {"variant": "ca-jaccard", "eps": 0.5}),
    ):
        assert ablation.settings(name, training, drawn)["config"] == whole | changed


def test_spread():
    assert ablation.spread([0.5]) == "50.0"
    assert ablation.spread([0.1, 0.2, 0.3]) == "20.0 ± 10.0"


# --- ops


def tiny(op):
    """Cases of an op's file as `cases` makes them, at sizes of no interest."""
    bench = importlib.import_module(f"{run.__package__}.bench_{op}")
    half, line = torch.bfloat16, timing.Growth("a line", 90, time=1, memory=0)
    if op == "bank_cross_entropy":
        yield bench.case("cpu", 8, 90, 16, "rows", growth=line)
        yield bench.case("cpu", 8, 90, 16, "labels", "cluster_mean", 20)
        yield bench.case("cpu", 8, 90, 16, "spread", "label_uniform", 20)
        yield bench.case("cpu", 8, 90, 16, "half", dtype=half)
    elif op == "class_means":
        yield bench.case("cpu", 200, 16, 12, 0, "centroids", growth=line)
        yield bench.case("cpu", 200, 16, 12, 3, "proxies", dtype=half)
    elif op == "dbscan":
        yield bench.search("cpu", 150, [0.5, 0.6], line)
        yield bench.dense_search("cpu", 150)
        yield bench.overlap("cpu", 150, verified=True)
        yield bench.rule("cpu", 150)
        yield bench.dense_rule("cpu", 150)
    elif op == "epoch":
        yield bench.step("cpu", "small", (32, 16), 16, 20)
        yield bench.epoch("cpu", "small", (32, 16), 16, images=170, steps=2)
    elif op == "jaccard":
        yield bench.neighbours("cpu", 150, 32, 10, line="a line")
        yield bench.neighbours("cpu", 150, 32, 10, dtype=half)
        yield bench.graph("cpu", 150, 32, 10, 3, line="a line")
        yield bench.dense("cpu", 150, 32, 10, 3)
        yield bench.ranking("cpu", 20, 130, 32, 8, 3)
    elif op == "joint_distance":
        yield bench.histogram("cpu", 60, 3, 8, "a histogram")
        yield bench.distance("cpu", 40, 16, 3, "all to all")
        yield bench.distance("cpu", 10, 16, 3, "a gallery", gallery=30)
    elif op == "labels":
        yield bench.case("cpu", 150, 32, "a line", "a name", k1=10, k2=3)
    elif op == "losses":
        yield bench.ice("cpu", batch=8, proxies=360, dim=16)
    elif op == "memory_update":
        yield bench.case("cpu", 50, 16, 8, 2, "rows", growth=line)
        yield bench.case("cpu", 50, 16, 8, 2, "hardest", repeats="hardest")
        yield bench.case("cpu", 50, 16, 8, 8, "half", loops=False, dtype=half)
    elif op == "negative_mining":
        yield bench.plain("cpu", 8, 90, 16, 5, growth=line)
        yield bench.plain("cpu", 8, 90, 16, 5, dtype=half)
        yield bench.ice("cpu", 8, 90, k=5, dim=16)
        yield bench.scl("cpu", 4, 90, k=7)
    elif op == "ranking":
        yield bench.features("cpu", 9, 300, 16, "features", growth=line)
        yield bench.distances("cpu", 9, 300, "distances")
    elif op == "row_sampling":
        yield bench.case("cpu", 200, 12, 4, 20, "rows", growth=line)
    elif op == "scl":
        yield bench.case("cpu", "few", 600, 3, batch=4)
    elif op == "set_contrast":
        yield bench.case("cpu", 8, 90, 16, 3, 20, "sets", sets=2, growth=line)
        yield bench.case("cpu", 8, 90, 16, 3, 20, "loops", loops=True)
        yield bench.case("cpu", 8, 90, 16, 3, 20, "own", denominator="own", dtype=half)
    else:
        raise AssertionError(f"what are tiny cases of {op}?")


@pytest.mark.parametrize("op", run.op_names())
def test_baselines_agree(op):
    cases = list(tiny(op))
    assert cases
    for case in cases:
        assert case.baselines
        timing.verify(case)
        assert (case.bytes > 0) != (op == "epoch")
        assert set(case.needs) <= {"ours", *case.baselines, *case.bounds}


def test_a_wrong_baseline_is_named():
    (case, *_) = tiny("memory_update")
    wrong = dataclasses.replace(case, baselines={"wrong": lambda state: state[0] + 1})
    with pytest.raises(
        AssertionError, match=r"^memory_update_ E=8 .*: 'wrong' disagrees: Tensor-like"
    ):
        timing.verify(wrong)


CEILINGS = {
    "bytes_per_second": 1e10,
    "flops_per_second": 1e11,
    "matrix_dtype": "float32",
    "rates": {"float32": 1e11},
}


@pytest.fixture
def machine(monkeypatch):
    """Floors that are known, and nothing asked of the machine."""
    monkeypatch.setattr(timing, "known_ceilings", {"cpu": CEILINGS})


def sums(n=1000, **options):
    """A case of no op: rows are added up, by torch and by a loop; ours takes n * 4 KiB of memory."""
    return timing.Case(
        **{
            "op": "sums",
            "size": f"N={n}",
            "device": "cpu",
            "make": lambda: torch.ones(n, 16),
            "ours": lambda x: x.repeat(1, 64).sum() / 64,
            "baselines": {"loop": lambda x: sum(part.sum() for part in x.split(100))},
            "bounds": {"half": lambda x: x[: n // 2].sum()},
            "bytes": 64 * n,
            "flops": 16 * n,
            "growth": timing.Growth("16 columns", n, time=1, memory=1),
        }
        | options
    )


def test_measure(machine):
    result = timing.measure(sums(), budget=0.1)
    record = result.record()
    assert list(record["seconds"]) == ["ours", "loop", "half"]
    for name in record["seconds"]:
        assert 0 < record["seconds"][name] == record["wall_seconds"][name]
        assert record["runs"][name] >= 5
        assert record["spread"][name] >= 0
    assert record["bounds"] == ["half"]
    assert record["floor_seconds"] == pytest.approx(64_000 / 1e10)
    assert record["bound_by"] == "memory"
    assert record["bytes_per_second"] == 64_000 / record["seconds"]["ours"]
    assert record["growth"] == {"line": "16 columns", "n": 1000, "time": 1, "memory": 1}
    assert timing.measure(sums(flops=10**9), budget=0.01).bound_by == "products"


def test_memory_is_the_most_there_was(machine):
    result = timing.measure(sums(20_000), budget=0.01)
    if result.peak["ours"] is None:  # the system does not tell
        return
    assert 75 * 2**20 < result.peak["ours"] < 90 * 2**20
    assert result.peak["half"] < 4 * 2**20


def test_what_does_not_fit_is_left_out_with_the_reason(machine):
    result = timing.measure(sums(needs={"loop": 2**60}), budget=0.01)
    assert list(result.seconds) == ["ours", "half"]
    assert result.left_out["loop"].startswith("needs 1,073,741,824 GiB, ")
    result = timing.measure(sums(), 0.01, 5.0, lambda name: {"loop": 6, "ours": 29}.get(name, 0))
    assert result.left_out == {"loop": "would take 6 s"}
    for case, foretold in ((sums(flops=10**13), 0), (sums(), 31)):
        with pytest.raises(timing.LeftOut, match=r"^would take \d+ s$"):
            timing.measure(case, 0.01, 5.0, lambda name, seconds=foretold: seconds)
    with pytest.raises(timing.LeftOut, match=r"^needs 1,073,741,824 GiB"):
        timing.measure(sums(needs={"ours": 2**60}))


def test_who_fails_is_left_out_with_the_reason(machine):
    def full(_):
        raise RuntimeError("out of memory\nand so on")

    result = timing.measure(sums(baselines={"full": full, "sum": torch.sum}), budget=0.01)
    assert list(result.seconds) == ["ours", "sum", "half"]
    assert result.left_out == {"full": "failed: out of memory"}
    with pytest.raises(RuntimeError, match=r"^out of memory"):
        timing.measure(sums(ours=full), budget=0.01)


def test_slow_contenders_are_run_less_often(machine):
    calls = []

    def slow(x):
        calls.append(x)
        time.sleep(0.06)
        return x.sum()

    case = sums(10, baselines={"slow": slow}, bounds={})
    for budget, more in ((0.001, 0), (0.02, 2), (0.2, 5)):
        calls.clear()
        runs = timing.measure(case, budget).runs["slow"]
        assert len(calls) == 2 + more  # to verify, for memory, and more
        assert runs == (more or 2)  # without more, those two are all that is known


# --- runs


def suite(monkeypatch, *cases):
    """Makes these all there is to run."""
    bench = importlib.import_module(f"{run.__package__}.bench_memory_update")
    monkeypatch.setattr(bench, "cases", lambda device, quick=False: iter([c() for c in cases]))
    monkeypatch.setitem(run.BUDGETS, True, (0.01, 3.0))


def go(tmp_path, **options):
    files = {"json_file": str(tmp_path / "a.json"), "html_file": str(tmp_path / "a.html")}
    status = run.run(["memory_update"], ["cpu"], quick=True, **files | options)
    return status, json.loads((tmp_path / "a.json").read_text())


def test_an_interrupted_run_keeps_its_part_and_goes_on(machine, monkeypatch, tmp_path, capsys):
    made = []

    def interrupt(_):
        raise KeyboardInterrupt

    def counted(n):
        return lambda: sums(n, make=lambda: made.append(n) or torch.ones(n, 16))

    last = [lambda: sums(500, ours=interrupt)]
    suite(monkeypatch, counted(100), counted(300), *last)
    status, content = go(tmp_path)
    assert status == 130
    assert not content["complete"]
    assert [record["size"] for record in content["results"]] == ["N=100", "N=300"]
    assert "(not complete)" in (tmp_path / "a.html").read_text()
    assert capsys.readouterr().err == "\ninterrupted: what was measured is kept\n"

    made.clear()
    suite(monkeypatch, counted(100), counted(300), counted(500))
    status, again = go(tmp_path, resume=True)
    assert status == 0
    assert again["complete"]
    assert again["results"][:2] == content["results"]
    assert set(made) == {500}
    assert list(tmp_path.glob("*.part")) == []

    with pytest.raises(ValueError, match=r"a\.json was made with --quick"):
        run.run([], ["cpu"], json_file=str(tmp_path / "a.json"), resume=True)
    with pytest.raises(ValueError, match="resume needs a file"):
        run.run([], ["cpu"], resume=True)
    monkeypatch.setattr(run, "_commit", lambda: "another")
    with pytest.raises(ValueError, match=r"a.json has commit \S+, this is another"):
        run.run([], ["cpu"], quick=True, json_file=str(tmp_path / "a.json"), resume=True)


def test_one_failure_is_told_and_the_rest_is_measured(machine, monkeypatch, tmp_path, capsys):
    wrong = {"wrong": lambda x: x.sum() + 1}
    suite(
        monkeypatch,
        lambda: sums(100, baselines=wrong),
        lambda: sums(200, needs={"ours": 2**60}),
        lambda: sums(300),
    )
    status, content = go(tmp_path)
    assert status == 1
    assert content["complete"]
    (failed,) = content["failed"]
    assert failed["size"] == "N=100"
    assert "'wrong' disagrees" in failed["reason"]
    (left,) = content["left_out"]
    assert left["size"] == "N=200"
    assert [record["size"] for record in content["results"]] == ["N=300"]
    shown = capsys.readouterr().out
    assert f"{'sums':<18} {'N=100':<58} FAILED: sums N=100: 'wrong' disagrees" in shown
    assert "left out: needs 1,073,741,824 GiB" in shown
    for reason in (failed["reason"].splitlines()[0], left["reason"]):
        assert reason.replace("'", "&#x27;") in (tmp_path / "a.html").read_text()


def test_an_op_whose_baselines_are_not_here_is_left_out(machine, monkeypatch, tmp_path):
    suite(monkeypatch, lambda: sums(100))
    monkeypatch.setitem(run.sys.modules, f"{run.__package__}.bench_dbscan", None)
    file = tmp_path / "a.json"
    assert run.run(["dbscan", "memory_update"], ["cpu"], quick=True, json_file=str(file)) == 0
    content = json.loads(file.read_text())
    assert [record["op"] for record in content["results"]] == ["sums"]
    (left,) = content["left_out"]
    assert left["op"] == "dbscan"
    assert "bench_dbscan" in left["reason"]


def test_no_case_begins_after_the_limit(machine, monkeypatch, tmp_path):
    suite(monkeypatch, lambda: sums(100))
    status, content = go(tmp_path, limit=0.0)
    assert (status, content["complete"], content["results"]) == (0, False, [])
    assert [case["reason"] for case in content["left_out"]] == ["no time was left"]


def test_what_would_take_too_long_is_foretold_by_growth():
    def forecast(n, *known, op="sums", line="a line"):
        suite = run.Suite({}, True, None, None)
        suite.content["results"] += known
        growth = timing.Growth(line, n, time=1.5, memory=1)
        return suite._forecast(sums(n, op=op, growth=growth))("loop")

    small, large = (
        record(1000, op="sums", loop=1.0, ours=9.0),
        record(2000, op="sums", loop=8.0, ours=9.0),
    )
    assert forecast(4000) == 0
    assert forecast(4000, small) == pytest.approx(4**1.5)  # as ours is expected to grow
    assert forecast(4000, large, small) == pytest.approx(64)  # as it has grown
    assert forecast(2000, small, large) == pytest.approx(2**1.5)
    assert forecast(4000, small, op="another") == forecast(4000, small, line="another") == 0
    assert forecast(4000, record(1000, op="sums")) == 0  # it was left out there
    falling = record(2000, op="sums", loop=0.5)
    assert forecast(8000, small, falling) == 0.5


def test_command(machine, monkeypatch, tmp_path, capsys):
    package = importlib.import_module(run.__package__)
    monkeypatch.setitem(sys.modules, "pyreid.benchmarks", package)
    suite(monkeypatch, lambda: sums(100))
    file, html = str(tmp_path / "a.json"), tmp_path / "a.html"
    bench = ["bench", "memory_update", "--quick", "--device", "cpu"]
    assert cli.main([*bench, "--json", file, "--html", str(html)]) == 0
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert cli.main([*bench, "--json", file, "--resume", "--compare", file]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  1 same"
    for more, message in (
        (["--resume"], "resume needs a file: give --json too"),
        (["--compare", str(html)], "a.html is not JSON"),
        (["--compare", str(tmp_path / "none.json")], "No such file"),
    ):
        assert cli.main([*bench, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^pyreid bench: OP must be one of bank_cross_entropy, "):
        cli.main(["bench", "nothing"])
    with pytest.raises(SystemExit):
        cli.main([*bench, "--full"])


# --- what is made of it


def record(n=1000, ours=1.0, spread=0.01, op="an op", **others):
    seconds = {"ours": ours} | {name.replace("_", " "): value for name, value in others.items()}
    return {
        "op": op,
        "size": f"N={n}",
        "device": "cpu",
        "headline": True,
        "whole": False,
        "seconds": seconds,
        "wall_seconds": seconds,
        "spread": dict.fromkeys(seconds, spread),
        "runs": dict.fromkeys(seconds, 5),
        "peak_bytes": dict.fromkeys(seconds, n * 4096),
        "bounds": [],
        "left_out": {},
        "bytes": 1000,
        "flops": 0,
        "bytes_per_second": 1000 / ours,
        "flops_per_second": 0.0,
        "floor_seconds": 0.5,
        "bound_by": "memory",
        "growth": {"line": "a line", "n": n, "time": 2.0, "memory": 1.0},
    }


def content(*records, **machine):
    return {
        "format": store.FORMAT,
        "date": "2026-01-02 03:04",
        "command": "pyreid bench",
        "quick": False,
        "complete": True,
        "machine": {
            "pyreid": "0.1.0",
            "commit": "abc",
            "python": "3.11",
            "torch": "2.15.0",
            "processor": "a processor",
            "cpu_floor": "_cpu",
            "threads": 2,
            "versions": {"torch": "2.15.0", "faiss-cpu": "1.15.1"},
            "ceilings": {"cpu": CEILINGS},
        }
        | machine,
        "results": list(records),
        "left_out": [],
        "failed": [],
    }


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.0, "loop": 10.0}, "same"),
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.5, "loop": 10.0}, "slower"),
        ({"ours": 1.0, "loop": 10.0}, {"ours": 0.7, "loop": 10.0}, "faster"),
        # The machine is half as fast, or busy: so is what runs alongside.
        ({"ours": 1.0, "loop": 10.0}, {"ours": 2.0, "loop": 20.0}, "same"),
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.0, "loop": 5.0}, "slower"),
        # Small changes are nothing; and larger ones are not, where all is noise.
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.07, "loop": 10.0}, "same"),
        ({"ours": 1.0, "loop": 10.0, "spread": 0.1}, {"ours": 1.4, "loop": 10.0}, "slower"),
        ({"ours": 1.0, "loop": 10.0, "spread": 0.2}, {"ours": 1.4, "loop": 10.0}, "same"),
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.4, "loop": 10.0, "spread": 0.2}, "same"),
        # faiss-cpu has another version, so only the loop counts.
        ({"ours": 1.0, "faiss-cpu": 9.0, "loop": 9.0}, {"ours": 1.0, "faiss-cpu": 3.0, "loop": 9.0}, "same"),
        ({"ours": 1.0, "faiss-cpu": 9.0}, {"ours": 1.0, "faiss-cpu": 9.0}, "no baseline"),
        ({"ours": 1.0, "loop": 10.0}, {"ours": 1.0, "another": 10.0}, "no baseline"),
    ],
)  # fmt: skip
def test_verdicts(before, after, kind):
    versions = {"torch": "2.15.0", "faiss-cpu": "1.16"}
    old, new = content(record(**before)), content(record(**after), versions=versions)
    (verdict,) = compare.verdicts(old, new)
    assert verdict.kind == kind
    shown = "\n".join(compare.lines(old, new, [verdict]))
    assert ("times the time it took, beside 'loop'" in shown) == (kind in ("slower", "faster"))
    assert "not compared with: faiss-cpu, which changed version" in shown


def test_the_baseline_with_least_noise_counts():
    before, after = record(loop=10.0, torch=5.0), record(ours=1.3, loop=10.0, torch=10.0)
    after["spread"]["torch"] = 0.4
    (verdict,) = compare.verdicts(content(before), content(after))
    assert verdict == ("an op", "N=1000", "cpu", "slower", 1.3, compare.LEAST, "loop")


def test_compare(machine, monkeypatch, tmp_path, capsys):
    # Microseconds on a busy machine may be told apart by nothing; here they are to be.
    monkeypatch.setattr(compare, "error", lambda *_: 0.01)
    suite(monkeypatch, lambda: sums(100))
    _, old = go(tmp_path)
    old["results"][0]["seconds"]["ours"] /= 1000  # as it never was
    old["results"].append(record(op="an op of old", loop=1.0))
    old["machine"]["processor"] = "another"
    (tmp_path / "old.json").write_text(json.dumps(old))
    capsys.readouterr()
    status, new = go(tmp_path, compare_file=str(tmp_path / "old.json"))
    assert status == 1
    kinds = {verdict["op"]: verdict["kind"] for verdict in new["compared"]["verdicts"]}
    assert kinds == {"sums": "slower", "an op of old": "gone"}
    shown = capsys.readouterr().out
    assert "processor: another then" in shown
    assert shown.splitlines()[-1] == "  1 slower, 1 gone"
    assert '<section id="compared">' in (tmp_path / "a.html").read_text()
    files = [str(tmp_path / name) for name in ("old.json", "a.json")]
    assert compare.main(files) == 1
    assert compare.main(files[1:]) == compare.main([files[0], "none"]) == 2
    assert page.main([files[1], str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_text() == (tmp_path / "a.html").read_text()
    assert page.main(["none", "b.html"]) == 2
    (tmp_path / "old.json").write_text("[]")
    with pytest.raises(ValueError, match=r"old\.json is not a results file"):
        go(tmp_path, compare_file=str(tmp_path / "old.json"))


def test_growth():
    records = [record(n, ours=n**2 / 1e9, loop=n / 1e3) for n in (1000, 2000, 8000)]
    records.append(record(8000, op="alone", ours=1.0))
    line, alone = growth.lines(records)
    assert (line.op, line.name, line.device) == ("an op", "a line", "cpu")
    assert line.exponent("seconds") == pytest.approx(2)
    assert line.exponent("seconds", "loop") == pytest.approx(1)
    assert line.exponent("peak_bytes") == pytest.approx(1)
    assert line.expected == {"seconds": 2.0, "peak_bytes": 1.0}
    assert alone.exponent("seconds") is None
    assert growth.slope([(1000, 3.0), (1000, 4.0)]) is None
    # Under a MiB is not told from nothing.
    (small,) = growth.lines([record(n) for n in (10, 100)])
    assert small.exponent("peak_bytes") is None


def test_page_holds_every_picture():
    records = [
        record(n, ours=n**2 / 1e9, **{"faiss-cpu search": n / 1e3}) for n in (1000, 2000, 8000)
    ]
    records[2]["left_out"] = {"a <loop>": "would take 9 s"}
    records.append(record(100, op="small", torch=1.0))
    records.append(record(200, op="small", torch=2.0))
    told = content(*records)
    drawn = list(page.pictures(told))
    assert [picture.title for picture in drawn] == [
        "Percent of the floor (cpu)",
        "an op: a line (cpu)",
        "small: a line (cpu)",
    ]
    html = page.page(told)
    assert html.count("data:image/png;base64,") == len(drawn)
    for picture in drawn:
        assert f'alt="{picture.title}"' in html
    assert "faiss-cpu 1.15.1 search" in html
    assert "a &lt;loop&gt;" in html
    assert "would take 9 s" in html
    assert "http" not in html.replace("http-equiv", "")
    times, memory = drawn[1].figure.axes
    assert [line.get_label() for line in times.lines][:2] == ["ours", "faiss-cpu 1.15.1 search"]
    assert times.get_xscale() == times.get_yscale() == memory.get_yscale() == "log"


def test_page_without_matplotlib_has_its_tables(monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    html = page.page(content(record(1000, loop=2.0), record(2000, loop=3.0)))
    assert "data:image" not in html
    assert "Pictures need Matplotlib: pip install matplotlib" in html
    assert "<td>loop</td>" in html


def test_readme(tmp_path, monkeypatch, capsys):
    whole = record(op="epoch", published_faiss_cpu=30.0) | {"whole": True, "floor_seconds": 0.0}
    rows = [record(1000, ours=0.5, loop=2.0, part=0.4), record(2000, ours=1.0)]
    rows[0]["bounds"] = ["part"]
    rows[1]["headline"] = False
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content(whole, *rows)))
    readme.main([str(file), "--pictures", str(tmp_path / "pictures")])
    shown = capsys.readouterr().out
    assert shown.startswith(
        "`pyreid bench` on a processor, 2 threads, torch 2.15.0, commit abc, 2026-01-02:"
    )
    lines = shown.splitlines()
    assert "| `an op` | N=1000 | 500 ms | 4 MiB | 100 % | loop | 2 s | 4 MiB | 4.0 |" in lines
    assert "| | | | | | part | 400 ms | 4 MiB | (0.8) |" in lines
    assert (
        "| `epoch` | N=1000 | 1 s | 4 MiB |  | published faiss cpu | 30 s | 4 MiB | 30.0 |" in lines
    )
    assert "| `an op` | a line | 1,000 to 2,000 | 1.00 (2) | 1.00 (1) |" in lines
    assert not any("N=2000" in line for line in lines)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == len(
        list(page.pictures(content(whole, *rows)))
    )

    third = [record(size) for size in (3000, 4000)]  # two of an op are enough for the README
    for each in third:
        each["growth"] = None
    file.write_text(json.dumps(content(whole, *rows, *third)))
    readme.main([str(file)])
    shown = capsys.readouterr().out
    for name in ("README", "DOCS"):
        target = tmp_path / name
        target.write_text(f"before\n{readme.BEGIN}old\n{readme.END}after\n")
        monkeypatch.setattr(readme, name, target)
    readme.main([str(file), "--write"])
    written = (tmp_path / "DOCS").read_text()
    assert written == f"before\n{readme.BEGIN}{shown}{readme.END}after\n"
    assert all(f"N={size}" in written for size in (1000, 3000, 4000))
    short = (tmp_path / "README").read_text()
    assert short.startswith(f"before\n{readme.BEGIN}`pyreid bench`")
    assert short.endswith(f"{readme.END}after\n")
    assert "N=3000" in short
    assert "N=4000" not in short
    assert "Exponents" in written
    assert "Exponents" not in short


def test_libraries_are_told_by_contenders_names():
    known = {"torch": "2.15.0", "faiss-cpu": "1.15.1", "NumPy": "2.3", "scikit-learn": "1.9"}
    for name, libraries, shown in (
        ("product + topk", ["torch"], "product + topk"),
        ("dense torch", ["torch"], "dense torch 2.15.0"),
        ("published: faiss-cpu, NumPy", ["faiss-cpu", "NumPy"], "published: faiss-cpu 1.15.1, NumPy 2.3"),
    ):  # fmt: skip
        assert peers.libraries_of(name) == libraries
        assert peers.with_versions(name, known) == shown
    assert peers.versions()["torch"] == importlib.metadata.version("torch")
