"""A run of the benchmarks in one page that opens from disk: tables, pictures, what was left out and why.

`pyreid bench --html PAGE.html` with a run, or `python -m pyreid.benchmarks.page RESULTS.json PAGE.html` of
one (in a checkout: `benchmarks.page`). Pictures need Matplotlib; without it, the page says so and has its
tables.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from pyreid import page as parts

from . import growth, peers, store, words
from .growth import Line

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
MARKS = "osD^vPX"
FULL = 150  # percent of the floor at which bars end


class Picture(NamedTuple):
    title: str
    figure: Any  # of Matplotlib
    caption: str


def page(content: dict[str, Any]) -> str:
    """The HTML of a results file."""
    results = content["results"]
    versions = content["machine"].get("versions", {})
    sections: dict[str, list[str]] = {"Compared": compared(content.get("compared"))}
    for device in dict.fromkeys(record["device"] for record in results):
        here = [record for record in results if record["device"] == device]
        sections[f"Training, {device}"] = of_records([r for r in here if r["whole"]], versions)
        sections[f"Ops, {device}"] = of_records([r for r in here if not r["whole"]], versions)
    sections["How near the floor"] = shown(floor_pictures(results))
    lines = growth.lines(results)
    sections["Growth"] = growth_table(lines) + shown(growth_pictures(lines, versions))
    sections["Left out"] = reasons(content["left_out"], content["failed"], results)
    sections["What was run"] = machine_tables(content)
    state = "" if content["complete"] else " (not complete)"
    return parts.whole(
        f"pyreid's kernels on {machine_name(content['machine'])}",
        f"{content['date']}, commit {content['machine']['commit']}, {content['command']}{state}",
        "".join(tiles(results)),
        sections,
    )


def machine_name(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['processor']}, {threads} thread{'s' * (threads != 1)}"


def tiles(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield parts.tile("cases", f"{len(results)}", "every baseline agreed")
    best = best_ratios(results)
    if best:
        middle = sorted(best)[len(best) // 2]
        yield parts.tile("times faster", f"{middle:.1f}", "median over cases, of the best baseline")
        behind = sum(ratio < 1 for ratio in best)
        yield parts.tile("cases where a baseline is faster", f"{behind}", f"of {len(best)}")
    near = [r["floor_seconds"] / r["seconds"]["ours"] for r in results if r["floor_seconds"]]
    if near:
        yield parts.tile("of the floor", words.share(sorted(near)[len(near) // 2]), "median")


def best_ratios(results: Sequence[dict[str, Any]]) -> list[float]:
    """The quickest baseline's time in units of ours, of each case that has one. Bounds are no baselines."""
    found = []
    for record in results:
        others = [
            seconds
            for name, seconds in record["seconds"].items()
            if name != "ours" and name not in record["bounds"]
        ]
        if others:
            found.append(min(others) / record["seconds"]["ours"])
    return found


HEAD = ("ours, then others", "time", "ratio", "peak", "GB/s", "TFLOP/s", "of floor", "±", "runs")
NOTE = (
    "Medians. Ratio: how many times ours it takes; in parentheses, what computes only a part, such as the "
    "matrix product alone. Peak: memory beyond the arguments. GB/s and TFLOP/s: of the least work there is; "
    "of floor: the time that a copy, or a matrix product, of this machine in this run takes for it. On a "
    "CPU, what lies in a cache goes beyond the copy's rate, and products of 16-bit integers beyond that of "
    "float32 ones. ±: half the distance between quartiles. What names no library is torch's."
)
CUDA_NOTE = " Time is the device's own; wall: until the result is there, call and launch included."


def of_records(records: Sequence[dict[str, Any]], versions: dict[str, str]) -> list[str]:
    if not records:
        return []
    cuda = records[0]["device"] == "cuda"
    head = [*HEAD[:2], *(["wall"] if cuda else []), *HEAD[2:]]
    rows = [row for record in records for row in of_record(record, versions, cuda)]
    note = NOTE + CUDA_NOTE * cuda
    return [parts.table(head, rows, "bench"), f"<p class=note>{escape(note)}</p>"]


