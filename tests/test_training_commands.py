"""`pyreid synth`, `train`, `eval`, `extract` and `visualize`, from made-up images on disk to a report."""

import json

import numpy as np
import pytest
import torch

from pyreid import train
from pyreid.cli import main
from pyreid.commands import training

SMALL = [
    *("--encoder", "small", "--weights", "random", "--height", "64", "--width", "32"),
    *("--k1", "8", "--k2", "2", "--min-samples", "2", "--norm-group", "none", "--device", "cpu"),
]
SHORT = ["--epochs", "1", "--steps", "2", "--batch-size", "8", "--instances", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("people")


@pytest.fixture(scope="module")
def market(place):
    people = ["--ids", "8", "--test-ids", "4", "--cameras", "3", "--gap", "0"]
    assert main(["synth", str(place / "drawn"), *people, "--sheet", str(place / "sheet.png")]) == 0
    assert (place / "sheet.png").stat().st_size > 10_000
    return str(place / "drawn")


@pytest.fixture(scope="module")
def run(place, market):
    folder = place / "run"
    assert main(["train", "--data", market, "-o", str(folder), *SMALL, *SHORT]) == 0
    return folder


def error(capsys, *arguments):
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_a_run_leaves(run, capsys):
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("checkpoint.pt", "last.pt", "best.pt", "report.html"),
        *("config.json", "metrics.jsonl", "labels.csv"),
    }
    settings = json.loads((run / "config.json").read_text())
    assert settings["method_name"] == "ice"
    assert settings["method"]["k1"] == 8
    assert settings["training"]["learning_rate"] == 3.5e-4
    assert settings["network"]["encoder"] == "small"


