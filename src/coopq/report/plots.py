"""Figures of comparisons: perplexity against average bits, ranked methods, matrices, costs, Shapley values."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coopq.core.types import Width
from coopq.judge.references import ORIGINAL, RANDOM, UNIFORM
from coopq.judge.results import Comparison
from coopq.report.page.axes import is_wide
from coopq.report.page.colours import CHOICE, FAINT, FRONT, is_light, width_colour
from coopq.report.page.ranking.rank import comparison_cells, rank
from coopq.report.plot_style import (
    INK,
    Line,
    can_plot,
    legend_beside,
    method_lines,
    new_axes,
    place_labels,
    readable_log,
    save_figure,
    set_title,
)

_MOST_NAMES = 40
"""Players that are named one by one; of more, the first of each block is."""
_LETTERS = 100
"""Letters of a line below a figure."""
_OWN = ("active", "coopq")
"""The default method, and the paper's."""


class Score(NamedTuple):
    """A method in a ranking.

    Attributes:
        mean: What is ranked.
        half: Half of its 95 % interval.
        cost: Forwards of the model.
    """

    mean: float
    half: float
    cost: float


def save_comparison(rows: Sequence[Comparison], title: str, path: Path) -> list[Path]:
    """Draw perplexity against average bits: a line for each method, points for uniform widths.

    Methods with equal perplexities at all budgets share a line. Of more than seven lines CoopQ's own are drawn, random
    assignments, then the methods that have a colour everywhere, then the best; the figure names those left out.

    Args:
        rows: The comparison.
        title: Title of the figure.
        path: Path of the files without a suffix; PNG and SVG are written.
    Returns:
        The files written; none without matplotlib.
    """
    if not can_plot():
        return []
    figure, axes = new_axes(8, 4.2)
    curves = _curves(rows)
    looks = method_lines(list(curves))
    for method, look in looks.items():
        names, bits, perplexity = curves[method]
        strong = {"linewidth": 2.4, "zorder": 3} if method in _OWN else {"linewidth": 1.4, "zorder": 2}
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.dash, "markersize": 5}
        axes.plot(bits, perplexity, label=",\n".join(names), **style, **strong)
    uniform = [(row.average_bits, row.perplexity) for row in rows if row.method == UNIFORM]
    if uniform:
        axes.plot(*np.transpose(uniform), "D", color=INK, markersize=6, label="uniform width")
    full = [row.perplexity for row in rows if row.method == ORIGINAL]
    if full:
        axes.axhline(full[0], color=INK, linestyle=":", linewidth=1.2, label=f"original, {full[0]:,.1f}")
    axes.set(xlabel="average bits of the weights", ylabel="perplexity")
    losses = [row.perplexity for row in rows]
    if is_wide(losses):
        axes.set_yscale("log")
        low, high = min(losses) * 0.8, max(losses) * 1.3
        axes.set_ylim(low, high)
        readable_log(axes.yaxis, low, high)
    axes.grid(visible=True)
    set_title(axes, title)
    left_out = [name for method, curve in curves.items() if method not in looks for name in curve[0]]
    if left_out:
        note = fill(f"Not drawn: {', '.join(left_out)}", _LETTERS)
        axes.set_xlabel(f"average bits of the weights\n\n{note}")
    legend_beside(axes)
    return save_figure(figure, path)


def save_ranking(scores: Mapping[str, Score], label: str, title: str, path: Path) -> list[Path]:
    """Draw a dot with its interval for each method, the lowest first; the files written."""
    order = sorted(scores, key=lambda method: scores[method].mean)
    figure, axes = new_axes(7, 1.2 + 0.24 * len(order))
    looks = method_lines(order)
    for place, method in enumerate(order):
        score, colour = scores[method], _colour(looks, method)
        low = max(score.mean - score.half, 0.0)
        axes.plot([low, score.mean + score.half], [place, place], color=colour, linewidth=2, alpha=0.6)
        axes.plot(score.mean, place, "o", color=colour, markersize=6)
        right = {"textcoords": "offset points", "xytext": (5, 0), "va": "center", "fontsize": 8}
        axes.annotate(f"{score.mean:.3f}", (score.mean + score.half, place), **right)
    axes.set_yticks(range(len(order)), order)
    axes.set(ylim=(len(order) - 0.4, -0.6), xlabel=label)
    axes.margins(x=0.09)
    axes.grid(visible=True)
    set_title(axes, title)
    return save_figure(figure, path)


