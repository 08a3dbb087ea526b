"""Results of a bench by case and budget, over seeds: what its tables and figures show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coopq.judge.bench.run import Result, mean_windows

REFERENCES = ("full precision", "uniform", "random")
"""What stands beside methods."""


@dataclass(frozen=True)
class Cell:
    """A budget of a case, over its seeds.

    Attributes:
        case: Name of the case.
        budget: The budget.
        windows: Loss of each method on each judging window, averaged over seeds.
        cost: Layer forwards of each method for all budgets of the case, in forwards of the whole model, likewise.
        calibration: Loss of each method on the calibration text, which searches lower, likewise.
    """

    case: str
    budget: str
    windows: dict[str, npt.NDArray[np.float64]]
    cost: dict[str, float]
    calibration: dict[str, float]

    def nll(self, method: str) -> float:
        """Loss on the judging text."""
        return float(self.windows[method].mean())

    @property
    def best(self) -> str:
        """The method of lowest loss."""
        return min(self.windows, key=self.nll)


def cells(results: Sequence[Result]) -> list[Cell]:
    """The budgets of every case."""
    found = []
    for name in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == name]
        rows = [(row, result.blocks) for result in of_case for row in result.rows]
        for budget in dict.fromkeys(row.budget for row, _ in rows if row.budget is not None):
            methods = dict.fromkeys(row.method for row, _ in rows if row.budget == budget)
            windows = {method: mean_windows(of_case, method, budget) for method in methods}
            cost = {
                method: float(np.mean([row.layer_forwards / blocks for row, blocks in rows if row.method == method]))
                for method in methods
            }
            calibration = {
                method: float(
                    np.mean([row.calibration_nll for row, _ in rows if (row.method, row.budget) == (method, budget)])
                )
                for method in methods
            }
            known = {m: of for m, of in windows.items() if of is not None}
            found.append(Cell(name, budget, known, cost, calibration))
    return found


def wins(of_all: Sequence[Cell], methods: Sequence[str]) -> npt.NDArray[np.float64]:
    """Share of the cells in which the method of a row is lower than that of a column, half for ties; nan for none."""
    matrix = np.full((len(methods), len(methods)), np.nan)
    for i, row in enumerate(methods):
        for j, column in enumerate(methods):
            pairs = [(c.nll(row), c.nll(column)) for c in of_all if row in c.windows and column in c.windows]
            if i != j and pairs:
                matrix[i, j] = np.mean([0.5 if ours == theirs else float(ours < theirs) for ours, theirs in pairs])
    return matrix