def test_a_config_file_is_a_run(run, place, capsys):
    """The same options from the file: bit for bit the same weights."""
    again = place / "again"
    assert main(["train", "--config", str(run / "config.json"), "-o", str(again)]) == 0
    printed = capsys.readouterr().out
    assert "before training" in printed
    assert f"report:  {again / 'report.html'}" in printed
    one, other = (torch.load(each / "last.pt", weights_only=True) for each in (run, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_going_on(run, market, place, capsys):
    flags = ["train", "--data", market, "-o", str(run), *SMALL, *SHORT]
    assert error(capsys, *flags) == (
        f"pyreid train: fit: output must be a new folder, but {run} holds a run; "
        "resume it or name another"
    )
    assert main([*flags, "--epochs", "2", "--resume"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_interrupted(market, place, monkeypatch, capsys):
    folder = place / "interrupted"
    flags = ["train", "--data", market, "-o", str(folder), *SMALL, *SHORT]
    monkeypatch.setattr(train, "_interruptible", lambda: _after(1))
    assert main(flags) == 130
    assert f"--output {folder} --resume" in capsys.readouterr().out
    monkeypatch.undo()
    assert main([*flags, "--resume"]) == 0


class _after:
    """Notes an interrupt when it is asked for the n-th time."""

    def __init__(self, times):
        self.left = times

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_evaluation(run, market, place, capsys):
    figures = place / "figures.json"
    weights = str(run / "best.pt")
    assert main(["eval", weights, "--data", market, "--rerank", "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert "re-ranked" in printed
    found = json.loads(figures.read_text())
    assert 0 < found["mAP"] <= 1
    assert found["reranked"]["queries"] == found["queries"]
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["mAP"] == max(entry["evaluation"]["mAP"] for entry in history)


def test_features_for_the_other_commands(run, market, place, capsys):
    output = place / "features.npz"
    assert main(["extract", str(run / "last.pt"), "--data", market, "-o", str(output)]) == 0
    arrays = np.load(output)
    assert set(arrays) == {"features", "names", "ids", "cameras"}
    np.testing.assert_allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-5)
    assert len(set(arrays["names"])) == len(arrays["ids"])
    labels = str(place / "labels.npy")
    assert main(["cluster", str(output), "-o", labels, "--k1", "8", "--ids-key", "ids"]) == 0


def test_pictures(run, market, place, capsys):
    folder = place / "pictures"
    arguments = ["visualize", str(run / "last.pt"), "--data", market, "-o", str(folder)]
    assert main([*arguments, "--rerank"]) == 0
    assert (folder / "report.html").exists()
    assert len(list(folder.glob("*.png"))) >= 3


@pytest.mark.parametrize("method", ["ice", "cluster-contrast"])
def test_a_folder_of_crops(method, market, place, capsys):
    """Nothing is known of them; then the camera, by a pattern."""
    crops = f"{market}/bounding_box_train"
    for name, flags in (("plain", []), ("cameras", ["--camera-pattern", r"_c(\d+)"])):
        folder = str(place / f"{method}-{name}")
        arguments = ["train", "--images", crops, *flags, "--method", method, "-o", folder]
        assert main([*arguments, *SMALL, *SHORT]) == 0
        printed = capsys.readouterr()
        assert "mAP" not in printed.err
    table = (place / f"{method}-cameras/labels.csv").read_text().splitlines()
    assert table[0] == "image,label"
    assert table[1].startswith("0001_c")


def test_made_up_people_and_a_preset(place):
    folder = str(place / "preset")
    flags = ["train", "--people", "8", "--method", "cluster-contrast", "--preset", "msmt17"]
    assert main([*flags, "-o", folder, *SMALL, *SHORT]) == 0
    settings = json.loads((place / "preset/config.json").read_text())
    assert settings["training"]["step_size"] == 20
    assert settings["network"]["pooling"] == "gem"
    assert settings["data"] == {"people": 8}


def test_errors(run, market, place, capsys, monkeypatch):
    assert main(["train", "--data", str(place / "nowhere")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"pyreid train: open_data: {place / 'nowhere'} does not exist"
    text = error(capsys, "train", "--data", market, "--camera-pattern", "c")
    assert text == "pyreid train: --camera-pattern and --id-pattern: only with --images"
    new = ["-o", str(place / "new")]
    text = error(capsys, "train", "--data", market, *new, *SMALL, *SHORT, "--eps", "2")
    assert text == "pyreid train: Config: eps must lie in (0, 1], got 2.0"
    text = error(capsys, "train", "--data", market, *new, *SMALL, "--steps", "0")
    assert text == "pyreid train: fit: steps must be at least 1, got 0"
    text = error(capsys, "train", "--data", market, *new, *SMALL, "--preset", "mars")
    assert text.startswith("pyreid train: Config.preset: name must be one of market1501, ")
    text = error(capsys, "eval", f"{run}/config.json", "--data", market)
    assert text.startswith(f"pyreid eval: {run}/config.json: ")
    text = error(capsys, "eval", str(run / "last.pt"), "--images", f"{market}/query")
    assert "must have query and gallery images" in text
    text = error(
        capsys, "extract", str(run / "last.pt"), "--images", f"{market}/query", "-o", "x.txt"
    )
    assert text == "pyreid extract: x.txt: name must end in .npy or .npz"
    assert not (place / "new").exists()


def test_help_tells_defaults(capsys):
    for arguments, part in (
        (["train", "--help"], "DBSCAN (default: 0.55)"),
        (["train", "--method", "cluster-contrast", "--help"], "of ClusterNCE (default: 0.05)"),
        (["synth", "--help"], "people to train on (default: 100)"),
        (["eval", "--help"], "--rerank"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert part in " ".join(capsys.readouterr().out.split())


def test_tensorboard(market, place):
    folder = place / "board"
    flags = ["train", "--data", market, "-o", str(folder), *SMALL, *SHORT, "--tensorboard"]
    assert main(flags) == 0
    assert list((folder / "tensorboard").glob("events*"))


def test_processes_of_torchrun(monkeypatch):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    training._join_processes("cpu")
    assert asked == ["gloo"]
