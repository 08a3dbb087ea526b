"""Methods ranked over budgets and cases by their loss on the judging text, with paired intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from coopq.judge.references import REFERENCES
from coopq.judge.results import Comparison, uniform_name
from coopq.plan.confidence import NORMAL

if TYPE_CHECKING:  # it imports torch
    from coopq.judge.bench.results import Result, Row


@dataclass(frozen=True)
class Cell:
    """A method, or a reference, at a budget of a case, averaged over seeds.

    Attributes:
        case: Name of the case.
        method: Name of the method or of the reference.
        budget: The budget; None for the original and uniform widths.
        bits_per_weight: Stored bits per weight.
        label: The method, or the width of a uniform row.
        calibration_loss: Loss on the calibration set, nats per token.
        windows: Negative log-likelihood on each window of the judging text, shape (n_windows,), nats per token.
        perplexity: Perplexity on the judging text; of several assignments, the mean of the perplexities.
        forwards: Forwards of the model for all budgets of the case together; None where they were not counted.
    """

    case: str
    method: str
    budget: str | None
    bits_per_weight: float
    label: str
    calibration_loss: float
    windows: npt.NDArray[np.float64]
    perplexity: float
    forwards: float | None = None

    @property
    def nll(self) -> float:
        """Mean of the windows, nats per token."""
        return float(self.windows.mean())


class Rank(NamedTuple):
    """A method against the best-ranked one.

    Attributes:
        method: The method.
        above: Mean negative log-likelihood above that of the best-ranked method, nats per token.
        half: Half of the 95 % interval of `above`, over windows; None for a single window.
        n_cells: Number of budgets of cases that both methods have.
    """

    method: str
    above: float
    half: float | None
    n_cells: int


def comparison_cells(rows: Sequence[Comparison]) -> list[Cell]:
    """The cells of a comparison, which has one case."""
    return [
        Cell(
            case="",
            method=row.method,
            budget=row.budget,
            bits_per_weight=row.bits_per_weight,
            label=row.name if row.budget is None else row.method + row.draws,
            calibration_loss=row.calibration_loss,
            windows=np.array(row.windows),
            perplexity=row.perplexity,
        )
        for row in rows
    ]


def bench_cells(results: "Sequence[Result]") -> list[Cell]:
    """The cells of a bench, in order of appearance; assignments of one method at one budget are averaged over seeds."""
    found: dict[tuple[str, str, str | None], list[Cell]] = {}
    for result in results:
        for row in result.rows:
            cell = Cell(
                case=result.case,
                method=row.method,
                budget=row.budget,
                bits_per_weight=row.bits_per_weight,
                label=_label(row),
                calibration_loss=row.calibration_loss,
                windows=np.array(row.windows),
                perplexity=float(np.exp(np.mean(row.windows))),
                forwards=row.block_forwards / result.blocks,
            )
            found.setdefault((result.case, cell.label, row.budget), []).append(cell)
    return [_mean(cells) for cells in found.values()]


def _label(row: "Row") -> str:
    return row.method if row.width is None else uniform_name(row.width, row.average_bits)


def rank(cells: Sequence[Cell]) -> list[Rank]:
    """The methods with budgets, best first, each against the best on the budgets that both have.

    The best method has the smallest mean distance from the lowest loss at the same budget of the same case, among
    methods with the most budgets. Methods that share no budget with the best are left out; `not_compared` names them.
    Intervals are paired: they are those of differences on the same windows.
    """
    by_method = _by_method(cells)
    if not by_method:
        return []
    places = {place for own in by_method.values() for place in own}
    lowest = {place: min(own[place].nll for own in by_method.values() if place in own) for place in places}
    distance = {
        method: float(np.mean([cell.nll - lowest[place] for place, cell in own.items()]))
        for method, own in by_method.items()
    }
    order = sorted(by_method, key=lambda method: (method in REFERENCES, -len(by_method[method]), distance[method]))
    best = order[0]
    ranks = [_against(method, by_method[method], by_method[best]) for method in order]
    return sorted((one for one in ranks if one is not None), key=lambda one: (one.method != best, one.above))


def not_compared(cells: Sequence[Cell], ranks: Sequence[Rank]) -> list[str]:
    """Methods with budgets that share no budget with the best-ranked method."""
    return [method for method in _by_method(cells) if method not in {one.method for one in ranks}]


def _by_method(cells: Sequence[Cell]) -> dict[str, dict[tuple[str, str], Cell]]:
    found: dict[str, dict[tuple[str, str], Cell]] = {}
    for cell in cells:
        if cell.budget is not None:
            found.setdefault(cell.method, {})[cell.case, cell.budget] = cell
    return found


def _against(method: str, own: Mapping[tuple[str, str], Cell], best: Mapping[tuple[str, str], Cell]) -> Rank | None:
    """A method against the best; None if they never meet."""
    cases: dict[str, list[npt.NDArray[np.float64]]] = {}
    for (case, budget), cell in own.items():
        if (case, budget) in best:
            cases.setdefault(case, []).append(cell.windows - best[case, budget].windows)
    if not cases:
        return None
    sizes = [len(found) for found in cases.values()]
    means = [np.mean(found, axis=0) for found in cases.values()]  # of the budgets of a case, on each window
    weights = np.array(sizes) / sum(sizes)
    above = float(sum(w * m.mean() for w, m in zip(weights, means, strict=True)))
    if min(len(m) for m in means) < 2:
        return Rank(method, above, None, sum(sizes))
    variance = sum(float(w * w * m.var(ddof=1) / len(m)) for w, m in zip(weights, means, strict=True))
    return Rank(method, above, NORMAL * math.sqrt(variance), sum(sizes))


def _mean(cells: Sequence[Cell]) -> Cell:
    first = cells[0]
    return Cell(
        case=first.case,
        method=first.method,
        budget=first.budget,
        bits_per_weight=float(np.mean([cell.bits_per_weight for cell in cells])),
        label=first.label,
        calibration_loss=float(np.mean([cell.calibration_loss for cell in cells])),
        windows=np.mean([cell.windows for cell in cells], axis=0),
        perplexity=float(np.mean([cell.perplexity for cell in cells])),
        forwards=float(np.mean([cell.forwards or 0.0 for cell in cells])),
    )
