"""What the calibration text decides: the number of tokens and the kind of text, from what a bench measured.

    coopq bench benchmarks/calibration.toml --out build/calibration      # two hours and a half on one core
    python benchmarks/calibration.py build/calibration

Losses on WikiText-2 of what each method chose on each text, averaged over budgets and seeds, against what the active
search chose on the fewest tokens, paired over windows. Writes docs/results/calibration.md.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from _common import RESULTS, command_line, loss_above, mean_windows, table, write_report
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.results import Result
from coopq.judge.bench.run import finished

Cell = Callable[[list[Result], str], str]
"""The cell of a method on a text, from the text's results and the method."""


def mean_over_budgets(results: Sequence[Result], method: str, budgets: Sequence[str]) -> npt.NDArray[np.float64] | None:
    """Loss on each window of WikiText-2, averaged over budgets and seeds; None if nobody asked for the method."""
    windows = [mean_windows(results, method, budget) for budget in budgets]
    known = [losses for losses in windows if losses is not None]
    return np.mean(known, axis=0) if len(known) == len(budgets) else None


def table_by_text(by_text: Mapping[str, list[Result]], methods: Sequence[str], cell: Cell) -> list[str]:
    """A table with a row for each method and a column for each text."""
    head = ["method", *(f"{text} ({len(results)})" for text, results in by_text.items())]
    return table(head, [[method, *(cell(results, method) for results in by_text.values())] for method in methods])


def main() -> None:
    """Read what the bench measured, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("bench", type=Path, help="folder of the bench")
    folder = parser.parse_args().bench
    bench, results = finished(read_bench(Path("benchmarks/calibration.toml")), folder)  # relative, as it was run
    cases = [case for case in bench.cases if case.seeds]
    budgets, methods = cases[0].budgets, ("random", *cases[0].methods)
    by_text = {case.label: [result for result in results if result.case == case.name] for case in cases}
    reference = mean_over_budgets(by_text[cases[0].label], "active", budgets)
    assert reference is not None, "the bench has no active search on the first text"

    def above_reference(of_text: list[Result], method: str) -> str:
        losses = mean_over_budgets(of_text, method, budgets)
        return "" if losses is None else loss_above(losses, reference)

    def deviation(of_text: list[Result], method: str) -> str:
        by_seed = [mean_over_budgets([result], method, budgets) for result in of_text]
        means = [losses.mean() for losses in by_seed if losses is not None]
        return f"{np.std(means, ddof=1):.4f}" if len(means) > 1 else ""

    def forwards(of_text: list[Result], method: str) -> str:
        rows = [row for row in of_text[0].rows if row.method == method]
        return f"{rows[0].block_forwards / of_text[0].blocks:.0f}" if rows else ""

    lines = [
        "Written by `python benchmarks/calibration.py build/calibration`, from what `coopq bench` measured for",
        f"benchmarks/calibration.toml: the reference Llama, hqq, 2 and 4 bits; the loss on {len(reference)} windows of",
        f"WikiText-2, mean over {len(budgets)} budgets and the seeds (their number in brackets), less the loss of the",
        f"active search on {cases[0].label}, {reference.mean():.4f}. Nats per token; 95 %, paired bootstrap over",
        "windows. Each seed draws other sequences.",
        "",
        *table_by_text(by_text, methods, above_reference),
        "",
        "Standard deviation of these means between seeds:",
        "",
        *table_by_text(by_text, methods, deviation),
        "",
        "Forwards of the model over the calibration tokens, for all budgets, of the first seed:",
        "",
        *table_by_text(by_text, methods[1:], forwards),
    ]
    write_report(RESULTS / "calibration.md", lines)


if __name__ == "__main__":
    main()
