"""Results of a bench as data frames: one row for each run, and averages over seeds."""

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from coopq.core.errors import BackendError
from coopq.core.specs import WidthsSpec
from coopq.judge.bench.results import Result
from coopq.judge.references import REFERENCES

if TYPE_CHECKING:  # pandas is optional
    import pandas as pd


def check_pandas() -> None:
    """Check that results can be put into tables, before the results are measured.

    Raises:
        BackendError: If pandas is not installed.
    """
    if importlib.util.find_spec("pandas") is None:
        raise BackendError("tables of a bench need the package pandas; run: pip install 'coopq[bench]'")


def tidy(results: Sequence[Result]) -> "pd.DataFrame":
    """A row for each `coopq.judge.bench.results.Row` of each result.

    Returns:
        Columns that name the run (case, model, backend, bits, granularity, seed), the values of the row, `loss` (which
        loss `calibration_loss` is) and `cost`: block forwards of the method, in forwards of the whole model.
    """
    import pandas as pd

    return pd.DataFrame(
        {
            "case": result.case,
            "model": result.request.model.source,
            "backend": result.request.quantizer.backend,
            "bits": " ".join(map(str, result.request.widths.bits)),
            "granularity": _granularity(result.request.widths),
            "seed": result.seed,
            "method": row.method,
            "budget": row.budget,
            "average_bits": row.average_bits,
            "bits_per_weight": row.bits_per_weight,
            "block_forwards": row.block_forwards,
            "loss": result.loss,
            "calibration_loss": row.calibration_loss,
            "nll": row.nll,
            "perplexity": row.perplexity,
            "cost": row.block_forwards / result.blocks,
            "windows": np.array(row.windows),
        }
        for result in results
        for row in result.rows
    )


def average_over_seeds(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Each method at each budget of each case, averaged over seeds.

    Args:
        rows: As `tidy` returns them.
    Returns:
        Indexed by case, budget and method, in order of appearance. Columns: `windows`, the loss on each window of
        WikiText-2, shape (n_windows,); `nll`, their mean; `calibration_loss`; `cost`, over all budgets of the case.
    """
    rows = rows.dropna(subset=["budget"])
    groups = rows.groupby(["case", "budget", "method"], sort=False)
    cells = groups[["calibration_loss"]].mean()
    cells["windows"] = [np.mean(np.stack(list(windows)), axis=0) for _, windows in groups["windows"]]
    cells["nll"] = [float(windows.mean()) for windows in cells["windows"]]
    return cells.join(rows.groupby(["case", "method"], sort=False)["cost"].mean())


def method_names(cells: "pd.DataFrame") -> list[str]:
    """The methods of averages over seeds, without the references, in order of appearance."""
    return [method for method in cells.index.unique("method") if method not in REFERENCES]


def above_lowest(cells: "pd.DataFrame") -> "pd.DataFrame":
    """`nll` and `calibration_loss` of averages over seeds, above those of the lowest method at the same budget."""
    losses = cells[["nll", "calibration_loss"]]
    lowest = losses[~losses.index.isin(REFERENCES, level="method")].groupby(["case", "budget"]).min()
    return losses - lowest.reindex(losses.index.droplevel("method")).to_numpy()


def _granularity(widths: WidthsSpec) -> str:
    return f"{widths.granularity} embeddings" if widths.embeddings else widths.granularity
