"""fit: it learns, it resumes after any kill as if nothing had been, two processes do what one does."""

import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import runs
import torch

from pyreid import train
from pyreid.data import ReidData
from pyreid.methods import METHODS

NAMES = [name for name in METHODS if name != "gcl"]  # which takes bodies: tests/test_gcl.py


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(found, expected, place=""):
    """Bit for bit, but for what a clock says."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            if key != "seconds":
                assert_same(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, place


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name, tmp_path):
    result = runs.fit(name, tmp_path / "run", epochs=6, steps=20)
    first, last = (entry["evaluation"] for entry in (result.history[0], result.history[-1]))
    assert last["mAP"] > first["mAP"] + 0.03
    assert not result.stopped
    assert [entry["epoch"] for entry in result.history] == list(range(1, 7))
    assert result.evaluation.mAP == last["mAP"]
    assert set(os.listdir(tmp_path / "run")) == {
        *("checkpoint.pt", "last.pt", "best.pt"),
        *("config.json", "metrics.jsonl", "labels.csv"),
    }
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    table = (tmp_path / "run/labels.csv").read_text().splitlines()
    assert table[0] == "image,label"
    assert [int(line.split(",")[1]) for line in table[1:]] == result.labels.tolist()
    settings = json.loads((tmp_path / "run/config.json").read_text())
    assert settings["training"]["steps"] == 20


def test_two_runs_are_the_same():
    one, other = runs.fit("ice", epochs=2), runs.fit("ice", epochs=2)
    assert_same(one.history, other.history)
    assert_same(dict(one.encoder.state_dict()), dict(other.encoder.state_dict()))


def test_workers_change_nothing():
    assert_same(runs.fit("ice", epochs=1).history, runs.fit("ice", epochs=1, workers=2).history)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_moment(name, tmp_path, processes):
    """Ten times: kill -9 at a random moment, again on the way if it comes so, then to the end."""
    expected_at = tmp_path / "unbroken"
    start = time.monotonic()
    whole = processes.Process(target=runs.fit, args=(name, expected_at))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    length = time.monotonic() - start
    expected = checkpoint(expected_at)
    assert expected["epoch"] == 4
    moments = random.Random(len(name))
    broken = 0
    for attempt in range(10 if name == "ice" else 3):
        output = tmp_path / f"killed{attempt}"
        process = processes.Process(target=runs.fit, args=(name, output), kwargs={"resume": True})
        process.start()
        process.join(moments.uniform(0.1, 1) * length)
        process.kill()
        process.join()
        broken += process.exitcode == -signal.SIGKILL
        process = processes.Process(target=runs.fit, args=(name, output), kwargs={"resume": True})
        process.start()
        process.join()
        assert process.exitcode == 0
        assert_same(checkpoint(output), expected)
        assert_same(
            torch.load(output / "best.pt", weights_only=True),
            torch.load(expected_at / "best.pt", weights_only=True),
        )
    assert broken >= 1


def test_killed_after_every_step(tmp_path, monkeypatch):
    """The same, at every write to the disk and in every step, one after another."""
    expected = runs.fit("cluster-contrast", tmp_path / "unbroken", epochs=2, steps=3)
    output = tmp_path / "killed"
    calls, limit = 0, 0

    class Killed(BaseException):
        pass

    original = train._Run.write_text, METHODS["cluster-contrast"].update

    def dying(call):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == limit:
                raise Killed
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(train._Run, "write_text", dying(original[0]))
    monkeypatch.setattr(METHODS["cluster-contrast"], "update", dying(original[1]))
    deaths = 0
    while True:
        calls, limit = 0, limit + 1
        try:
            result = runs.fit("cluster-contrast", output, epochs=2, steps=3, resume=True)
        except Killed:
            deaths += 1
            continue
        break
    assert deaths >= 3
    assert_same(result.history, expected.history)
    assert_same(checkpoint(output), checkpoint(tmp_path / "unbroken"))


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_within_an_epoch(name, tmp_path, monkeypatch):
    """Ctrl-C ends after the step at hand; what is saved goes on to the same end."""
    expected = runs.fit(name, tmp_path / "unbroken", epochs=2)
    cls, steps = METHODS[name], 0
    update = cls.update

    def interrupting(self, batch):
        nonlocal steps
        update(self, batch)
        steps += 1
        if steps == 9:  # the third of the second epoch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cls, "update", interrupting)
    before = signal.getsignal(signal.SIGINT)
    broken = runs.fit(name, tmp_path / "broken", epochs=2)
    assert broken.stopped
    assert signal.getsignal(signal.SIGINT) is before
    saved = checkpoint(tmp_path / "broken")
    assert (saved["epoch"], saved["step"]) == (1, 3)
    result = runs.fit(name, tmp_path / "broken", epochs=2, resume=True)
    assert steps == 12
    assert_same(result.history, expected.history)
    assert_same(checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "unbroken"))


def test_a_second_interrupt_ends_at_once(monkeypatch):
    def twice(self, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(METHODS["ice"], "update", twice)
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.default_int_handler, signal.SIG_IGN):  # and as in the background
            signal.signal(signal.SIGINT, handler)
            with pytest.raises(KeyboardInterrupt):
                runs.fit("ice")
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(runs.fit("ice", epochs=1)))
    thread.start()
    thread.join()
    assert not results[0].stopped


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_do_what_one_does(name, tmp_path, processes):
    alone = runs.fit(name, norm_group=4)
    results = processes.Queue()
    ranks = [
        processes.Process(
            target=runs.fit_as_one_of, args=(rank, 2, tmp_path / "store", name, results)
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = sorted(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    (_, labels, history, weights), (_, other_labels, other_history, other_weights) = found
    assert labels == other_labels == alone.labels.tolist()
    assert weights == other_weights
    for one, other, both in zip(alone.history, history, other_history, strict=True):
        assert other["losses"] == both["losses"]
        for term, value in one["losses"].items():
            assert other["losses"][term] == pytest.approx(value, rel=1e-4), (one["epoch"], term)
        assert other["clusters"] == one["clusters"]
        assert other["evaluation"] == pytest.approx(one["evaluation"], abs=1e-3)


def test_more_epochs_later(tmp_path):
    runs.fit("ice", tmp_path / "run", epochs=2)
    result = runs.fit("ice", tmp_path / "run", epochs=3, resume=True)
    assert len(result.history) == 3
    assert_same(result.history, runs.fit("ice", epochs=3).history)


def test_kept_checkpoints(tmp_path):
    runs.fit("ice", tmp_path / "run", epochs=3, steps=1, keep_every=2)
    names = {name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint")}
    assert names == {"checkpoint.pt", "checkpoint-0002.pt"}


def test_any_data_set_and_any_module():
    class Plain(torch.utils.data.Dataset):
        images = runs.images(range(runs.PEOPLE), seed=0)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, row):
            image, person, camera = self.images[row]
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), person, camera

    torch.manual_seed(0)
    config = METHODS["ice"].Config(instances=2, min_samples=2, k1=8, k2=3)
    result = train.fit(config, runs.Encoder(), Plain(), runs.training(epochs=1))
    assert result.evaluation is None
    assert "evaluation" not in result.history[0]
    assert len(result.labels) == len(Plain())


def test_learning_rate():
    training = runs.training(warmup_epochs=10, step_size=20, gamma=0.1)
    rates = [training.rate_at(epoch) for epoch in (0, 5, 10, 19, 20, 40)]
    assert rates == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.01])


class Rivals(torch.nn.Module):
    """Two networks against each other: `left` follows a target, `right` follows `left`."""

    views = ("plain",)
    config = METHODS["ice"].Config()

    def __init__(self):
        super().__init__()
        self.encoder = self.inference = runs.Encoder()
        self.left = torch.nn.Parameter(torch.zeros(()))
        self.right = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def optimizers(self, training):
        return {
            "left": torch.optim.SGD([self.left], lr=0.5),
            "right": torch.optim.SGD([self.right], lr=training.learning_rate),
        }

    def label(self, features, cameras):
        return torch.arange(len(cameras)) % 3 - 1

    def sampler(self, labels, cameras, *, batch_size, rng):
        rows = np.flatnonzero(labels >= 0)
        while True:
            yield rng.permutation(rows)[:batch_size]

    def phases(self, batch):
        self.seen.append((float(self.left.detach()), float(self.right.detach())))
        yield train.Phase({"left": (self.left - 1) ** 2 / 2}, ("left",))
        # Its step has been taken by now, and what this phase does to `left` is not.
        self.seen.append(float(self.left.detach()))
        yield train.Phase({"right": (self.right - self.left) ** 2 / 2}, ("right",))

    def update(self, batch):
        self.seen.append(float(self.right.detach()))


def test_phases_train_what_they_name_one_after_the_other(tmp_path):
    method, data = Rivals(), runs.data()
    changes = {"batch_size": 8, "learning_rate": 0.5, "step_size": 1, "gamma": 0.5}
    training = runs.training(epochs=2, steps=None, warmup_epochs=0, evaluate_every=0, **changes)
    result = train.fit(method, None, data, training, output=tmp_path)
    # One pass over the images in clusters: two thirds of all.
    steps = int((result.labels >= 0).sum()) // 8
    assert len(method.seen) == 2 * 3 * steps
    left = right = 0.0
    seen = iter(method.seen)
    for step in range(2 * steps):
        rate = 0.5 if step < steps else 0.25  # of both optimisers, by the epoch
        assert next(seen) == pytest.approx((left, right))
        left -= rate * (left - 1)
        assert next(seen) == pytest.approx(left)
        right -= rate * (right - left)
        assert next(seen) == pytest.approx(right)
    assert set(result.history[0]["losses"]) == {"left", "right"}
    resumed = Rivals()
    training = runs.training(epochs=3, steps=None, warmup_epochs=0, evaluate_every=0, **changes)
    train.fit(resumed, None, data, training, output=tmp_path, resume=True)
    assert resumed.seen[0] == pytest.approx((left, right))


def message(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return str(error.value)


def test_errors(tmp_path):
    encoder, data, training = runs.Encoder(), runs.data(), runs.training(epochs=1, steps=1)
    methods = ", ".join(METHODS)
    assert (
        message(train.fit, "icy", encoder, data)
        == f"fit: method must be one of {methods}, got 'icy'"
    )
    assert message(train.fit, 3, encoder, data) == (
        "fit: method must be a name, a Config or a module, got int"
    )
    assert message(train.fit, "ice", None, data) == (
        "fit: encoder must be a module that maps images to features, got None"
    )
    frozen = runs.Encoder().requires_grad_(False)
    assert message(train.fit, "ice", frozen, data, training) == (
        "fit: encoder must have parameters that require a gradient, got none"
    )
    nothing = ReidData("nothing", train=data.train.select([]))
    assert message(train.fit, "ice", encoder, nothing, training) == (
        "fit: data must hold training images, got none"
    )
    assert message(runs.training, steps=0) == "fit: steps must be at least 1, got 0"
    assert message(runs.training, workers=-1) == "fit: workers must not be negative, got -1"
    assert message(runs.fit, "ice", device="gpu") == (
        "fit: device must be cpu, cuda or auto, got 'gpu'"
    )
    runs.fit("ice", tmp_path / "run", epochs=1, steps=1)
    assert message(runs.fit, "ice", tmp_path / "run", epochs=1) == (
        f"fit: output must be a new folder, but {tmp_path / 'run'} holds a run; resume it or name another"
    )
    path = tmp_path / "run/checkpoint.pt"
    assert message(runs.fit, "ice", tmp_path / "run", steps=2, resume=True) == (
        f"{path}: was made with steps 1, got 2; a run goes on with the options it began with"
    )
    path.write_bytes(path.read_bytes()[:100])
    assert message(runs.fit, "ice", tmp_path / "run", epochs=1, steps=1, resume=True).startswith(
        f"{path}: is corrupt or no checkpoint: "
    )


def test_a_loss_that_is_not_finite():
    assert "the loss must stay finite" in message(
        runs.fit, "cluster-contrast", epochs=3, learning_rate=1e30, warmup_epochs=0
    )


def test_too_few_clusters():
    text = message(runs.fit, "ice", batch_size=64)
    assert text.startswith("fit: epoch 1 cannot be trained on its ")
