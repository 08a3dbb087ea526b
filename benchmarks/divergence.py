"""Searches by divergence against the same searches by likelihood, from what two benches measured.

    coopq bench benchmarks/small.toml --out build/small                # a day on two cores; its last case is enough
    coopq bench benchmarks/divergence.toml --out build/divergence      # two hours
    python benchmarks/divergence.py build/small build/divergence

Losses on WikiText-2 of what each found at each budget, paired over its windows. Writes docs/results/divergence.md.
"""

import argparse
from pathlib import Path

import numpy as np

from coopq.judge.bench.run import Result, finished, mean_windows
from coopq.judge.bench.config import read_bench
from coopq.plan.confidence import Evidence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "divergence.md"


def table(name: str, by_likelihood: list[Result], by_divergence: list[Result]) -> list[str]:
    """The methods of both cases of a model."""
    rows = [row for row in by_divergence[0].rows if row.budget is not None]
    methods, budgets = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("method", "budget"))
    lines = [
        f"## {name}",
        "",
        f"{len(by_likelihood)} seeds by likelihood, {len(by_divergence)} by divergence.",
        "",
        f"| method | {' | '.join(budgets)} | all |",
        f"| --- |{' --- |' * (len(budgets) + 1)}",
    ]
    for method in methods:
        pairs = [
            (mean_windows(by_divergence, method, budget), mean_windows(by_likelihood, method, budget))
            for budget in budgets
        ]
        known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if method == "random" or len(known) < len(budgets):
            continue
        known.append((np.mean([ours for ours, _ in known], axis=0), np.mean([theirs for _, theirs in known], axis=0)))
        shown = []
        for ours, theirs in known:
            low, high = Evidence.of(theirs, ours).interval or (np.nan, np.nan)
            shown.append(f"{ours.mean() - theirs.mean():+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return [*lines, ""]


def main() -> None:
    """Read and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("likelihood", type=Path, help="the folder of the first bench")
    parser.add_argument("divergence", type=Path, help="the folder of the second")
    arguments = parser.parse_args()
    _, by_likelihood = finished(read_bench(Path("benchmarks") / "small.toml"), arguments.likelihood)
    _, by_divergence = finished(read_bench(Path("benchmarks") / "divergence.toml"), arguments.divergence)
    lines = [
        "# Searches by divergence against searches by likelihood",
        "",
        "Written by `python benchmarks/divergence.py build/small build/divergence`, from what `coopq bench` measured",
        "for benchmarks/small.toml and benchmarks/divergence.toml: the loss on WikiText-2 of what a search by",
        "divergence (`--loss kl`) found, less that of what the same search by likelihood found, nats per token, mean",
        "over seeds; 95 %, paired bootstrap over windows.",
        "",
    ]
    for name in dict.fromkeys(result.case for result in by_divergence):
        theirs = [result for result in by_likelihood if f"{result.case}-kl" == name]
        if theirs:
            lines += table(theirs[0].case, theirs, [result for result in by_divergence if result.case == name])
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
