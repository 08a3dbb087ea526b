"""Searches by divergence against the same searches by likelihood, from what the small bench measured.

    coopq bench benchmarks/small.toml --out build/small
    python benchmarks/divergence.py build/small

Losses on WikiText-2 of what each found at each budget, paired over its windows. Writes docs/results/divergence.md.
"""

import argparse
from pathlib import Path

import numpy as np

from coopq.bench import Result, finished, mean_windows, read_bench
from coopq.evidence import Evidence

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
    parser.add_argument("out", type=Path, help="the folder of the bench")
    arguments = parser.parse_args()
    _, results = finished(read_bench(Path("benchmarks") / "small.toml"), arguments.out)
    lines = [
        "# Searches by divergence against searches by likelihood",
        "",
        "Written by `python benchmarks/divergence.py build/small`, from what `coopq bench benchmarks/small.toml",
        "--out build/small` measured: the loss on WikiText-2 of what a search by divergence (`--loss kl`) found,",
        "less that of what the same search by likelihood found, nats per token, mean over seeds; 95 %, paired",
        "bootstrap over windows.",
        "",
    ]
    for name in dict.fromkeys(result.case for result in results):
        pair = [[result for result in results if result.case == case] for case in (name, f"{name}-kl")]
        if all(pair):
            lines += table(name, *pair)
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
