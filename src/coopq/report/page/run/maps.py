"""Maps of a run: blocks by projections, and blocks by blocks, as Vega-Lite specifications."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from coopq.core.types import Assignment
from coopq.report.page.axes import FIT, gradient, is_wide, tip
from coopq.report.page.colours import CHOICE, LESS_TO_MORE, RUNNER_UP, STRENGTH, is_light, width_colour
from coopq.report.page.document import Spec
from coopq.report.page.run.names import EMBEDDING, HEAD
from coopq.report.page.run.record import PairTerms, RunRecord

_SQUARE = 400
"""Height of the map of pairs, in pixels."""
_STEP = 24
"""Height of a row of a map, in pixels."""
_NARROW = 15
"""Width of a cell, in pixels, from which the cell's number of bits is written in it."""


def width_map(record: RunRecord) -> Spec:
    """Blocks by projections, coloured by width; a dot where the runner-up has another width."""
    widths = sorted({*record.plan.request.widths.bits, *record.plan.assignment})
    colour = {
        "field": "width",
        "type": "nominal",
        "title": "bits",
        "scale": {"domain": [f"{bits:g}" for bits in widths], "range": [width_colour(bits) for bits in widths]},
        "legend": {"symbolType": "square", "symbolSize": 160},
    }
    number: dict[str, Any] = {
        "mark": {"type": "text", "fontSize": 11, "opacity": {"expr": f"bandwidth('x') >= {_NARROW} ? 1 : 0"}},
        "encoding": {
            "text": {"field": "width"},
            "color": {"condition": {"test": "datum.light", "value": "#000000"}, "value": "#ffffff"},
        },
    }
    dots: dict[str, Any] = {
        "transform": [{"filter": "datum.differs"}],
        "mark": {
            "type": "point",
            "filled": True,
            "size": 45,
            "color": RUNNER_UP,
            "stroke": "#ffffff",
            "strokeWidth": 0.7,
            "opacity": 1,
            "yOffset": -7,
            "xOffset": {"expr": "bandwidth('x') / 2 - 5"},
        },
    }
    return _map(record, [_cells({"color": colour}), number, dots])


def sensitivity_map(record: RunRecord, title: str) -> Spec:
    """Blocks by projections, coloured by what the method says that lowering the player costs."""
    scores = np.array([player.score for player in record.plan.players])
    kind = "log" if is_wide(scores.tolist()) else "linear"
    most = float(np.abs(scores).max())
    scale = {"range": STRENGTH, "type": kind} if scores.min() >= 0 else _around_zero(most)
    colour = {"field": "score", "type": "quantitative", "scale": scale, "legend": gradient(title, 4)}
    return _map(record, [_cells({"color": colour})])


def pair_map(record: RunRecord, pairs: PairTerms) -> Spec:
    """Sums of pair terms between the players of two blocks."""
    blocks = np.array([player.block for player in record.plan.players])
    names, index = np.unique(blocks, return_inverse=True)
    sums = np.zeros((len(names), len(names)))
    np.add.at(sums, (index[:, None], index[None, :]), pairs.values)
    np.fill_diagonal(sums, np.diag(sums) / 2)
    rows = [
        {"a": int(names[i]), "b": int(names[j]), "value": float(sums[i, j])}
        for i in range(len(names))
        for j in range(len(names))
    ]
    most = float(np.abs(sums).max()) or 1.0
    return {
        "width": "container",
        "height": _SQUARE,
        "autosize": FIT,
        "data": {"values": rows},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "a", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0, "grid": False}},
            "y": {"field": "b", "type": "ordinal", "title": "block", "axis": {"grid": False}},
            "color": {
                "field": "value",
                "type": "quantitative",
                "scale": _around_zero(most),
                "legend": gradient(pairs.unit, 5),
            },
            "tooltip": [tip("a", "block"), tip("b", "and block"), tip("value", pairs.unit, ".3~g")],
        },
    }


def _around_zero(most: float) -> dict[str, Any]:
    """A scale of colours from -most to most."""
    return {"range": LESS_TO_MORE, "domain": [-most, 0, most]}


def _map(record: RunRecord, layers: Sequence[dict[str, Any]]) -> Spec:
    """A map of blocks by projections with what every cell tells on hover."""
    plan, pairs = record.plan, record.names
    rival: Sequence[float] | Assignment = plan.assignment if plan.runner_up is None else plan.runner_up
    rows = [
        {
            "block": name.block,
            "projection": name.projection,
            "layer": str(name),
            "width": f"{player.bits:g}",
            "light": is_light(player.bits),
            "score": player.score,
            "MB": player.n_bytes[f"{player.bits:g}"] / 1e6,
            "rival": f"{other:g} bits" if plan.runner_up is not None else "none",
            "differs": bool(other != player.bits),
        }
        for name, player, other in zip(pairs, plan.players, rival, strict=True)
    ]
    projections = list(dict.fromkeys(name.projection for name in pairs if name.projection not in (EMBEDDING, HEAD)))
    ends = [end for end in (EMBEDDING, HEAD) if any(name.projection == end for name in pairs)]
    tips = [
        tip("layer", "layer"),
        tip("width", "bits"),
        tip("MB", "size, MB", ".3~f"),
        tip("score", "cost of lowering", ".3~g"),
        tip("rival", "runner-up"),
    ]
    return {
        "width": "container",
        "height": _STEP * (len(projections) + len(ends)),
        "autosize": FIT,
        "data": {"values": rows},
        "encoding": {
            "x": {"field": "block", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0, "grid": False}},
            "y": {"field": "projection", "type": "nominal", "title": None, "sort": [*projections, *ends]},
            "tooltip": tips,
        },
        "layer": list(layers),
    }


def _cells(encoding: dict[str, Any]) -> dict[str, Any]:
    """Cells of a map, which answer a hover with a frame."""
    return {
        "params": [{"name": "hovered", "select": {"type": "point", "on": "pointerover", "clear": "pointerout"}}],
        "mark": {"type": "rect", "cursor": "pointer"},
        "encoding": {
            **encoding,
            "stroke": {"condition": {"param": "hovered", "empty": False, "value": CHOICE}, "value": None},
            "strokeWidth": {"value": 2},
        },
    }