def of_record(
    record: dict[str, Any], versions: dict[str, str], cuda: bool
) -> Iterator[Sequence[str]]:
    ours = record["seconds"]["ours"]
    case = parts.Html(f"<b>{escape(record['op'])}</b> {escape(record['size'])}")
    for name, seconds in record["seconds"].items():
        own = name == "ours"
        ratio = "" if own else f"{seconds / ours:.1f}"
        near = record["floor_seconds"] / ours if own else 0
        yield (
            case if own else peers.with_versions(name, versions),
            words.duration(seconds),
            *([words.duration(record["wall_seconds"][name])] if cuda else []),
            f"({ratio})" if name in record["bounds"] else ratio,
            words.size(record["peak_bytes"][name]),
            f"{record['bytes_per_second'] / 1e9:.1f}" if near else "",
            f"{record['flops_per_second'] / 1e12:.3g}" if near and record["flops"] else "",
            words.share(near) if near else "",
            words.share(record["spread"][name]),
            str(record["runs"][name]),
        )
    for name, reason in record["left_out"].items():
        blanks = [""] * (len(HEAD) - 1 + cuda)
        yield (f"{peers.with_versions(name, versions)}: left out, {reason}", *blanks)


def growth_table(lines: Sequence[Line]) -> list[str]:
    rows = []
    for line in lines:
        sizes = sorted({n for n, _ in line.points["seconds"]["ours"]})
        cells = [parts.Html(f"<b>{escape(line.op)}</b> {escape(line.name)} ({line.device})")]
        cells.append(", ".join(f"{n:,}" for n in sizes))
        for quantity in ("seconds", "peak_bytes"):
            cells += [exponent(line.exponent(quantity)), f"{line.expected[quantity]:g}"]
        rows.append(cells)
        for name in line.points["seconds"]:
            if name != "ours":
                told = [exponent(line.exponent(q, name)) for q in ("seconds", "peak_bytes")]
                rows.append([name, "", told[0], "", told[1], ""])
    if not rows:
        return []
    head = ["ours, then others", "N", "time", "expected", "memory", "expected"]
    note = (
        "Exponents of N, by least squares on logarithmic axes. Small sizes are ruled by what does not grow, "
        "and panels grow until they are full: the expected exponents are those of many rows. A dash: under a "
        "MiB, or fewer than two sizes."
    )
    return [parts.table(head, rows, "bench"), f"<p class=note>{escape(note)}</p>"]


def exponent(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.2f}"


def reasons(left_out: Sequence[dict], failed: Sequence[dict], results: Sequence[dict]) -> list[str]:
    rows = [
        [f"{r['op']} {r['size']} ({r['device']})", "" if r in left_out else "failed", r["reason"]]
        for r in [*failed, *left_out]
    ]
    rows += [
        [f"{record['op']} {record['size']} ({record['device']})", name, reason]
        for record in results
        for name, reason in record["left_out"].items()
    ]
    return [parts.table(["case", "who", "why"], rows, "plain")] if rows else []


def compared(told: dict[str, Any] | None) -> list[str]:
    if not told:
        return []
    counts = Counter(verdict["kind"] for verdict in told["verdicts"])
    note = (
        f"With commit {told['commit']} of {told['date']}: ours, in units of a baseline of the same run. "
        + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    )
    rows = [
        [
            parts.Html(f"<b>{escape(verdict['op'])}</b> {escape(verdict['size'])}"),
            verdict["kind"],
            f"{verdict['change']:.2f}",
            words.share(verdict["noise"]),
        ]
        for verdict in sorted(told["verdicts"], key=lambda v: -v["change"])
        if verdict["kind"] in ("slower", "faster")
    ]
    head = ["case", "", "times as long", "noise"]
    table = [parts.table(head, rows, "bench")] if rows else []
    return [*table, f"<p class=note>{escape(note)}</p>"]


def machine_tables(content: dict[str, Any]) -> list[str]:
    machine = content["machine"]
    names = (
        "processor",
        "threads",
        "cpu_floor",
        "gpu",
        "gpu_memory_gib",
        "python",
        "pyreid",
        "commit",
    )
    rows = [[name, str(machine[name])] for name in names if name in machine]
    rows += [list(item) for item in machine.get("versions", {}).items()]
    for device, ceilings in machine["ceilings"].items():
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["rates"].items())
        rows.append([f"copies, {device}", f"{ceilings['bytes_per_second'] / 1e9:,.1f} GB/s"])
        rows.append([f"matrix products, {device}", f"{rates} TFLOP/s"])
    return [parts.table(None, rows, "plain")]


# --- pictures


def pictures(content: dict[str, Any]) -> Iterator[Picture]:
    """All of a page."""
    yield from floor_pictures(content["results"])
    lines = growth.lines(content["results"])
    yield from growth_pictures(lines, content["machine"].get("versions", {}))


