"""The figures of a comparison's page, as Vega-Lite specifications."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from coopq.judge.references import ORIGINAL, UNIFORM
from coopq.report.page.axes import FIT, is_wide, loss_axis, number_axis, tip
from coopq.report.page.colours import FAINT, method_colours
from coopq.report.page.document import Spec
from coopq.report.page.ranking.rank import Cell, Rank

_MOST_LINES = 6
_ROW = 22
"""Height of a row of the dot plot, in pixels."""
_APART = 0.055
"""Distance of two labels, as a share of the axis."""
_ROOM, _LESS_ROOM = 110, 30
"""Room for labels at the right of lines, and where uniform widths reach further than the lines, in pixels."""


def line_colours(ranks: Sequence[Rank]) -> dict[str, str]:
    """The methods that have a colour and a name in all figures of a page, with the colour."""
    return method_colours([one.method for one in ranks], _MOST_LINES)


def rank_figure(ranks: Sequence[Rank], named: Mapping[str, str]) -> Spec:
    """A dot with its interval for each method, the best first.

    Args:
        ranks: The methods.
        named: Colours of the methods that have one; others are grey.
    """
    rows = [
        {
            "method": one.method,
            "above": one.above,
            "low": one.above - half,
            "high": one.above + half,
            "cells": one.n_cells,
        }
        for one in ranks
        for half in [one.half or 0.0]
    ]
    y = {"field": "method", "type": "nominal", "title": None, "sort": [one.method for one in ranks]}
    x = number_axis("above", "NLL above the best, nats per token", zero=True)
    tips = [
        tip("method", "method"),
        tip("above", "above the best", "+.4f"),
        tip("low", "from", "+.4f"),
        tip("high", "to", "+.4f"),
        tip("cells", "budgets", "d"),
    ]
    colours = _colours([one.method for one in ranks], named)
    return {
        "width": "container",
        "height": _ROW * len(ranks),
        "autosize": FIT,
        "data": {"values": rows},
        "encoding": {"y": {**y, "axis": {"grid": True, "labelLimit": 200}}, "tooltip": tips, "color": colours},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.7},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {"mark": {"type": "point", "filled": True, "size": 70, "opacity": 1}, "encoding": {"x": x}},
        ],
    }


def lines_figure(cells: Sequence[Cell], named: Mapping[str, str]) -> Spec:
    """Loss on the judging text against size, a line for each method; a few are coloured and named at their end.

    Args:
        cells: The cells of one case.
        named: Colours of the methods that have one.
    """
    full = next((cell.nll for cell in cells if cell.method == ORIGINAL), None)
    rows: list[dict[str, Any]] = [
        {"method": cell.method, "size": round(cell.bits_per_weight, 4), "nll": cell.nll, "budget": cell.budget}
        for cell in cells
        if cell.budget is not None
    ]
    uniform: list[dict[str, Any]] = [
        {"size": round(cell.bits_per_weight, 4), "nll": cell.nll, "label": cell.label}
        for cell in cells
        if cell.method == UNIFORM
    ]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = _colours(methods, named)
    losses = [row["nll"] for row in (*rows, *uniform)] + ([] if full is None else [full])
    x, y = number_axis("size", "bits per weight"), loss_axis("nll", "NLL on the judging text, nats per token", losses)
    tips = [tip("method", "method"), tip("budget", "budget"), tip("size", "bits per weight", ".3f")]
    tips.append(tip("nll", "NLL", ".4f"))
    base: dict[str, Any] = {"x": x, "y": y, "color": colours, "detail": {"field": "method"}, "tooltip": tips}
    is_named = {"field": "method", "oneOf": list(named)}
    unnamed = {
        "transform": [{"filter": {"not": is_named}}],
        "mark": {"type": "line", "point": {"size": 20}, "strokeWidth": 1, "opacity": 0.45},
        "encoding": base,
    }
    layers: list[dict[str, Any]] = [
        *([] if set(methods) <= set(named) else [unnamed]),
        {
            "transform": [{"filter": is_named}],
            "mark": {"type": "line", "point": {"size": 40}, "strokeWidth": 2},
            "encoding": base,
        },
        {
            "data": {"values": _spread_labels(rows, named, losses)},
            "mark": {"type": "text", "align": "left", "dx": 8, "fontWeight": "bold"},
            "encoding": {"x": x, "y": {**y, "field": "at"}, "text": {"field": "method"}, "color": colours},
        },
    ]
    if uniform:
        point = {"type": "point", "shape": "square", "filled": True, "color": "currentColor", "opacity": 1, "size": 50}
        text = {"mark": {"type": "text", "dy": -12, "align": "center"}, "encoding": {"text": {"field": "label"}}}
        squares: dict[str, Any] = {"mark": point, "encoding": {"tooltip": [tip("label", ""), *tips[2:]]}}
        layers.append({"data": {"values": uniform}, "encoding": {"x": x, "y": y}, "layer": [squares, text]})
    if full is not None:
        line = {"mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6}, "encoding": {}}
        label = {
            "mark": {"type": "text", "align": "left", "x": 5, "dy": -7, "opacity": 0.75},
            "encoding": {"text": {"value": ORIGINAL}},
        }
        layers.append({"data": {"values": [{"nll": full}]}, "encoding": {"y": y}, "layer": [line, label]})
    return {
        "width": "container",
        "height": 340,
        "autosize": FIT,
        "padding": {"left": 5, "top": 5, "bottom": 5, "right": _room(rows, uniform)},
        "data": {"values": rows},
        "layer": layers,
    }


def _room(rows: Sequence[dict[str, Any]], uniform: Sequence[dict[str, Any]]) -> int:
    """Room at the right of the axes for names of lines."""
    sizes, ends = [row["size"] for row in (*rows, *uniform)], [row["size"] for row in rows]
    if not ends:
        return _LESS_ROOM
    return _LESS_ROOM if max(sizes) - max(ends) > 0.25 * (max(sizes) - min(sizes)) else _ROOM


def _colours(methods: Sequence[str], named: Mapping[str, str]) -> dict[str, Any]:
    """The encoding of methods as colours."""
    colours = [named.get(method, FAINT) for method in methods]
    return {"field": "method", "type": "nominal", "legend": None, "scale": {"domain": list(methods), "range": colours}}


def _spread_labels(
    rows: Sequence[dict[str, Any]], named: Mapping[str, str], losses: Sequence[float]
) -> list[dict[str, Any]]:
    """Where the label of each named method stands: at its largest size, apart from the next label on the axis."""
    on_axis, back = (math.log, math.exp) if is_wide(losses) else (float, float)
    apart = _APART * (on_axis(max(losses)) - on_axis(min(losses)))
    ends: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] in named and row["size"] >= ends.get(row["method"], row)["size"]:
            ends[row["method"]] = row
    found: list[dict[str, Any]] = []
    for row in sorted(ends.values(), key=lambda row: row["nll"]):
        at = row["nll"] if not found else max(row["nll"], back(on_axis(found[-1]["at"]) + apart))
        found.append({"method": row["method"], "size": row["size"], "at": at})
    return found
