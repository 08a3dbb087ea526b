"""Figures of comparisons: perplexity against average bits, matrices, costs, Shapley values."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.judge.references import FULL_PRECISION, RANDOM, UNIFORM
from coopq.judge.results import Comparison

_log = logging.getLogger(__name__)
_SUFFIXES = (".png", ".svg")


def can_plot() -> bool:
    """Whether figures can be drawn; if not, one line of the log says what to install."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    _log.info("no figures are drawn: they need the package matplotlib; run: pip install 'coopq[plot]'")
    return False


def save_comparison(rows: Sequence[Comparison], title: str, path: Path) -> list[Path]:
    """Draw perplexity against average bits: a line for each method, points for uniform widths.

    Args:
        rows: The comparison.
        title: Title of the figure.
        path: Path of the files without a suffix; PNG and SVG are written.
    Returns:
        The files written; none without matplotlib.
    """
    if not can_plot():
        return []
    figure, axes = _axes(8, 5)
    methods = dict.fromkeys(row.method for row in rows)
    for method in methods:
        points = sorted((row.average_bits, row.perplexity) for row in rows if row.method == method)
        bits, perplexity = [x for x, _ in points], [y for _, y in points]
        if method == FULL_PRECISION:
            axes.axhline(perplexity[0], color="black", linestyle=":", label=method)
        elif method == UNIFORM:
            axes.plot(bits, perplexity, "ks", label=method)
        elif method == RANDOM:
            n = next(row.n for row in rows if row.method == RANDOM)
            axes.plot(bits, perplexity, "o--", color="grey", label=f"random (mean of {n})")
        else:
            axes.plot(bits, perplexity, "o-", linewidth=3 if method == "coopq" else 1.2, label=method)
    axes.set(xlabel="average bits", ylabel="perplexity", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    return _save(figure, path)


def save_heatmap(
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: Path,
    *,
    diverging: bool = False,
) -> list[Path]:
    """Draw a matrix.

    Args:
        values: Shape (n_rows, n_columns); nan stays blank.
        rows: Names of the rows.
        columns: Names of the columns.
        title: Title of the figure.
        path: Path of the files without a suffix.
        diverging: Whether zero is the middle of the colours.
    Returns:
        The files written.
    """
    figure, axes = _axes(2 + 0.28 * len(columns), 1.6 + 0.28 * len(rows))
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    limits = {"vmin": -most, "vmax": most, "cmap": "RdBu_r"} if diverging else {"cmap": "viridis"}
    image = axes.imshow(values, aspect="auto", **limits)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image)
    return _save(figure, path)


def save_scatter(
    points: Mapping[str, tuple[float, float]], x_label: str, y_label: str, title: str, path: Path
) -> list[Path]:
    """Draw a point for each name, with a logarithmic x axis; the files written."""
    figure, axes = _axes(8, 5)
    for name, (x, y) in points.items():
        axes.plot([max(x, 0.1)], [y], "o")
        axes.annotate(name, (max(x, 0.1), y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    return _save(figure, path)


def save_bars(
    values: Sequence[float], errors: Sequence[float], names: Sequence[str], title: str, path: Path
) -> list[Path]:
    """Draw a bar with a standard error for each name; the files written."""
    figure, axes = _axes(max(5.0, 0.25 * len(values)), 3.5)
    axes.bar(range(len(values)), values, yerr=errors, capsize=2)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_title(title, fontsize=9)
    return _save(figure, path)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> list[Path]:
    from matplotlib import rc_context

    files = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    for file in files:
        # Equal figures are equal files: without a date, and without random names.
        with rc_context({"svg.hashsalt": "coopq"}):
            figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