def shown(drawn: Iterator[Picture]) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return ["<p class=note>Pictures need Matplotlib: pip install matplotlib</p>"]
    return [
        parts.figure(
            picture.title,
            "png",
            base64.b64encode(png(picture.figure)).decode(),
            round(picture.figure.get_figwidth() * 100),
            picture.caption,
        )
        for picture in drawn
    ]


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def growth_pictures(lines: Sequence[Line], versions: dict[str, str]) -> Iterator[Picture]:
    """For each line, time and memory against N."""
    for line in lines:
        if len(line.points["seconds"]["ours"]) < 2:
            continue
        yield Picture(
            f"{line.op}: {line.name} ({line.device})",
            growth_figure(line, versions),
            "Dashed: the slope that ours is expected to have. Memory under a MiB is not drawn.",
        )


def growth_figure(line: Line, versions: dict[str, str]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    contenders = list(line.points["seconds"])
    drawn = {
        "seconds": ("time", FuncFormatter(lambda value, _: words.duration(value))),
        "peak_bytes": ("peak memory", FuncFormatter(lambda value, _: words.size(round(value)))),
    }
    for axes, (quantity, (label, formatter)) in zip(
        figure.subplots(1, 2), drawn.items(), strict=True
    ):
        for i, name in enumerate(contenders):
            points = line.points[quantity].get(name, [])
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                color=COLOURS[i % len(COLOURS)],
                marker=MARKS[i % len(MARKS)],
                linewidth=2.2 if name == "ours" else 1.2,
                markersize=5,
                label=peers.with_versions(name, versions),
            )
        if points := line.points[quantity].get("ours"):
            (first, start), (last, _) = points[0], points[-1]
            end = start * (last / first) ** line.expected[quantity]
            axes.plot([first, last], [start, end], color=COLOURS[0], linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="N", title=label)
        if not any(line.points[quantity].values()):
            axes.text(0.5, 0.5, "under a MiB", ha="center", transform=axes.transAxes)
            axes.set_yticks([])
            continue
        every = [value for points in line.points[quantity].values() for _, value in points]
        middle, reach = math.sqrt(min(every) * max(every)), max(1.4 * max(every) / min(every), 16)
        axes.set_yscale("log")  # 16 times at least, so that what is flat looks flat
        axes.set_ylim(middle / math.sqrt(reach), middle * math.sqrt(reach))
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5)) if quantity == "seconds" else LogLocator(base=2, numticks=8)
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(formatter)
        axes.minorticks_off()
        axes.set_xticks(sorted({n for n, _ in line.points["seconds"]["ours"]}))
        axes.tick_params(axis="x", labelrotation=30, labelsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


def floor_pictures(results: Sequence[dict[str, Any]]) -> Iterator[Picture]:
    for device in dict.fromkeys(record["device"] for record in results):
        records = [
            r for r in results if r["device"] == device and r["floor_seconds"] and r["headline"]
        ]
        if records:
            yield Picture(
                f"Percent of the floor ({device})",
                floor_figure(records),
                "100 %: as fast as copying, or multiplying, the least that must be.",
            )


def floor_figure(records: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.9 + 0.24 * len(records)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    shares = [100 * r["floor_seconds"] / r["seconds"]["ours"] for r in records]
    colours = [COLOURS[record["bound_by"] == "products"] for record in records]
    axes.barh(range(len(records)), [min(value, FULL) for value in shares], color=colours)
    axes.set_yticks(range(len(records)), [f"{r['op']}: {r['size']}" for r in records], fontsize=7)
    axes.axvline(100, color="black", linewidth=1)
    for place, value in enumerate(shares):
        axes.text(min(value, FULL) + 1, place, f"{value:.0f}", va="center", fontsize=7)
    for colour, label in (
        (COLOURS[0], "of the copy's rate"),
        (COLOURS[1], "of the product's rate"),
    ):
        axes.barh([0], [0], color=colour, label=label)
    axes.legend(fontsize=8, loc="lower right")
    axes.set(xlabel="percent", xlim=(0, FULL + 10), ylim=(len(records) - 0.4, -0.6))
    axes.grid(alpha=0.3, axis="x")
    return figure


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2:
        print("usage: page RESULTS.json PAGE.html", file=sys.stderr)
        return 2
    try:
        store.write(argv[1], page(store.read(argv[0])))
    except (ValueError, OSError) as error:
        print(f"page: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
