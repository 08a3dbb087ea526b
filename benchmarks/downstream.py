"""Zero-shot accuracy of what a bench chose, beside full precision and uniform widths.

    coopq bench benchmarks/downstream.toml --out build/downstream
    python benchmarks/downstream.py build/downstream

PIQA, ARC-Easy, WinoGrande, LAMBADA and COPA from benchmarks/data/tasks, by lm-eval, no examples in the prompt. Measures
the bank's weights. Whatever was measured is kept in the bench's folder: it resumes. Writes docs/results/downstream.md.
"""

import argparse
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from coopq.judge.bench.run import Result
from coopq.judge.bench.config import Case, read_bench
from coopq.judge.zero_shot import zero_shot
from coopq.core.files import read_json, write_json
from coopq.cli.terminal import progress_bars
from coopq.core.types import UNTOUCHED, Width
from coopq.game.session import Workbench, open_workbench

ROOT = Path(__file__).parents[1]
TASKS = [
    ROOT / "benchmarks" / "data" / "tasks" / f"{name}.jsonl"
    for name in ["piqa", "arc_easy", "winogrande", "lambada_openai", "copa"]
]
NORMALIZED = ("piqa", "arc_easy")
"""Tasks of which the accuracy normalized by length is shown, as is usual."""
LIMIT = 300
REPORT = ROOT / "docs" / "results" / "downstream.md"


def measured(bench: Workbench, assignment: tuple[Width, ...], limit: int) -> list[dict[str, Any]]:
    """Accuracies of one assignment."""
    try:
        for player, bits in enumerate(assignment):
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


def markdown(case: Case, rows: list[dict[str, Any]]) -> str:
    """The report."""
    tasks = rows[0]["accuracies"]
    questions = ", ".join(f"{of['task']} {of['questions']:,}" for of in tasks)
    lines = [
        "# Zero-shot accuracy",
        "",
        "Written by `python benchmarks/downstream.py build/downstream`: per cent right, ± standard error over the",
        f"questions, by lm-eval {version('lm-eval')}, no examples in the prompt; PIQA and ARC-Easy normalized by",
        f"length. The mean weighs tasks equally. {case.name}, seed {case.seeds[0]}; the first questions of each task:",
        f"{questions}.",
        "",
        f"| method | budget | WikiText-2 perplexity | {' | '.join(of['task'] for of in tasks)} | mean |",
        f"| --- | --- | --- |{' --- |' * (len(tasks) + 1)}",
    ]
    for row in rows:
        cells, mean = shown(row["accuracies"])
        lines.append(f"| {row['method']} | {row['budget']} | {row['perplexity']:,.1f} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not measured yet, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="where the bench has its results")
    parser.add_argument("--limit", type=int, default=LIMIT, help="questions of each task (default: %(default)s)")
    arguments = parser.parse_args()
    (case,) = read_bench(ROOT / "benchmarks" / "downstream.toml").cases
    (seed,) = case.seeds
    result = Result.from_json(read_json(arguments.bench / "results" / f"{case.name}-seed{seed}.json"))
    journal = arguments.bench / f"accuracies-{arguments.limit}.json"
    kept = read_json(journal) if journal.exists() else {}
    folder = arguments.bench / "runs" / case.name
    rows = []
    with (
        progress_bars() as progress,
        open_workbench(case.seeded(seed), folder / f"seed{seed}", progress, bank=folder / "bank") as bench,
    ):
        for row in result.rows:
            if row.assignment is None:
                continue
            key = ",".join(map(str, row.assignment))
            if key not in kept:
                kept[key] = measured(bench, row.assignment, arguments.limit)
                write_json(journal, kept)
            rows.append(
                {
                    "method": row.method,
                    "budget": row.budget or f"{row.average_bits:g} bits",
                    "perplexity": row.perplexity,
                    "accuracies": kept[key],
                }
            )
    REPORT.write_text(markdown(case, rows))
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
