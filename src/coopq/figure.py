"""The figure of a comparison: perplexity against average bits, one line for each method."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from coopq.errors import BackendError
from coopq.scores import Comparison

_SUFFIXES = (".png", ".svg")


def check_plotting() -> None:
    """Check that figures can be drawn, before what they show is computed.

    Raises:
        BackendError: If matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("figures need the package matplotlib; run: pip install 'coopq[plot]'")


def save_comparison(rows: Sequence[Comparison], title: str, path: Path) -> list[Path]:
    """Draw a comparison and save it beside `path` as PNG and SVG; the files written.

    Args:
        rows: The comparison. Uniform widths are points, full precision a line across.
        title: What is compared, and on what.
        path: Where, without a suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    methods = dict.fromkeys(row.method for row in rows)
    for method in methods:
        points = sorted((row.average_bits, row.perplexity) for row in rows if row.method == method)
        bits, perplexity = [x for x, _ in points], [y for _, y in points]
        if method == "full precision":
            axes.axhline(perplexity[0], color="black", linestyle=":", label=method)
        elif method == "uniform":
            axes.plot(bits, perplexity, "ks", label=method)
        elif method == "random":
            axes.plot(bits, perplexity, "o--", color="grey", label=f"random (mean of {_n(rows, method)})")
        else:
            axes.plot(bits, perplexity, "o-", linewidth=3 if method == "coopq" else 1.2, label=method)
    axes.set(xlabel="average bits", ylabel="perplexity", yscale="log", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    files = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    for file in files:
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def _n(rows: Sequence[Comparison], method: str) -> int:
    return next(row.n for row in rows if row.method == method)
