"""What GCL's stages do for made-up people: retrieval after each, and how good generated views are.

`python -m benchmarks.gcl_table` in a checkout, `python -m pyreid.benchmarks.gcl_table` elsewhere. It trains
what `pyreid demo --method gcl` trains, once for each seed. Each run's result is a line of JSON in --output: a
command that was stopped goes on where it was, and one that is repeated only prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from pyreid import demo, options, people
from pyreid.evaluation import as_dict

FIGURES = ("mAP", "rank1")


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    drawn = dataclasses.replace(demo.PEOPLE, ids=arguments.ids, test_ids=arguments.test_ids)
    output = Path(arguments.output)
    lines = output.read_text().splitlines() if output.exists() else []
    known = [json.loads(line) for line in lines]
    done = []
    data = None
    for seed in range(1, arguments.seeds + 1):
        wanted = json.loads(json.dumps(settings(seed, drawn, arguments.epochs)))
        record = next((each for each in known if each["settings"] == wanted), None)
        if record is None:
            data = data or demo.bodied(people.people_data(drawn, quiet=True), drawn)
            record = {"settings": wanted, **measured(data, drawn, seed, arguments.epochs)}
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as file:
                file.write(json.dumps(record) + "\n")
        print(json.dumps({name: record[name] for name in record if name != "settings"}), flush=True)
        done.append(record)
    print("\n" + "\n".join(table(done)))


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs, with seeds 1, 2, ...")
    parser.add_argument("--output", metavar="FILE", default="runs/gcl-table.jsonl")
    parser.add_argument("--epochs", type=int, default=None, help="of every stage; default: its own")
    parser.add_argument("--ids", type=int, default=demo.PEOPLE.ids, help="people to train on")
    parser.add_argument("--test-ids", type=int, default=demo.PEOPLE.test_count, help="others")
    return parser.parse_args(argv)


def settings(seed: int, drawn: people.People, epochs: int | None) -> dict[str, Any]:
    """All that a run depends on."""
    return {
        "seed": seed,
        "epochs": epochs,
        "people": options.to_dict(drawn),
        "warmup": options.to_dict(demo.WARMUP),
        "gcl": options.to_dict(demo.GCL_CONFIG),
        "trainings": {
            str(stage): options.to_dict(each) for stage, each in demo.GCL_TRAININGS.items()
        },
    }


def measured(data: Any, drawn: people.People, seed: int, epochs: int | None) -> dict[str, Any]:
    start = time.perf_counter()
    changes = {} if epochs is None else {"epochs": epochs}
    found = demo.trained_in_stages(data, seed, None, **changes)
    if found[max(found)].result.stopped:
        raise KeyboardInterrupt
    evaluations = {
        "untrained": found[1].result.before,
        "stage 1": found[1].result.evaluation,
        "stage 3": found[3].result.evaluation,
    }
    return {
        "seed": seed,
        **{
            name: {figure: as_dict(each)[figure] for figure in FIGURES}
            for name, each in evaluations.items()
        },
        "views": demo.turned_views(found[3].method, drawn).figures(),
        "clusters": found[3].result.history[-1]["clusters"],
        "seconds": {
            str(stage): sum(sum(entry["seconds"].values()) for entry in each.result.history)
            for stage, each in found.items()
        },
        "wall": time.perf_counter() - start,
    }


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: each seed, then mean and standard deviation."""
    lines = [
        "| seed | mAP untrained | stage 1 | stage 3 | rank-1 stage 1 | stage 3 | SSIM on the body, views "
        "| photo as it is | whole picture, views | photo as it is | s |",
        "|" + "---|" * 11,
    ]
    rows = []
    for record in records:
        views = record["views"]
        rows.append(
            [100 * record[name]["mAP"] for name in ("untrained", "stage 1", "stage 3")]
            + [100 * record[name]["rank1"] for name in ("stage 1", "stage 3")]
            + [views[name] for name in ("generated, body", "copied, body", "generated", "copied")]
            + [record["wall"]]
        )
    digits = [1] * 5 + [3] * 4 + [0]
    for record, row in zip(records, rows, strict=True):
        cells = [f"{value:.{k}f}" for value, k in zip(row, digits, strict=True)]
        lines.append(f"| {record['seed']} | {' | '.join(cells)} |")
    if len(rows) > 1:
        cells = [
            f"{statistics.fmean(column):.{k}f} ± {statistics.stdev(column):.{k}f}"
            for column, k in zip(zip(*rows, strict=True), digits, strict=True)
        ]
        lines.append(f"| all | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("gcl_table: stopped; the same command goes on")
