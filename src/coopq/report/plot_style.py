"""How all figures for papers look: fonts, axes, readable ticks, a legend beside the axes, small files."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coopq.core.files import atomic_file
from coopq.judge.references import RANDOM
from coopq.report.page.colours import FAINT, METHOD_COLOURS, method_colours

_log = logging.getLogger(__name__)
_SUFFIXES = (".png", ".svg")
_DPI = 140
MOST_LINES = 7
"""Lines that a reader can tell apart."""
INK, PALE = "#24292f", "#d0d7de"
"""Colour of text and of references, and colour of axes and grids."""
_STYLE = {
    "font.size": 9,
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#eaeef2",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "svg.hashsalt": "coopq",
}
_BESIDE = (
    *((7, 0), (-7, 0), (5, 9), (-5, 9), (0, 12), (5, 15), (-5, 15)),
    *((5, -9), (-5, -9), (0, -12), (7, -18), (-7, -18)),
)
"""Where the name of a point may stand, in points to the right and up, the best place first."""
_FAR = 12
"""From so many points up or down on a thin line leads from a name to its point."""
_SHAPES = dict(zip(METHOD_COLOURS, ("o", "s", "^", "v", "P", "X", "d", "*"), strict=True))
"""The shape of the points of each colour."""


class Line(NamedTuple):
    """How the line of a method looks."""

    colour: str
    marker: str
    dash: str


class Bounds(NamedTuple):
    """A box on a figure, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def meets_any(self, others: "Sequence[Bounds]") -> bool:
        """Whether another box overlaps."""
        return any(
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
            for other in others
        )


def can_plot() -> bool:
    """Whether figures can be drawn; if not, one line of the log says what to install."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    _log.info("no figures are drawn: they need the package matplotlib; run: pip install 'coopq[plot]'")
    return False


def method_lines(methods: Sequence[str]) -> dict[str, Line]:
    """The looks of the first methods that have a colour, in the order given; the report page has the same colours."""
    colours = method_colours(methods, MOST_LINES)
    return {
        method: Line(colours[method], _SHAPES[colours[method]], "--" if method == RANDOM else "-")
        for method in methods
        if method in colours
    }


def new_axes(width: float, height: float, n: int = 1, ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    """A figure in inches with `n` axes beside each other; the axes alone for one."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, n, width_ratios=ratios)
    return figure, axes


def set_title(axes: Any, title: str) -> None:
    """A title at the left, so that long titles stay in the figure."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)


def readable_log(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis as plain numbers: 1, 2 and 5 in each decade, or whole decades over many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    n_decades = np.log10(high / low)
    within = (1, 1.5, 2, 3, 4, 5, 7) if n_decades < 1 else (1, 2, 5) if n_decades < 2.5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in within]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def legend_beside(axes: Any) -> None:
    """The legend, outside the axes at the right."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, labelspacing=0.7, frameon=False)


def place_labels(
    figure: Any, axes: Any, points: Mapping[str, tuple[float, float]], segments: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Write the name of each point beside the point, where no other name, no point and no line is.

    Args:
        figure: The figure.
        axes: Axes whose scales and limits are final.
        points: x and y by name.
        segments: Two ends of each horizontal or vertical piece of a line.
    """
    figure.draw_without_rendering()
    inside, unit = axes.get_window_extent(), figure.dpi / 72
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bounds(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for ends in segments:
        (left, bottom), (right, top) = np.sort(axes.transData.transform(ends), axis=0)
        taken.append(Bounds(left - 1, bottom - 1, right + 1, top + 1))
    for name in sorted(points, key=lambda name: points[name][1]):
        text = axes.annotate(name, points[name], textcoords="offset points", xytext=(0, 0), fontsize=8, color=INK)
        size = text.get_window_extent(figure.canvas.get_renderer())
        x, y = places[name]
        choices = []
        for right, up in _BESIDE:
            left = x + right * unit - (size.width if right < 0 else 0 if right else size.width / 2)
            bottom = y + up * unit - size.height / 2
            choices.append(Bounds(left, bottom, left + size.width, bottom + size.height))
        free = (box for box in choices if inside.x0 < box.left and box.right < inside.x1 and not box.meets_any(taken))
        box = next(free, choices[0])
        taken.append(box)
        right, up = (box.left - x) / unit, (box.bottom + size.height / 2 - y) / unit
        text.remove()
        thread = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            name,
            points[name],
            textcoords="offset points",
            xytext=(right, up),
            va="center",
            fontsize=8,
            color=INK,
            arrowprops=thread if abs(up) > _FAR else None,
        )


def save_figure(figure: Any, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG; equal figures are equal files: without a date, and without random names.

    Args:
        figure: The figure.
        path: Path of the files without a suffix.
    Returns:
        The files written.
    """
    from matplotlib import rc_context

    files = [path.with_name(path.name + suffix) for suffix in _SUFFIXES]
    for file in files:
        form = file.suffix[1:]
        with rc_context(_STYLE), atomic_file(file) as temporary:
            figure.savefig(temporary, format=form, dpi=_DPI, metadata={"Date": None} if form == "svg" else None)
    return files


def _plain(value: float) -> str:
    """A number as people write numbers: 0.05, 20, 5,000, 2M."""
    if value >= 1e6:
        return f"{value / 1e6:,g}M"
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"
