"""Options: dataclass, flags and files agree; what does not fit is refused by name."""

import argparse
import dataclasses
import json
from typing import Literal

import pytest

from pyreid import options
from pyreid.options import option


@dataclasses.dataclass(frozen=True)
class Config:
    count: int = option(3, "how many")
    rate: float = option(0.5, "how fast")
    name: str = option("a", "what it is called")
    kind: Literal["x", "y"] = option("x", "which")
    quick: bool = option(False, "whether")
    limit: int | None = option(None, "at most")
    levels: tuple[float, ...] = option((), "several")


def parse(*flags):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Config, "options")
    return options.from_arguments(Config(), parser.parse_args(flags))


def test_flags():
    assert parse() == Config()
    flags = "--count 4 --rate 1e-3 --name b --kind y --quick --limit 7 --levels 0.1,0.2"
    expected = Config(4, 1e-3, "b", "y", True, 7, (0.1, 0.2))
    assert parse(*flags.split()) == expected
    assert parse("--limit", "none", "--no-quick") == Config()


def test_flags_win_over_a_base():
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Config, "options", skip=("name",))
    base = Config(count=9, name="kept")
    assert options.from_arguments(base, parser.parse_args(["--rate", "2"])) == Config(
        9, 2.0, "kept"
    )


def test_help_has_meanings_and_defaults(capsys):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser, Config, "options")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "how many (default: 3)" in text
    assert "at most (default: none)" in text


@pytest.mark.parametrize(
    "flags, part", [("--count a", "invalid int value"), ("--kind z", "choose from")]
)
def test_flags_that_do_not_fit(flags, part, capsys):
    with pytest.raises(SystemExit):
        parse(*flags.split())
    assert part in capsys.readouterr().err


def test_files_hold_all_of_it(tmp_path):
    config = Config(4, 1, "b", "y", True, 7, (0.1, 0.2))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"it": options.to_dict(config)}))
    assert options.replace(Config(), options.read(path)["it"], str(path)) == config


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"cuont": 3},
            "f: cuont must be one of count, rate, name, kind, quick, limit, levels",
        ),
        ({"count": "3"}, "f: count must be of type int, got '3'"),
        ({"count": True}, "f: count must be of type int, got True"),
        ({"rate": None}, "f: rate must be of type float, got None"),
        ({"kind": "z"}, "f: kind must be one of x, y, got 'z'"),
        ({"levels": 3}, "f: levels must be a list, got 3"),
    ],
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(ValueError) as error:
        options.replace(Config(), values, "f")
    assert str(error.value) == message


def test_files_that_cannot_be_read(tmp_path):
    for content, part in (
        (None, "cannot be read: "),
        ("{", "must be JSON"),
        ("[]", "must hold an object"),
    ):
        path = tmp_path / "config.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(ValueError) as error:
            options.read(path)
        assert str(error.value).startswith(f"{path}: {part}")
