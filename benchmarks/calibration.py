"""What the calibration text decides: how many tokens, and of what, from what a bench measured.

    coopq bench benchmarks/calibration.toml --out build/calibration      # two hours and a half on one core
    python benchmarks/calibration.py build/calibration

Losses on WikiText-2, mean over budgets and seeds, of what each method chose on each text, against what the active
search chose on the fewest tokens, paired over windows. Writes docs/results/calibration.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.bench import Result, finished, mean_windows
from coopq.bench_config import read_bench
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
    lines = [
        "# Calibration tokens and text",
        "",
        "Written by `python benchmarks/calibration.py build/calibration`, from what `coopq bench` measured for",
        f"benchmarks/calibration.toml: the reference Llama, hqq, 2 and 4 bits; the loss on {len(reference)} windows of",
        f"WikiText-2, mean over {len(budgets)} budgets and the seeds, less that of the active search on",
        f"{cases[0].label}, {reference.mean():.4f}. Nats per token; 95 %, paired bootstrap over windows. A seed draws",
        "other sequences.",
        "",
        f"| method | {' | '.join(f'{text} ({len(of)})' for text, of in by_text.items())} |",
        f"| --- |{' --- |' * len(by_text)}",
    ]
    for method in methods:
        found = [over_budgets(of, method, budgets) for of in by_text.values()]
        lines.append(f"| {method} | {' | '.join('' if of is None else above(of, reference) for of in found)} |")
    lines += [
        "",
        "In brackets: seeds. Standard deviation of these means between seeds:",
        "",
        f"| method | {' | '.join(by_text)} |",
        f"| --- |{' --- |' * len(by_text)}",
    ]
    for method in methods:
        lines.append(f"| {method} | {' | '.join(spread(of, method, budgets) for of in by_text.values())} |")
    lines += ["", "Forwards of the model over the calibration tokens, for all budgets, a bench's first seed:", ""]
    lines += [f"| method | {' | '.join(by_text)} |", f"| --- |{' --- |' * len(by_text)}"]
    for method in methods[1:]:
        spent = [[row for row in of[0].rows if row.method == method] for of in by_text.values()]
        cells = [
            f"{rows[0].layer_forwards / of[0].blocks:.0f}" if rows else ""
            for rows, of in zip(spent, by_text.values(), strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
