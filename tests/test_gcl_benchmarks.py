"""The benchmarks of GCL, at toy size."""

import json

import pytest

try:
    from benchmarks import gcl_cost, gcl_table
except ImportError:  # not in a checkout
    from pyreid.benchmarks import gcl_cost, gcl_table


def rows(printed):
    """Of the markdown in a text: the cells of each line but the head."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:2] == "| "]
    return lines[1:]


def test_cost_of_a_step(capsys):
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
    assert [row[0] for row in rows(printed)] == [
        f"stage {line['stage']}, {line['precision']}" for line in lines
    ]
    with pytest.raises(SystemExit):
        gcl_cost.main(["--steps", "1"])


def test_table_of_seeds(tmp_path, capsys, monkeypatch):
    calls = []
    run = {
        **{name: {"mAP": 0.25, "rank1": 0.5} for name in ("untrained", "stage 1", "stage 3")},
        "views": dict.fromkeys(("generated, body", "copied, body", "generated", "copied"), 0.4),
        "wall": 12.0,
    }

    def measured(data, drawn, seed, epochs):
        calls.append((seed, epochs))
        return run | {"seed": seed}

    monkeypatch.setattr(gcl_table, "measured", measured)
    monkeypatch.setattr(gcl_table.demo, "bodied", lambda data, drawn: data)
    few = ["--ids", "2", "--test-ids", "1", "--output", str(tmp_path / "runs.jsonl")]
    for _ in range(2):  # the second time it reads
        gcl_table.main([*few, "--seeds", "2", "--epochs", "1"])
        found = rows(capsys.readouterr().out)
        assert [row[0] for row in found] == ["1", "2", "all"]
        assert found[-1][1:3] == ["25.0 ± 0.0", "25.0 ± 0.0"]
    assert calls == [(1, 1), (2, 1)]
    gcl_table.main([*few, "--seeds", "1"])
    assert calls[2:] == [(1, None)]
