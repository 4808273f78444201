"""The benchmark of other projects' functions, at toy size: both sides agree, and every pair has a row."""

import json

try:
    from benchmarks import compat
except ImportError:  # not in a checkout
    from pyreid.benchmarks import compat


def test_every_pair(tmp_path, capsys):
    file = tmp_path / "compat.json"
    options = ["--dim", "64", "--seconds", "0.001", "--json", str(file)]
    compat.main(["--sizes", "204", *options])
    results = json.loads(file.read_text())["results"]
    found = {result["project"] for result in results}
    assert found == {"spcl", "cluster_contrast", "ice", "gcl", "mmt", "openunreid"}
    assert all(result["ours"] > 0 and result["theirs"] > 0 for result in results)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(results)
    compat.main(["--sizes", "204", "--projects", "ice", *options])
    assert {each["project"] for each in json.loads(file.read_text())["results"]} == {"ice"}
