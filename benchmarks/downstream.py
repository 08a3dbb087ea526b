"""Zero-shot accuracy of what a bench chose, beside full precision and uniform widths.

    coopq bench benchmarks/small.toml --out build/small
    python benchmarks/downstream.py demo-hqq-3-4 --budgets 3.25avg 3.5avg --methods active coopq greedy-down lim

PIQA, ARC-Easy, WinoGrande, LAMBADA and COPA from benchmarks/data/tasks, by lm-eval, no examples in the prompt. Takes
the assignments of seed 0 and measures the bank's weights. Whatever was measured is kept: it resumes, and more budgets
and methods can be added. Writes docs/results/downstream.json and downstream.md.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from coopq.bench import Result, Row
from coopq.bench_config import read_bench
from coopq.downstream import zero_shot
from coopq.files import read_json, write_json
from coopq.terminal import progress_bars
from coopq.types import UNTOUCHED
from coopq.workbench import Workbench, open_workbench

ROOT = Path(__file__).parents[1]
TASKS = [
    ROOT / "benchmarks" / "data" / "tasks" / f"{name}.jsonl"
    for name in ["piqa", "arc_easy", "winogrande", "lambada_openai", "copa"]
]
NORMALIZED = ("piqa", "arc_easy")
"""Tasks of which the accuracy normalized by length is shown, as is usual."""
RESULTS = ROOT / "docs" / "results" / "downstream.json"
REFERENCES = ("full precision", "uniform")


def measured(bench: Workbench, row: Row, limit: int | None) -> list[dict[str, Any]]:
    """Accuracies of one assignment."""
    assert row.assignment is not None
    try:
        for player, bits in enumerate(row.assignment):
            if bits != UNTOUCHED:
                bench.bank.set_player(player, bits)
        tasks = [str(task) for task in TASKS]
        return [
            asdict(of) for of in zero_shot(bench.loaded.model, bench.loaded.tokenizer, tasks, limit, bench.progress)
        ]
    finally:
        bench.bank.restore()


def shown(accuracies: list[dict[str, Any]]) -> tuple[list[str], str]:
    """A cell for each task, and their mean with its standard error."""
    pairs = [of["normalized"] if of["task"] in NORMALIZED else (of["accuracy"], of["stderr"]) for of in accuracies]
    mean, error = np.mean([value for value, _ in pairs]), np.sqrt(np.sum(np.square([e for _, e in pairs]))) / len(pairs)
    return [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in pairs], f"{100 * mean:.1f} ± {100 * error:.1f}"


def markdown(cases: dict[str, dict[str, Any]]) -> str:
    """A table for each case."""
    lines = [
        "# Zero-shot accuracy",
        "",
        "Written by `python benchmarks/downstream.py CASE`: per cent right, ± standard error over questions, by",
        "lm-eval, no examples in the prompt; PIQA and ARC-Easy normalized by length. The mean weighs tasks equally.",
    ]
    for name, case in cases.items():
        rows = case["rows"].values()
        tasks = next(iter(rows))["accuracies"]
        questions = ", ".join(f"{of['task']} {of['questions']:,}" for of in tasks)
        lines += ["", f"## {name}", "", f"Questions: {questions}.", ""]
        lines += [f"| method | budget | WikiText-2 perplexity | {' | '.join(of['task'] for of in tasks)} | mean |"]
        lines += [f"| --- | --- | --- |{' --- |' * (len(tasks) + 1)}"]
        for row in rows:
            cells, mean = shown(row["accuracies"])
            lines.append(
                f"| {row['method']} | {row['budget']} | {row['perplexity']:,.1f} | {' | '.join(cells)} | {mean} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", help="name of a case of the bench")
    parser.add_argument("--budgets", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "small.toml")
    parser.add_argument("--bench", type=Path, default=ROOT / "build" / "small", help="where that bench has its results")
    arguments = parser.parse_args()
    case = next(case for case in read_bench(arguments.config).cases if case.name == arguments.case)
    result = Result.from_json(read_json(arguments.bench / "results" / f"{case.name}-seed0.json"))
    cases = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = cases.setdefault(case.name, {"limit": arguments.limit, "rows": {}})
    if kept["limit"] != arguments.limit:
        raise SystemExit(f"error: {case.name} was measured with --limit {kept['limit']}; use that")
    folder = arguments.bench / "runs" / case.name
    with (
        progress_bars() as progress,
        open_workbench(case.seeded(0), folder / "seed0", progress, bank=folder / "bank") as bench,
    ):
        for row in result.rows:
            asked = row.method in arguments.methods and row.budget in arguments.budgets
            key = ",".join(map(str, row.assignment or ()))
            if not (asked or row.method in REFERENCES):
                continue
            same = next((of for of in kept["rows"].values() if of["assignment"] == key), None)
            accuracies = same["accuracies"] if same else measured(bench, row, arguments.limit)
            budget = row.budget or f"{row.average_bits:g} bits"
            kept["rows"][f"{row.method} {budget}"] = {
                "method": row.method,
                "budget": budget,
                "assignment": key,
                "perplexity": row.perplexity,
                "accuracies": accuracies,
            }
            write_json(RESULTS, cases)
    RESULTS.with_suffix(".md").write_text(markdown(cases))
    print(markdown(cases))


if __name__ == "__main__":
    main()
