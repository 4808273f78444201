"""Writes the README's table of figures from a results file: `python benchmarks/figures.py FILE.json`."""

import json
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def duration(seconds):
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def table(results):
    machine = results["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    yield f"`pyreid bench --quick` on {where}:"
    yield ""
    yield "| op | size | ours | otherwise | ratio |"
    yield "|---|---|---|---|---|"
    for record in results["results"]:
        ours = record["seconds"]["ours"]
        for i, (name, seconds) in enumerate(list(record["seconds"].items())[1:]):
            head = (
                f"| `{record['op']}` | {record['size']} | {duration(ours)}" if i == 0 else "| | |"
            )
            yield f"{head} | {name}: {duration(seconds)} | {seconds / ours:.1f} |"


def main():
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = "\n".join(table(json.loads(Path(sys.argv[1]).read_text())))
    README.write_text(before + BEGIN + lines + "\n" + END + after)


if __name__ == "__main__":
    main()
