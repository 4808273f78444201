"""The benchmark of supervised projects' functions, at toy size: both sides agree; every project has a row."""

import json

try:
    from benchmarks import compat_supervised
except ImportError:  # not in a checkout
    from pyreid.benchmarks import compat_supervised


def test_every_pair(tmp_path, monkeypatch):
    single_shot = compat_supervised.single_shot
    monkeypatch.setattr(compat_supervised, "single_shot", lambda *_: single_shot(20, 200))
    file = tmp_path / "compat.json"
    options = ["--sizes", "204", "--dim", "64", "--seconds", "0.001", "--json", str(file)]
    compat_supervised.main(options, compat_supervised.pairs)
    results = json.loads(file.read_text())["results"]
    assert {result["project"] for result in results} == {
        *("torchreid", "fast_reid", "strong_baseline", "person_reid_baseline"),
        *("pytorch_metric_learning", "open_metric_learning", "lightly"),
    }
    assert all(result["ours"] > 0 and result["theirs"] > 0 for result in results)
