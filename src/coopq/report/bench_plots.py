"""The figures of a bench."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coopq.judge.bench.run import Result
from coopq.judge.bench.aggregate import REFERENCES, cells, wins
from coopq.judge.bench.config import Bench
from coopq.report.plots import save_bars, save_comparison, save_heatmap, save_scatter
from coopq.judge.results import Comparison


def save_figures(bench: Bench, results: Sequence[Result], out: Path) -> list[str]:
    """Draw everything; the file names."""
    of_all = cells(results)
    methods = [m for m in dict.fromkeys(m for cell in of_all for m in cell.windows) if m not in REFERENCES]
    files = [save_heatmap(wins(of_all, methods), methods, methods, "share of cells won", out / "wins")]
    lowest = [min(cell.nll(m) for m in methods if m in cell.windows) for cell in of_all]
    points = {
        method: (
            float(np.median([cell.cost[method] for cell in of_all if method in cell.cost])),
            float(np.mean([c.nll(method) - low for c, low in zip(of_all, lowest, strict=True) if method in c.windows])),
        )
        for method in methods
    }
    files.append(save_scatter(points, "cost, forwards of the model", "NLL above the lowest", bench.title, out / "cost"))
    for case in bench.cases:
        of_case = [result for result in results if result.case == case.name]
        files.append(save_comparison(_comparison(of_case), case.name, out / f"perplexity-{case.name}"))
        first = of_case[0]
        n = len(first.players)
        rows = [row for row in first.rows if row.budget is not None and row.assignment is not None]
        for budget in dict.fromkeys(row.budget for row in rows):
            chosen = [row for row in rows if row.budget == budget]
            bits = np.array([row.assignment for row in chosen], dtype=np.float64)
            title = f"{case.name}, {budget}: bits by player"
            path = out / f"bits-{case.name}-{budget}"
            files.append(save_heatmap(bits, [row.method for row in chosen], [str(i) for i in range(n)], title, path))
        above = np.array(first.interactions)
        numbers = [str(i) for i in range(n)]
        title = f"{case.name}: fitted interactions, nats"
        files.append(save_heatmap(above, numbers, numbers, title, out / f"interactions-{case.name}", diverging=True))
        if first.shapley is not None:
            values, errors = first.shapley
            title = f"{case.name}: Shapley values, nats"
            files.append(save_bars(values, errors, numbers, title, out / f"shapley-{case.name}"))
    return [path.name for of_figure in files for path in of_figure]


def _comparison(of_case: Sequence[Result]) -> list[Comparison]:
    """What the figure of perplexity against bits takes, averaged over seeds."""
    rows = of_case[0].rows
    found = []
    for row in rows:
        same = [
            (of.nll, of.calibration_nll)
            for result in of_case
            for of in result.rows
            if (of.method, of.budget, of.average_bits) == (row.method, row.budget, row.average_bits)
        ] or [(row.nll, row.calibration_nll)]
        nll, calibration = np.mean(same, axis=0).tolist()
        found.append(
            Comparison(
                method=row.method,
                budget=row.budget,
                n=1 if row.assignment is not None else 5,
                average_bits=row.average_bits,
                bits_per_weight=row.bits_per_weight,
                calibration_nll=calibration,
                nll=nll,
                perplexity=float(np.exp(nll)),
            )
        )
    return found
