"""How far long work has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from pyreid import distributed

_EVERY = 10.0  # seconds between the lines of a log


class Progress:
    """A context manager on stderr. Bars inside one another stack; a log gets a line every ten seconds and
    none for what takes less.

    Args:
        label: what is being done.
        total: how many units there are, where that is known.
        unit: what one is called.
        done: how many were done before.
        quiet: says nothing, as every process but the first does.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        unit: str = "",
        done: int = 0,
        quiet: bool = False,
    ):
        self.label, self.total, self.unit = label, total, unit
        self.done = self._before = done
        self._bar: Any = None
        self._quiet = quiet or distributed.rank() > 0
        self._start = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return self
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.label,
                unit=f" {self.unit}" if self.unit else "it",
                leave=False,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, **shown: Any) -> None:
        """`count` more units are done; `shown` stands behind the bar."""
        self.done += count
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._quiet or now - self._told < _EVERY:
            return
        self._told = now
        of = f" of {self.total}" if self.total is not None else ""
        values = "".join(f", {name} {_short(value)}" for name, value in shown.items())
        left = ""
        if self.total and self.done > self._before:
            each = (now - self._start) / (self.done - self._before)
            left = f", {each * (self.total - self.done):.0f} s left"
        self.say(
            f"{self.label}: {self.done}{of}{' ' + self.unit if self.unit else ''}{left}{values}"
        )

    def say(self, line: str) -> None:
        """A line of its own, above any bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
