"""Progress: silent when short, a line now and then in a log, a bar on a terminal."""

import sys

import pytest

from pyreid import progress


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_of_a_log(clock, capsys):
    with progress.Progress("epoch 1", 40, unit="steps") as shown:
        for _ in range(40):
            clock.now += 1
            shown.advance(loss=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "epoch 1: 10 of 40 steps, 30 s left, loss 0.1235",
        "epoch 1: 20 of 40 steps, 20 s left, loss 0.1235",
        "epoch 1: 30 of 40 steps, 10 s left, loss 0.1235",
        "epoch 1: 40 of 40 steps, 0 s left, loss 0.1235",
    ]


def test_what_is_short_or_quiet_says_nothing(clock, capsys):
    with progress.Progress("short", 2) as shown:
        clock.now += 9
        shown.advance(2)
    with progress.Progress("quiet", 2, quiet=True) as shown:
        clock.now += 99
        shown.advance(2)
        shown.say("nothing")
    assert capsys.readouterr().err == ""


def test_an_unknown_total(clock, capsys):
    with progress.Progress("reading") as shown:
        clock.now += 11
        shown.advance(5)
    assert capsys.readouterr().err == "reading: 5\n"


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress("epoch 1", 4, unit="steps") as shown:
        shown.advance(4, loss=0.5)
        shown.say("a line above")
    text = capsys.readouterr().err
    assert "epoch 1: 100%" in text
    assert "a line above" in text
