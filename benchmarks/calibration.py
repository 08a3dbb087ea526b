"""What the calibration text decides: how many tokens, and of what, from what a bench measured.

    coopq bench benchmarks/calibration.toml --out build/calibration      # two hours and a half on one core
    python benchmarks/calibration.py build/calibration

Losses on WikiText-2, mean over budgets and seeds, of what each method chose on each text, against what the active
search chose on the fewest tokens, paired over windows. Writes docs/results/calibration.md.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.judge.bench.run import Result, finished, mean_windows
from coopq.judge.bench.config import read_bench
from quantizers import above

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "docs" / "results" / "calibration.md"


def over_budgets(results: Sequence[Result], method: str, budgets: Sequence[str]) -> npt.NDArray[np.float64] | None:
    """Loss on each judging window, mean over budgets and seeds; None where the method was not asked for."""
    windows = [mean_windows(results, method, budget) for budget in budgets]
    known = [of for of in windows if of is not None]
    return np.mean(known, axis=0) if len(known) == len(budgets) else None


def spread(results: Sequence[Result], method: str, budgets: Sequence[str]) -> str:
    """Standard deviation between seeds of the mean over budgets."""
    found = [over_budgets([result], method, budgets) for result in results]
    means = [of.mean() for of in found if of is not None]
    return f"{np.std(means, ddof=1):.4f}" if len(means) > 1 else ""


def table(
    by_text: Mapping[str, list[Result]], methods: Sequence[str], cell: Callable[[list[Result], str], str]
) -> list[str]:
    """Lines of a table, with a row for each method and a column for each text."""
    lines = [f"| method | {' | '.join(f'{text} ({len(of)})' for text, of in by_text.items())} |"]
    lines += [f"| --- |{' --- |' * len(by_text)}"]
    return [
        *lines,
        *(f"| {method} | {' | '.join(cell(of, method) for of in by_text.values())} |" for method in methods),
    ]


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", type=Path, help="the folder of the bench")
    arguments = parser.parse_args()
    bench, results = finished(read_bench(Path("benchmarks") / "calibration.toml"), arguments.bench)
    cases = [case for case in bench.cases if case.seeds]
    budgets, methods = cases[0].budgets, ("random", *cases[0].methods)
    by_text = {case.label: [result for result in results if result.case == case.name] for case in cases}
    reference = over_budgets(by_text[cases[0].label], "active", budgets)
    assert reference is not None

    def against(of: list[Result], method: str) -> str:
        found = over_budgets(of, method, budgets)
        return "" if found is None else above(found, reference)

    def forwards(of: list[Result], method: str) -> str:
        rows = [row for row in of[0].rows if row.method == method]
        return f"{rows[0].layer_forwards / of[0].blocks:.0f}" if rows else ""

    lines = [
        "# Calibration tokens and text",
        "",
        "Written by `python benchmarks/calibration.py build/calibration`, from what `coopq bench` measured for",
        f"benchmarks/calibration.toml: the reference Llama, hqq, 2 and 4 bits; the loss on {len(reference)} windows of",
        f"WikiText-2, mean over {len(budgets)} budgets and the seeds (their number in brackets), less that of the",
        f"active search on {cases[0].label}, {reference.mean():.4f}. Nats per token; 95 %, paired bootstrap over",
        "windows. A seed draws other sequences.",
        "",
        *table(by_text, methods, against),
        "",
        "Standard deviation of these means between seeds:",
        "",
        *table(by_text, methods, lambda of, method: spread(of, method, budgets)),
        "",
        "Forwards of the model over the calibration tokens, for all budgets, of the first seed:",
        "",
        *table(by_text, methods[1:], forwards),
    ]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
