"""Is ours slower than it was? Two results files, by ratio to baselines that ran alongside.

`pyreid bench --compare OLD.json` with a run, or `python -m pyreid.benchmarks.compare OLD.json NEW.json`
without (in a checkout: `benchmarks.compare`). Machines change from run to run, and how busy they are; so ours
is divided by a baseline of the same run, and it is that ratio that is compared. Of several baselines, the one
that the runs measured best counts. A change is told from noise by the errors of all four medians.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import peers, store

LEAST = 0.1  # relative changes below this are nothing, however little the spread
SIGMAS = 2.5


class Verdict(NamedTuple):
    op: str
    size: str
    device: str
    kind: str  # "slower", "faster", "same", "no baseline", "gone" or "new"
    change: float = 1.0  # of ours in units of the baseline: 2 is twice as slow
    noise: float = 0.0  # relative: changes up to it are not told from noise
    baseline: str = ""


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> list[Verdict]:
    before = {(r["device"], r["op"], r["size"]): r for r in old["results"]}
    after = {(r["device"], r["op"], r["size"]): r for r in new["results"]}
    changed = changed_libraries(old, new)
    found = []
    for case in dict.fromkeys([*before, *after]):
        device, op, size = case
        if case in before and case in after:
            found.append(_verdict(before[case], after[case], changed))
        else:
            found.append(Verdict(op, size, device, "gone" if case in before else "new"))
    return found


def changed_libraries(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    was, now = (content["machine"].get("versions", {}) for content in (old, new))
    return {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}


def _verdict(before: dict[str, Any], after: dict[str, Any], changed: set[str]) -> Verdict:
    where = before["op"], before["size"], before["device"]
    candidates = []
    for name in before["seconds"]:
        # What another version of a library takes says nothing of ours.
        if name == "ours" or name not in after["seconds"]:
            continue
        if changed.intersection(peers.libraries_of(name)):
            continue
        noise = SIGMAS * math.hypot(
            *(error(r, contender) for r in (before, after) for contender in ("ours", name))
        )
        ratios = [r["seconds"]["ours"] / r["seconds"][name] for r in (before, after)]
        candidates.append((max(noise, LEAST), ratios[1] / ratios[0], name))
    if not candidates:
        return Verdict(*where, "no baseline")
    noise, change, name = min(candidates)
    kind = "slower" if change > 1 + noise else "faster" if change < 1 / (1 + noise) else "same"
    return Verdict(*where, kind, change, noise, name)


def error(record: dict[str, Any], contender: str) -> float:
    """The relative standard error of a median, as if samples were normal: half the distance between quartiles
    is 0.67 of their deviation, and the median's own is 1.25 of that over the root of their number."""
    return 1.25 / 0.67 * record["spread"][contender] / math.sqrt(record["runs"][contender])


def lines(old: dict[str, Any], new: dict[str, Any], found: Sequence[Verdict]) -> Iterator[str]:
    yield f"Compared with {old['machine']['commit']} of {old['date']}, by ratio to a baseline of each run:"
    for note in notes(old, new):
        yield f"  ({note})"
    for verdict in found:
        if verdict.kind in ("slower", "faster"):
            yield f"  {verdict.kind:<7} {verdict.op} {verdict.size} ({verdict.device}): {detail(verdict)}"
    counts = {
        kind: sum(v.kind == kind for v in found) for kind in dict.fromkeys(v.kind for v in found)
    }
    yield "  " + ", ".join(f"{count} {kind}" for kind, count in counts.items())


def detail(verdict: Verdict) -> str:
    return (
        f"{verdict.change:.2f} times the time it took, beside '{verdict.baseline}' "
        f"(noise up to {verdict.noise:.0%})"
    )


def notes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for key in ("processor", "threads", "gpu"):
        was, now = old["machine"].get(key), new["machine"].get(key)
        if was != now:
            yield f"{key}: {was} then, {now} now; ratios may differ for that alone"
    if changed := changed_libraries(old, new):
        yield f"not compared with: {', '.join(sorted(changed))}, which changed version"


def told(old: dict[str, Any], found: Sequence[Verdict]) -> dict[str, Any]:
    """For a results file and its page."""
    return {
        "commit": old["machine"]["commit"],
        "date": old["date"],
        "verdicts": [verdict._asdict() for verdict in found],
    }


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: compare OLD.json NEW.json", file=sys.stderr)
        return 2
    try:
        old, new = (store.read(file) for file in argv)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    found = verdicts(old, new)
    print("\n".join(lines(old, new, found)))
    return int(any(verdict.kind == "slower" for verdict in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
