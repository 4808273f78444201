"""Replacing what modules hold: now where they are imported, else when they are."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Of these, only the name itself is replaced, and what programs hold of it; not what they use among
# themselves.
_LIBRARIES = ("sklearn",)

_active: list[Patched] = []


class Patched:
    """What `patch` replaced.

    replaced: place -> our object's name; places are "module.name", those that other modules held included.
    waiting: targets whose modules have not been imported yet (or do not have them).
    """

    def __init__(self, project: str, ours: Mapping[str, Any], absent: Iterable[str] = ()):
        self.project = project
        self.replaced: dict[str, str] = {}
        self.waiting = sorted(ours)
        self._ours = dict(ours)
        self._undo: list[tuple[Any, str, Any]] = []  # owner, name, theirs
        self._finder: _Finder | None = _Finder(self, tuple(absent))
        _active.append(self)
        by_id = {id(value) for value in ours.values()}
        # Who has ours by their own import keeps it.
        self._own = {(id(module), name) for module, name, value in _globals() if id(value) in by_id}
        sys.meta_path.insert(0, self._finder)
        self._replace_where_held(self._replace_imported())

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"pyreid.compat: {self.project}"]
        lines += [f"  {place} -> {ours}" for place, ours in self.replaced.items()]
        lines += [
            f"  {target} -> {_name(self._ours[target])}, when imported" for target in self.waiting
        ]
        return "\n".join(lines)

    def say(self) -> None:
        print(self, file=sys.stderr)

    def undo(self) -> None:
        """Puts everything back, in modules that were imported since, too. A second time does nothing."""
        if self._finder is None:
            return
        sys.meta_path.remove(self._finder)
        self._finder.forget()
        self._finder = None
        _active.remove(self)
        # What other patches put in their places stays there.
        shared = {id(ours) for other in _active for ours in other._ours.values()}
        known = [(id(_get(owner, name)), name, theirs) for owner, name, theirs in self._undo]
        of_ours = {ours: theirs for ours, _, theirs in known if ours not in shared}
        by_name = {(ours, name): theirs for ours, name, theirs in known}
        for module, name, value in _globals():
            own = module.__name__.startswith("pyreid.") or (id(module), name) in self._own
            if id(value) in of_ours and not own:
                setattr(module, name, by_name.get((id(value), name), of_ours[id(value)]))
        for owner, name, theirs in reversed(self._undo):
            setattr(owner, name, theirs)
        self._undo.clear()
        self.replaced.clear()
        self.waiting = sorted(self._ours)

    @property
    def reached(self) -> bool:
        """Whether a module of the project itself has been among what was replaced."""
        targets = self._ours.keys() & self.replaced.keys()
        return any(target.split(".")[0] not in _LIBRARIES for target in targets)

    def wants(self, module: str) -> bool:
        return any(target.startswith(module + ".") for target in self.waiting)

    def imported(self, module: str) -> None:
        """A module has just been executed."""
        self._replace_imported(module + ".")

    def _replace_imported(self, prefix: str = "") -> dict[int, tuple[Any, Any]]:
        """Replaces what can be; id of theirs -> (theirs, ours)."""
        done: dict[int, tuple[Any, Any]] = {}
        for target in [target for target in self.waiting if target.startswith(prefix)]:
            owner, name = _owner(target)
            if owner is None or not hasattr(owner, name):
                continue
            theirs, ours = _get(owner, name), self._ours[target]
            self.waiting.remove(target)
            self.replaced[target] = _name(ours)
            if theirs is not ours:
                self._undo.append((owner, name, theirs))
                setattr(owner, name, ours)
                done[id(theirs)] = (theirs, ours)
        return done

    def _replace_where_held(self, done: dict[int, tuple[Any, Any]]) -> None:
        for module, name, value in _globals() if done else ():
            if id(value) not in done or module.__name__.split(".")[0] in _LIBRARIES:
                continue
            theirs, ours = done[id(value)]
            self._undo.append((module, name, theirs))
            setattr(module, name, ours)
            self.replaced[f"{module.__name__}.{name}"] = _name(ours)


class _Finder(importlib.abc.MetaPathFinder):
    """Tells Patched when a module that it waits for has been imported; offers empty stand-ins for absent
    packages."""

    def __init__(self, patched: Patched, absent: tuple[str, ...]):
        self._patched = patched
        self._absent = absent
        self._stand_ins: list[str] = []

    def find_spec(self, fullname, path, target=None):
        wanted = self._patched.wants(fullname)
        if not wanted and fullname not in self._absent:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if wanted and spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._patched)
                return spec
        if fullname not in self._absent:
            return None
        self._stand_ins.append(fullname)
        return importlib.machinery.ModuleSpec(fullname, _StandIn())

    def forget(self) -> None:
        for name in self._stand_ins:
            sys.modules.pop(name, None)


class _Loader(importlib.abc.Loader):
    """Another loader, and word to Patched after it."""

    def __init__(self, loader: Any, patched: Patched):
        self._loader = loader
        self._patched = patched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._patched.imported(module.__name__)


class _StandIn(importlib.abc.Loader):
    """Of a package that is not installed: a module in which nothing can be found."""

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        pass


class _Absent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")


class _Missing:
    """A name of an absent package: may be a default argument, but not be used."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(
            f"{self._name} is called, but {self._name.split('.')[0]} is not installed: pyreid.compat stands "
            f"in for what it replaces, not for this"
        )


def renamed(target: str, package: str) -> str:
    """A target in a package of another name; one in a library stays."""
    first, rest = target.split(".", 1)
    return target if first in _LIBRARIES else f"{package}.{rest}"


def _owner(target: str) -> tuple[Any, str]:
    """(module or class, name) of a target, or (None, name) as long as it is not there."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:length]))
        if module is None:
            continue
        owner: Any = module
        for part in parts[length:-1]:
            # What is there now: getattr would have scikit-learn import its part, in the midst of this.
            owner = getattr(owner, "__dict__", {}).get(part)
        return owner, parts[-1]
    return None, parts[-1]


def _get(owner: Any, name: str) -> Any:
    """What is stored, not what a class makes of it: a staticmethod is to be put back as one."""
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name)


def _globals() -> Iterator[tuple[types.ModuleType, str, Any]]:
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                yield module, name, value


def _name(ours: Any) -> str:
    return f"{ours.__module__}.{ours.__qualname__}"
