"""Options are fields of frozen dataclasses: one place gives them a name, a type, a default and a meaning, and
the command line, the files of settings and `help()` follow."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


def option(default: Any, help: str) -> Any:
    """A field with a default and a meaning."""
    return dataclasses.field(default=default, metadata={"help": help})


class Presets:
    """What options have published values by the name of a data set."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # what differs from the defaults

    @classmethod
    def preset(cls: type[T], name: str) -> T:
        """The values that were published for a data set."""
        presets = cls.presets  # type: ignore[attr-defined]
        if name not in presets:
            known = ", ".join(presets)
            raise ValueError(f"Config.preset: name must be one of {known}, got {name!r}")
        return cls(**presets[name])


def add_arguments(parser: argparse.ArgumentParser, cls: type, title: str, *, skip=()) -> None:
    """A flag for every option of a dataclass; one that is not given leaves no trace in the namespace."""
    group = parser.add_argument_group(title)
    for field, kind in _fields(cls):
        if field.name in skip:
            continue
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata.get('help', '')} (default: {_shown(field.default)})"
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **common)
        elif choices := _choices(kind):
            group.add_argument(flag, choices=choices, help=text, **common)
        else:
            name = field.name.split("_")[-1].upper()
            group.add_argument(flag, type=_parser(kind), metavar=name, help=text, **common)


def from_arguments(base: T, arguments: argparse.Namespace) -> T:
    """`base` with the options that were given on the command line."""
    names = {field.name for field in dataclasses.fields(base)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return dataclasses.replace(base, **given)  # type: ignore[type-var]


def to_dict(config: Any) -> dict[str, Any]:
    """An instance as plain values."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def replace(base: T, values: dict[str, Any], where: str) -> T:
    """`base` with `values`, as a file of settings holds them; `where` begins the message of an error."""
    kinds = {field.name: kind for field, kind in _fields(type(base))}
    checked = {}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{where}: {name} must be one of {', '.join(kinds)}")
        checked[name] = _checked(f"{where}: {name}", kinds[name], value)
    return dataclasses.replace(base, **checked)  # type: ignore[type-var]


def read(path: Path) -> dict[str, Any]:
    """A file of settings: JSON, an object of objects."""
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: must hold an object, got {type(settings).__name__}")
    return settings


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _plain(kind: Any) -> tuple[Any, bool]:
    """The type itself, and whether None is allowed."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        return members[0], True
    return kind, False


def _choices(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _parser(kind: Any) -> Any:
    plain, optional = _plain(kind)
    several = typing.get_origin(plain) is tuple
    single = typing.get_args(plain)[0] if several else plain

    def parse(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        return tuple(single(part) for part in text.split(",")) if several else single(text)

    parse.__name__ = f"{single.__name__}s, with commas" if several else single.__name__
    return parse


def _checked(label: str, kind: Any, value: Any) -> Any:
    plain, optional = _plain(kind)
    if value is None and optional:
        return None
    if choices := _choices(plain):
        if value not in choices:
            raise ValueError(f"{label} must be one of {', '.join(choices)}, got {value!r}")
        return value
    if typing.get_origin(plain) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{label} must be a list, got {value!r}")
        return tuple(_checked(label, typing.get_args(plain)[0], item) for item in value)
    accepted = (int, float) if plain is float else plain
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"{label} must be of type {plain.__name__}, got {value!r}")
    return plain(value)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
