"""The figures of a bench."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coopq.judge.bench.aggregate import above_lowest, method_names, tidy, wins
from coopq.judge.bench.config import Bench
from coopq.judge.bench.results import Result
from coopq.judge.references import N_RANDOM, RANDOM
from coopq.judge.results import Comparison
from coopq.report.plots import can_plot, save_bars, save_comparison, save_heatmap, save_scatter

if TYPE_CHECKING:  # pandas is optional
    import pandas as pd


def save_figures(bench: Bench, results: Sequence[Result], cells: "pd.DataFrame", out: Path) -> list[str]:
    """Draw the figures of a bench.

    Args:
        bench: What was asked for.
        results: The result of each run.
        cells: The results averaged over seeds, by `coopq.judge.bench.aggregate.average_over_seeds`.
        out: Folder of the figures.
    Returns:
        Names of the files; none without matplotlib.
    """
    if not can_plot():
        return []
    methods = method_names(cells)
    won = wins(cells, methods).to_numpy()
    files = save_heatmap(won, methods, methods, "share of cells won", out / "wins")
    cost = cells["cost"].groupby("method").median()
    above = above_lowest(cells)["nll"].groupby("method").mean()
    points = {method: (float(cost[method]), float(above[method])) for method in methods}
    files += save_scatter(points, "cost, forwards of the model", "NLL above the lowest", bench.title, out / "cost")
    for case in bench.cases:
        files += _save_case(case.name, [result for result in results if result.case == case.name], out)
    return [path.name for path in files]


def _save_case(case: str, results: Sequence[Result], out: Path) -> list[Path]:
    """The figures of a case: perplexity over seeds; bits, interactions and Shapley values of the first seed."""
    first = results[0]
    numbers = [str(player) for player in range(len(first.players))]
    files = save_comparison(_comparison(results), case, out / f"perplexity-{case}")
    rows = [row for row in first.rows if row.budget is not None and row.assignment is not None]
    for budget in dict.fromkeys(row.budget for row in rows):
        chosen = [row for row in rows if row.budget == budget]
        bits = np.array([row.assignment for row in chosen], dtype=np.float64)
        title = f"{case}, {budget}: bits by player"
        files += save_heatmap(bits, [row.method for row in chosen], numbers, title, out / f"bits-{case}-{budget}")
    interactions = np.array(first.interactions)
    title = f"{case}: fitted interactions, nats"
    files += save_heatmap(interactions, numbers, numbers, title, out / f"interactions-{case}", diverging=True)
    if first.shapley is not None:
        values, errors = first.shapley
        title = f"{case}: Shapley values, nats"
        files += save_bars(values, errors, numbers, title, out / f"shapley-{case}")
    return files


def _comparison(results: Sequence[Result]) -> list[Comparison]:
    """The rows of the first seed of a case, with losses averaged over the seeds whose sizes are equal."""
    rows = tidy(results)
    equal_sizes = rows.groupby(["method", "budget", "average_bits"], dropna=False, sort=False)
    rows[["calibration_loss", "nll"]] = equal_sizes[["calibration_loss", "nll"]].transform("mean")
    rows["budget"] = rows["budget"].astype(object).where(rows["budget"].notna(), None)
    return [
        Comparison(
            method=row.method,
            budget=row.budget,
            n=N_RANDOM if row.method == RANDOM else 1,
            average_bits=row.average_bits,
            bits_per_weight=row.bits_per_weight,
            loss=row.loss,
            calibration_loss=row.calibration_loss,
            nll=row.nll,
            perplexity=float(np.exp(row.nll)),
            windows=tuple(row.windows.tolist()),
        )
        for row in rows[rows["seed"] == results[0].seed].itertuples()
    ]
