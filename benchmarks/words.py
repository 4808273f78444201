"""Figures as one reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return "0"


def size(count: int | None) -> str:
    """Of memory. Less than a MiB is not told from nothing."""
    if count is None:
        return "not known"
    if count < 2**20:
        return "< 1 MiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def share(part: float) -> str:
    return f"{100 * part:.0f} %"
