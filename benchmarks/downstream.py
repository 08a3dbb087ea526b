"""Zero-shot accuracy of the assignments that a bench chose, beside full precision and uniform widths.

    coopq bench benchmarks/downstream.toml --out build/downstream
    python benchmarks/downstream.py build/downstream

PIQA, ARC-Easy, WinoGrande, LAMBADA and COPA from benchmarks/data/tasks, by lm-eval, without examples in the prompt. The
weights are those of the bench's weight bank. The bench's folder keeps what is measured, so that an interrupted
measurement resumes. Writes docs/results/downstream.md.
"""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from _common import DATA, RESULTS, command_line, table, write_report
from _models import session_on
from coopq.core.files import read_json, write_json
from coopq.core.types import Width
from coopq.game.session import Session
from coopq.judge.bench.config import Case, read_bench
from coopq.judge.bench.run import finished
from coopq.judge.zero_shot import zero_shot

TASKS = [str(DATA / "tasks" / f"{name}.jsonl") for name in ("piqa", "arc_easy", "winogrande", "lambada_openai", "copa")]
NORMALIZED = ("piqa", "arc_easy")
"""Tasks whose accuracy is normalized by the length of the choices, as is usual."""
N_QUESTIONS = 300


def measure(session: Session, assignment: tuple[Width, ...], n_questions: int) -> list[dict[str, Any]]:
    """Accuracies of one assignment."""
    try:
        with session.bank.assigned(assignment):
            model, tokenizer = session.loaded.model, session.loaded.tokenizer
            return [asdict(found) for found in zero_shot(model, tokenizer, TASKS, n_questions, session.progress)]
    finally:
        session.bank.restore()


def shown(accuracies: list[dict[str, Any]]) -> list[str]:
    """A cell for each task, and their mean with its standard error."""
    pairs = [
        task["normalized"] if task["task"] in NORMALIZED else (task["accuracy"], task["stderr"]) for task in accuracies
    ]
    values, errors = np.array(pairs).T
    mean = values.mean(), np.sqrt(np.square(errors).sum()) / len(pairs)
    return [f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in (*pairs, mean)]


def describe(case: Case, rows: list[list[str]], tasks: list[dict[str, Any]]) -> list[str]:
    """The report."""
    questions = ", ".join(f"{task['task']} {task['questions']:,}" for task in tasks)
    head = ["method", "budget", "WikiText-2 perplexity", *(task["task"] for task in tasks), "mean"]
    return [
        "# What do quantized models lose in zero-shot accuracy?",
        "",
        "Written by `python benchmarks/downstream.py build/downstream`: per cent right, ± standard error over the",
        f"questions, by lm-eval {version('lm-eval')}, no examples in the prompt; PIQA and ARC-Easy normalized by",
        f"length. The mean weighs tasks equally. {case.name}, seed {case.seeds[0]}; the first questions of each task:",
        f"{questions}.",
        "",
        *table(head, rows),
    ]


def main() -> None:
    """Measure what is not measured yet, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("bench", type=Path, help="folder of the bench")
    parser.add_argument("--limit", type=int, default=N_QUESTIONS, help="questions of each task (default: %(default)s)")
    arguments = parser.parse_args()
    bench, (result,) = finished(read_bench(Path("benchmarks/downstream.toml")), arguments.bench)
    (case,) = bench.cases
    record = arguments.bench / f"accuracies-{arguments.limit}.json"
    kept = read_json(record) if record.exists() else {}
    runs = arguments.bench / "runs" / case.name
    rows, tasks = [], []
    with session_on(result.request, runs / f"seed{result.seed}", bank=runs / "bank") as session:
        for row in result.rows:
            if row.assignment is None:
                continue
            key = ",".join(map(str, row.assignment))
            if key not in kept:
                kept[key] = measure(session, row.assignment, arguments.limit)
                write_json(record, kept)
            tasks = kept[key]
            budget = row.budget or f"{row.average_bits:g} bits"
            rows.append([row.method, budget, f"{row.perplexity:,.1f}", *shown(tasks)])
    write_report(RESULTS / "downstream.md", describe(case, rows, tasks))


if __name__ == "__main__":
    main()
