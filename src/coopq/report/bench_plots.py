"""The figures of a bench."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from coopq.judge.bench.aggregate import above_lowest, method_names, tidy
from coopq.judge.bench.config import Bench
from coopq.judge.bench.results import Result
from coopq.judge.references import N_RANDOM, RANDOM
from coopq.judge.results import Comparison
from coopq.plan.confidence import NORMAL
from coopq.report.plot_style import can_plot
from coopq.report.plots import (
    Score,
    save_comparison,
    save_costs,
    save_pairs,
    save_ranking,
    save_values,
    save_widths,
)

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
    files = save_ranks(cells, bench.title, out)
    for case in bench.cases:
        files += _save_case(case.name, [result for result in results if result.case == case.name], out)
    return [path.name for path in files]


def save_ranks(cells: "pd.DataFrame", title: str, out: Path) -> list[Path]:
    """Draw all methods over all cells: ranked with intervals, and against cost; the files written.

    Args:
        cells: Results averaged over seeds; the columns `nll`, `calibration_loss` and `cost` are enough.
        title: Title of the bench.
        out: Folder of the figures.
    """
    above, cost = above_lowest(cells)["nll"].groupby("method"), cells["cost"].groupby("method").median()
    mean, error = above.mean(), above.sem().fillna(0.0)
    scores = {
        method: Score(float(mean[method]), NORMAL * float(error[method]), float(cost[method]))
        for method in (*method_names(cells), *([RANDOM] if RANDOM in mean.index else []))
    }
    n_cells = len(cells.groupby(["case", "budget"]))
    label = f"NLL above the lowest of a cell, nats per token; 95 % intervals over {n_cells} cells"
    files = save_ranking(scores, label, title, out / "ranking")
    return files + save_costs(scores, "NLL above the lowest, nats per token", title, out / "cost")


def name_players(players: Sequence[str]) -> list[str]:
    """Names of players for people, from their names in the model: "block 3", "block 3, gate+up", "lm_head"."""
    named = []
    for player in players:
        parts = player.replace("_proj", "").split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block, inside = ("", parts) if at is None else (f"block {parts[at]}", parts[at + 1 :])
        named.append((block, ".".join(inside), inside[-1] if inside else ""))
    short = Counter((block, last) for block, _, last in named)
    return [
        ", ".join(filter(None, (block, last if short[block, last] == 1 else inside))) for block, inside, last in named
    ]


def _save_case(case: str, results: Sequence[Result], out: Path) -> list[Path]:
    """The figures of a case: perplexity over seeds; widths, interactions and Shapley values of the first seed."""
    first = results[0]
    names = name_players(first.players)
    files = save_comparison(_comparison(results), case, out / f"perplexity-{case}")
    rows = [row for row in first.rows if row.budget is not None and row.assignment is not None]
    for budget in dict.fromkeys(row.budget for row in rows):
        chosen = [row for row in rows if row.budget == budget]
        bits = np.array([row.assignment for row in chosen], dtype=np.float64)
        methods = [row.method for row in chosen]
        files += save_widths(bits, methods, names, f"{case}, {budget}: width by player", out / f"bits-{case}-{budget}")
    title = f"{case}: what two players lose together beyond their sum"
    files += save_pairs(np.array(first.interactions), names, title, out / f"interactions-{case}")
    if first.shapley is not None:
        title = f"{case}: Shapley values, ± 2 standard errors"
        files += save_values(*first.shapley, names, title, out / f"shapley-{case}")
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
