"""Searches by KL divergence against the same searches by likelihood, from what two benches measured.

    coopq bench benchmarks/small.toml --out build/small                # a day on two cores; its last case is enough
    coopq bench benchmarks/divergence.toml --out build/divergence      # two hours
    python benchmarks/divergence.py build/small build/divergence

Losses on WikiText-2 of what each search found at each budget, paired over windows. Writes docs/results/divergence.md.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from _common import RESULTS, command_line, loss_above, mean_windows, table, write_report
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.results import Result
from coopq.judge.bench.run import finished
from coopq.judge.references import RANDOM


def compare(by_likelihood: Sequence[Result], by_divergence: Sequence[Result]) -> list[str]:
    """The methods that both cases of a model have."""
    rows = [row for row in by_divergence[0].rows if row.budget is not None]
    methods = dict.fromkeys(row.method for row in rows if row.method != RANDOM)
    budgets = dict.fromkeys(row.budget for row in rows)
    compared = []
    for method in methods:
        ours, reference = (
            [windows for budget in budgets if (windows := mean_windows(results, method, budget)) is not None]
            for results in (by_divergence, by_likelihood)
        )
        if len(ours) == len(reference) == len(budgets):
            both = [*zip(ours, reference, strict=True), (np.mean(ours, axis=0), np.mean(reference, axis=0))]
            compared.append([method, *(loss_above(*pair) for pair in both)])
    return [
        f"## {by_likelihood[0].case}",
        "",
        f"{len(by_likelihood)} seeds by likelihood, {len(by_divergence)} by divergence.",
        "",
        *table(["method", *budgets, "all"], compared),
        "",
    ]


def main() -> None:
    """Read what the benches measured, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("likelihood", type=Path, help="folder of the first bench")
    parser.add_argument("divergence", type=Path, help="folder of the second bench")
    arguments = parser.parse_args()
    # Relative paths, as the benches were run.
    _, by_likelihood = finished(read_bench(Path("benchmarks/small.toml")), arguments.likelihood)
    _, by_divergence = finished(read_bench(Path("benchmarks/divergence.toml")), arguments.divergence)
    lines = [
        "Written by `python benchmarks/divergence.py build/small build/divergence`, from what `coopq bench` measured",
        "for benchmarks/small.toml and benchmarks/divergence.toml: the loss on WikiText-2 of what a search by",
        "divergence (`--loss kl`) found, less the loss of what the same search by likelihood found, nats per token,",
        "mean over seeds; 95 %, paired bootstrap over windows.",
        "",
    ]
    for name in dict.fromkeys(result.case for result in by_divergence):
        same_case = [result for result in by_likelihood if f"{result.case}-kl" == name]
        if same_case:
            lines += compare(same_case, [result for result in by_divergence if result.case == name])
    write_report(RESULTS / "divergence.md", lines)


if __name__ == "__main__":
    main()