def save_costs(scores: Mapping[str, Score], label: str, title: str, path: Path) -> list[Path]:
    """Draw what is ranked against cost, and the lowest for each cost as steps; the files written.

    Methods that need no forward of the model stand at the left of the axis.
    """
    figure, axes = new_axes(8, 4.6)
    paid = [score.cost for score in scores.values() if score.cost > 0]
    least, most = min(paid, default=1.0), max(paid, default=1.0)
    free, has_free = least / 4, len(paid) < len(scores)
    low, high = (free / 1.5 if has_free else least / 1.5), most * 2
    axes.set(xscale="log", xlim=(low, high), ylabel=label)
    axes.set_xlabel("forwards of the model for all budgets of a case, median over cases")
    readable_log(axes.xaxis, least * 0.7, high)
    if has_free:
        ticks = [tick for tick in axes.get_xticks() if tick >= least * 0.7]
        axes.set_xticks([free, *ticks], ["none", *(f"{tick:,g}" for tick in ticks)])
    looks = method_lines(sorted(scores, key=lambda method: scores[method].mean))
    points = {method: (score.cost or free, score.mean) for method, score in scores.items()}
    by_cost = sorted(points.values())
    lowest = np.minimum.accumulate([mean for _, mean in by_cost])
    costs = [cost for cost, _ in by_cost]
    corners = [(costs[0], lowest[0])]
    for cost, mean in zip([*costs[1:], high], [*lowest[1:], lowest[-1]], strict=True):
        corners += [(cost, corners[-1][1]), (cost, mean)]
    axes.plot(*np.transpose(corners), color="#afb8c1", linewidth=1.5, zorder=1)
    for method, (x, y) in points.items():
        axes.plot(x, y, "o", color=_colour(looks, method), markersize=6)
    axes.grid(visible=True)
    set_title(axes, title)
    place_labels(figure, axes, points, list(pairwise(corners)))
    return save_figure(figure, path)


