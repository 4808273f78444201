"""Tables of figures, from a results file: `python -m pyreid.benchmarks.readme RESULTS.json`.

In a checkout: `python -m benchmarks.readme`. `--write` puts all of them into docs/figures.md, and the first
two sizes of each op between the README's marks; `--pictures DIR` writes the page's pictures as PNG files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyreid.page import slug

from . import growth, page, peers, store, words

README = Path(__file__).parents[1] / "README.md"
DOCS = Path(__file__).parents[1] / "docs/figures.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def text(content: dict[str, Any], *, most: int | None = None) -> str:
    """The tables, of all ops; with `most`, of so many sizes of each, and no growth."""
    machine, results = content["machine"], content["results"]
    versions = machine.get("versions", {})
    shown: list[dict[str, Any]] = []
    for record in results:
        if record["headline"] and sum(each["op"] == record["op"] for each in shown) != most:
            shown.append(record)
    where = f"{page.machine_name(machine)}, torch {machine['torch']}, commit {machine['commit']}"
    lines = [f"`{content['command']}` on {where}, {content['date'].split()[0]}:", ""]
    for whole, title in ((True, "what of training"), (False, "op")):
        records = [record for record in shown if record["whole"] == whole]
        if records:
            lines += [*table(records, title, versions), ""]
    lines += [
        "Medians; each baseline is checked to agree first, and is torch's where it names no other library.",
        "In parentheses: what computes only a part. Memory: the peak beyond the arguments. Of floor: the",
        "time that a copy, or a matrix product, of the same machine in the same run takes for the least work",
        "there is; what lies in a CPU's cache, or is multiplied in 16-bit integers, goes beyond.",
        "",
        *(growth_table(growth.lines(results)) if most is None else ()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def table(records: Sequence[dict[str, Any]], title: str, versions: dict[str, str]) -> Iterator[str]:
    yield f"| {title} | size | ours | memory | of floor | otherwise | takes | memory | ratio |"
    yield "|---" * 9 + "|"
    for record in records:
        ours, floor, peak = record["seconds"]["ours"], record["floor_seconds"], record["peak_bytes"]
        near = words.share(floor / ours) if floor else ""
        cells = (record["size"], words.duration(ours), words.size(peak["ours"]), near)
        head = f"| `{record['op']}` | {' | '.join(cells)} |"
        others = [item for item in record["seconds"].items() if item[0] != "ours"]
        for name, seconds in others:
            ratio = f"{seconds / ours:.1f}"
            ratio = f"({ratio})" if name in record["bounds"] else ratio
            named = peers.with_versions(name, versions)
            yield f"{head} {named} | {words.duration(seconds)} | {words.size(peak[name])} | {ratio} |"
            head = "| | | | | |"
        for name, reason in record["left_out"].items():
            yield f"{head} {peers.with_versions(name, versions)} | {reason} | | |"
            head = "| | | | | |"
        if head != "| | | | | |":
            yield f"{head} | | | |"


def growth_table(lines: Sequence[growth.Line]) -> Iterator[str]:
    """Of ours, with what it is expected to be in parentheses."""
    if not lines:
        return
    yield "Exponents of N, measured (and expected):"
    yield ""
    yield "| op | line | N | time | memory |"
    yield "|---|---|---|---|---|"
    for line in lines:
        sizes = sorted({n for n, _ in line.points["seconds"]["ours"]})
        told = [
            f"{page.exponent(line.exponent(quantity))} ({line.expected[quantity]:g})"
            for quantity in ("seconds", "peak_bytes")
        ]
        where = line.name if line.device == "cpu" else f"{line.name} ({line.device})"
        yield f"| `{line.op}` | {where} | {sizes[0]:,} to {sizes[-1]:,} | {' | '.join(told)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS.json")
    parser.add_argument("--write", action="store_true", help="to docs/figures.md and README.md")
    parser.add_argument("--pictures", metavar="DIR", help="also write the page's pictures")
    arguments = parser.parse_args(argv)
    try:
        content = store.read(arguments.results)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.write:
        for path, told in ((DOCS, text(content)), (README, text(content, most=2))):
            before, rest = path.read_text(encoding="utf-8").split(BEGIN)
            path.write_text(before + BEGIN + told + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(text(content), end="")
    if arguments.pictures:
        folder = Path(arguments.pictures)
        folder.mkdir(parents=True, exist_ok=True)
        for picture in page.pictures(content):
            (folder / f"{slug(picture.title)}.png").write_bytes(page.png(picture.figure))


if __name__ == "__main__":
    main()
