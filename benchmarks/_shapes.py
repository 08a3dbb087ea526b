"""The two shapes of small figures: dots in named rows, and lines with their names beside."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coopq.report.page.colours import CHOICE, FAINT, FRONT, RUNNER_UP
from coopq.report.plot_style import INK, legend_beside, new_axes, readable_log, save_figure, set_title

Points = Sequence[tuple[float, float]]
OURS, RIVAL = FRONT, "#57606a"
"""Blue is the active search, and what CoopQ does, in every figure."""
LOOKS = ((OURS, "o"), (RIVAL, "s"), (CHOICE, "^"), ("#009e73", "D"), (RUNNER_UP, "v"), (INK, "X"), (FAINT, "P"))
"""Colour and marker of each series, in the order of the series."""
_THREAD = "#d0d7de"


def draw_dots(
    out: Path,
    rows: Sequence[tuple[str, Mapping[str, float | Sequence[float]]]],
    *,
    title: str,
    xlabel: str,
    log: bool = False,
    reference: float | None = None,
    apart: bool = False,
) -> list[Path]:
    """A row for each thing and a dot for each of its values, with a thin line from the lowest to the highest.

    Args:
        out: Path of the figure without a suffix.
        rows: Name of each row, the first on top, and its value or values by series. Rows may lack a series.
        title: What the figure says.
        xlabel: What a value is.
        log: Whether the axis of values is logarithmic.
        reference: A value that a vertical line marks.
        apart: Whether the dots of a row stand one above the other, since many would hide each other.
    """
    series = list(dict.fromkeys(name for _, values in rows for name in values))
    figure, axes = new_axes(7.5, 1.1 + 0.24 * len(rows) * (1.4 if apart else 1))
    assert len(series) <= len(LOOKS), series
    dots = [{name: np.atleast_1d(value) for name, value in values.items()} for _, values in rows]
    for place, row in enumerate(dots):
        every = np.concatenate(list(row.values()))
        axes.plot([every.min(), every.max()], [place, place], color=_THREAD, zorder=1)
    for k, (name, (colour, marker)) in enumerate(zip(series, LOOKS, strict=False)):
        shift = (k / (len(series) - 1) - 0.5) * 0.6 if apart else 0.0
        points = [(x, place + shift) for place, row in enumerate(dots) if name in row for x in row[name]]
        axes.plot(*np.transpose(points), marker, color=colour, markersize=5.5, label=name)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, zorder=0)
    _scale(axes, "x", [float(x) for row in dots for values in row.values() for x in values], log=log)
    axes.grid(visible=True, axis="x")
    set_title(axes, title)
    if len(series) > 1:
        legend_beside(axes)
    return save_figure(figure, out)


def draw_lines(
    out: Path,
    lines: Mapping[str, Points],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: str = "",
    alone: Mapping[str, Points] | None = None,
    alike: str = "",
    height: float = 3.6,
) -> list[Path]:
    """A line with dots for each series, and series of points that no line joins.

    Args:
        out: Path of the figure without a suffix.
        lines: x and y of each line by name.
        title: What the figure says.
        xlabel: What x is.
        ylabel: What y is.
        log: Which axes are logarithmic: "x", "y" or "xy".
        alone: x and y of points that no line joins, by name.
        alike: A name for all lines, which then have one colour.
        height: Inches.
    """
    alone = alone or {}
    figure, axes = new_axes(7.5, height)
    looks = iter(LOOKS)
    for k, (name, points) in enumerate(lines.items()):
        colour, marker = LOOKS[0] if alike and k else next(looks)
        label = name if not alike else None if k else alike
        axes.plot(*np.transpose(points), marker, linestyle="-", color=colour, markersize=5, label=label)
    for name, points in alone.items():
        colour, marker = next(looks)
        axes.plot(*np.transpose(points), marker, color=colour, markersize=5.5, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    both = [point for points in (*lines.values(), *alone.values()) for point in points]
    for k, axis in enumerate("xy"):
        _scale(axes, axis, [point[k] for point in both], log=axis in log)
    axes.grid(visible=True)
    set_title(axes, title)
    legend_beside(axes)
    return save_figure(figure, out)


def _scale(axes: Any, axis: str, values: Sequence[float], *, log: bool) -> None:
    """Limits a little beyond the values; a linear axis of positive values begins at zero, which no dot is cut by."""
    low, high = min(values), max(values)
    if log:
        low, high = low / (high / low) ** 0.06, high * (high / low) ** 0.06
        getattr(axes, f"set_{axis}scale")("log")
        readable_log(getattr(axes, f"{axis}axis"), low, high)
    elif low >= 0:
        low, high = -0.02 * high, high * 1.06
    else:
        low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    getattr(axes, f"set_{axis}lim")(low, high)