def save_widths(
    widths: npt.NDArray[np.float64], methods: Sequence[str], players: Sequence[str], title: str, path: Path
) -> list[Path]:
    """Draw the width of each player by each method, in a colour for each width.

    Args:
        widths: Shape (n_methods, n_players).
        methods: Names of the rows.
        players: Names of the players, as `coopq.report.bench_plots.name_players` makes them.
        title: Title of the figure.
        path: Path of the files without a suffix.
    Returns:
        The files written.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    known: list[Width] = [float(width) for width in np.unique(widths)]
    figure, axes = new_axes(min(2.5 + 0.24 * len(players), 11.0), 1.9 + 0.24 * len(methods))
    edges = [known[0] - 1.0, *((a + b) / 2 for a, b in pairwise(known)), known[-1] + 1.0]
    colours = ListedColormap([width_colour(width) for width in known])
    axes.imshow(widths, aspect="auto", cmap=colours, norm=BoundaryNorm(edges, len(known)), interpolation="nearest")
    if len(players) <= _MOST_NAMES:
        for (row, column), width in np.ndenumerate(widths):
            ink = "black" if is_light(width) else "white"
            axes.text(column, row, f"{width:g}", ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_yticks(range(len(methods)), methods)
    _name_players(axes.xaxis, players)
    _no_frame(axes)
    handles = [Patch(facecolor=width_colour(width), label=f"{width:g} bits") for width in known]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    set_title(axes, title)
    return save_figure(figure, path)


def save_pairs(values: npt.NDArray[np.float64], players: Sequence[str], title: str, path: Path) -> list[Path]:
    """Draw a symmetric matrix of pairs of players, with zero in the middle of the colours.

    Args:
        values: Shape (n_players, n_players). Of many players the sums over pairs of blocks are drawn.
        players: Names of the players.
        title: Title of the figure.
        path: Path of the files without a suffix.
    Returns:
        The files written.
    """
    from matplotlib.colors import LinearSegmentedColormap

    label = "nats per token"
    if len(players) > _MOST_NAMES:
        names, places = np.unique(_blocks(players), return_inverse=True)
        players = list(dict.fromkeys(_blocks(players)))
        ones = np.eye(len(names))[places][:, [list(names).index(name) for name in players]]
        values, label = ones.T @ values @ ones, "nats per token, summed over the players of two blocks"
    side = min(2.5 + 0.2 * len(players), 8.0)
    figure, axes = new_axes(side + 1.2, side)
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    colours = LinearSegmentedColormap.from_list("pairs", [FRONT, "#ffffff", CHOICE])
    image = axes.imshow(values, cmap=colours, vmin=-most, vmax=most, interpolation="nearest")
    _name_players(axes.xaxis, players)
    _name_players(axes.yaxis, players)
    _no_frame(axes)
    bar = figure.colorbar(image, shrink=0.7, label=label)
    bar.outline.set_visible(False)
    set_title(axes, title)
    return save_figure(figure, path)


def save_values(
    values: Sequence[float], errors: Sequence[float], players: Sequence[str], title: str, path: Path
) -> list[Path]:
    """Draw a dot with two standard errors to each side for each player; the files written."""
    figure, axes = new_axes(min(2.5 + 0.24 * len(players), 11.0), 3.6)
    both = 2 * np.asarray(errors)
    marks = {"fmt": "o", "markersize": 4, "color": width_colour(5), "ecolor": FAINT, "elinewidth": 1.5}
    axes.errorbar(range(len(values)), values, yerr=both, **marks)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.margins(x=0.02)
    axes.set_ylabel("nats per token")
    axes.grid(visible=True, axis="y")
    _name_players(axes.xaxis, players)
    set_title(axes, title)
    return save_figure(figure, path)


def _curves(rows: Sequence[Comparison]) -> dict[str, tuple[list[str], list[float], list[float]]]:
    """Names, average bits and perplexities of each line, by its first method; CoopQ's own methods, then the best."""
    ranked = [one.method for one in rank(comparison_cells(rows))]
    own = [method for method in _OWN if method in ranked]
    last = [method for method in ranked if method == RANDOM]
    found: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for method in [*own, *last, *(method for method in ranked if method not in (*own, *last))]:
        points = sorted((row.average_bits, row.perplexity) for row in rows if row.method == method)
        found.setdefault(tuple(points), []).append(method)
    n = next((row.n for row in rows if row.method == RANDOM), 1)
    shown = {RANDOM: f"random, {n} draws"}
    return {
        names[0]: ([shown.get(name, name) for name in names], [x for x, _ in points], [y for _, y in points])
        for points, names in found.items()
    }


def _name_players(axis: Any, players: Sequence[str]) -> None:
    """Name the players of an axis: each one, or where there are many the first of each block."""
    if len(players) <= _MOST_NAMES:
        axis.set_ticks(range(len(players)), players, fontsize=7)
    else:
        blocks = _blocks(players)
        firsts = [place for place, block in enumerate(blocks) if place == 0 or block != blocks[place - 1]]
        firsts = firsts[:: -(-len(firsts) // _MOST_NAMES)]
        axis.set_ticks([place - 0.5 for place in firsts], [blocks[place] for place in firsts], fontsize=7)
        inside = [player.partition(", ")[2] for player in players if player.startswith("block 1, ")]
        axis.set_label_text(f"players in the order of the model; in a block: {', '.join(inside)}" if inside else "")
    if axis.axis_name == "x":
        axis.set_tick_params(rotation=90)


def _blocks(players: Sequence[str]) -> list[str]:
    return [player.partition(",")[0] for player in players]


def _no_frame(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _colour(looks: Mapping[str, Line], method: str) -> str:
    return looks[method].colour if method in looks else FAINT
