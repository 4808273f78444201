"""The benchmarks of training, at toy size: their figures add up, their tables have the right shape."""

import json
import time

import pytest

from pyreid import ops

try:
    from benchmarks import ablation, cost, gcl_cost, gcl_table
except ImportError:  # not in a checkout
    from pyreid.benchmarks import ablation, cost, gcl_cost, gcl_table

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

    def slow(*arguments, **options):
        time.sleep(0.05)
        return mine(*arguments, **options)

    monkeypatch.setattr(ops, "mine_negatives", slow)
    cost.main([*TINY, "--json", str(tmp_path / "cost.json")])
    (result,) = json.loads((tmp_path / "cost.json").read_text())["results"]
    parts = result["parts"]
    assert parts["losses, forward: ops"] > 0.05
    assert cost.ops_seconds(result) > 0.05
    for part in ("losses, forward: rest", "losses, backward: ops", "losses, backward: rest"):
        assert parts[part] < 0.05
    assert result["step_unmarked"] > 0.05


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


def test_gcl_cost(capsys):
    tiny = ["--encoder", "small", "--height", "32", "--width", "16", "--device", "cpu"]
    tiny += ["--images", "24", "--ids", "6", "--batch-size", "4", "--steps", "2"]
    tiny += ["--generator-width", "1", "--discriminator-width", "2"]
    gcl_cost.main(tiny)
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"stage"')]
    assert [(line["stage"], line["precision"]) for line in lines] == [
        (stage, precision) for stage in "23" for precision in ("float32", "bfloat16")
    ]
    assert all(line["seconds"] > 0 for line in lines)
    assert len(cells(printed)) == 1 + len(lines)
    with pytest.raises(SystemExit):
        gcl_cost.main(["--steps", "1"])


def test_gcl_table(tmp_path, capsys, monkeypatch):
    calls = []
    run = {
        "seed": 1,
        **{name: {"mAP": 0.25, "rank1": 0.5} for name in ("untrained", "stage 1", "stage 3")},
        "views": dict.fromkeys(("generated, body", "copied, body", "generated", "copied"), 0.4),
        "wall": 12.0,
    }

    def measured(data, drawn, seed, epochs):
        calls.append((seed, epochs))
        return run | {"seed": seed}

    monkeypatch.setattr(gcl_table, "measured", measured)
    monkeypatch.setattr(gcl_table.demo, "bodied", lambda data, drawn: data)
    few = [
        "--seeds",
        "2",
        "--ids",
        "2",
        "--test-ids",
        "1",
        "--output",
        str(tmp_path / "runs.jsonl"),
    ]
    for _ in range(2):  # the second time it reads
        gcl_table.main([*few, "--epochs", "1"])
        assert cells(capsys.readouterr().out)["all"][:2] == [" 25.0 ± 0.0".strip(), "25.0 ± 0.0"]
    assert calls == [(1, 1), (2, 1)]
    gcl_table.main([*few, "--seeds", "1"])
    assert calls[2:] == [(1, None)]
