"""The figures of a run's page, as Vega-Lite specifications."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.types import UNTOUCHED, Assignment
from coopq.report.page.axes import FIT, gradient, is_wide, labelled, loss_axis, number_axis, tip
from coopq.report.page.colours import CHOICE, FAINT, FRONT, RUNNER_UP, is_light, width_colour
from coopq.report.page.document import Spec
from coopq.report.page.run.names import EMBEDDING, HEAD
from coopq.report.page.run.record import PairTerms, RunRecord

LOSS_NAMES = {"nll": "calibration loss", "kl": "KL divergence from full precision"}
_SQUARE = 400
"""Height of the map of pairs, in pixels."""
_STEP = 24
"""Height of a row of a map, in pixels."""
_NARROW = 15
"""Width of a cell, in pixels, from which the cell's number of bits is written in it."""


def size_figure(record: RunRecord) -> Spec:
    """Every measured assignment by size and loss, the lowest losses so far, the choice, uniform widths."""
    plan, points = record.plan, record.measured
    is_full = (points.assignments == UNTOUCHED).all(axis=1)
    bits, losses = record.bits_per_weight(points.n_bytes), points.losses
    loss = LOSS_NAMES[plan.request.search.loss]
    rows = [
        {
            "size": round(float(bits[i]), 4),
            "loss": float(losses[i]),
            "order": int(i) + 1,
            "MiB": _mib(points.n_bytes[i]),
        }
        for i in np.flatnonzero(~is_full)
    ]
    order = sorted(rows, key=lambda row: (row["size"], row["loss"]))
    lowest = np.minimum.accumulate([row["loss"] for row in order]) if order else np.zeros(0)
    front = [row for i, row in enumerate(order) if i == 0 or row["loss"] < lowest[i - 1]]
    marks: list[dict[str, Any]] = [
        {"size": plan.bits_per_weight, "loss": plan.measured_loss, "label": "chosen", "MiB": _mib(plan.bytes)}
    ]
    uniform: list[dict[str, Any]] = [
        {"size": round(float(bits[i]), 4), "loss": float(losses[i]), "label": f"uniform {points.assignments[i][0]:g}"}
        for i in np.flatnonzero((points.assignments == points.assignments[:, :1]).all(axis=1) & ~is_full)
    ]
    tips = [tip("size", "bits per weight", ".3f"), tip("loss", loss, ".4f")]
    x = number_axis("size", "bits per weight, scales and zeros counted")
    y = loss_axis("loss", f"{loss}, nats per token", [row["loss"] for row in rows])
    budget = 8 * plan.budget_bytes / record.n_weights
    middle = sum([order[0]["size"], order[-1]["size"]]) / 2
    for row in (*marks, *uniform):
        row["is_right"] = row["size"] > middle
    layers = [
        {
            "data": {"values": [{"size": budget, "label": f"budget {plan.budget}"}]},
            "layer": [
                {"mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6}},
                {
                    "mark": {
                        "type": "text",
                        "align": "right" if budget > middle else "left",
                        "dx": -5 if budget > middle else 5,
                        "y": 8,
                        "opacity": 0.75,
                    },
                    "encoding": {"text": {"field": "label"}},
                },
            ],
            "encoding": {"x": x},
        },
        {
            "data": {"values": rows},
            "mark": {"type": "point", "filled": True, "size": 30, "opacity": 0.4, "color": FAINT},
            "encoding": {"x": x, "y": y, "tooltip": [tip("order", "measured as number", "d"), *tips]},
        },
        {
            "data": {"values": front},
            "mark": {"type": "line", "interpolate": "step-after", "color": FRONT, "strokeWidth": 2},
            "encoding": {"x": x, "y": y},
        },
        *([labelled(uniform, x, y, {"shape": "square", "color": "currentColor", "size": 60}, tips)] if uniform else []),
        labelled(marks, x, y, {"shape": "diamond", "color": CHOICE, "size": 160}, tips),
    ]
    return {"width": "container", "height": 320, "autosize": FIT, "layer": layers}


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
    scale = {"scheme": "oranges", "type": kind} if scores.min() >= 0 else {"scheme": "blueorange", "domainMid": 0}
    colour = {"field": "score", "type": "quantitative", "scale": scale, "legend": gradient(title, 4)}
    return _map(record, [_cells({"color": colour})])


def predicted_figure(record: RunRecord) -> Spec:
    """Measured losses against the predictions of a surrogate that was fitted without them."""
    assert record.predicted is not None
    known = np.flatnonzero(np.isfinite(record.predicted))
    measured, predicted = record.searched.losses[known], record.predicted[known]
    within = record.searched.n_bytes[known] <= record.plan.budget_bytes
    rows = [
        {"measured": float(m), "predicted": float(p), "keeps": "keeps the budget" if fits else "larger"}
        for m, p, fits in zip(measured, predicted, within, strict=True)
    ]
    both = [*measured.tolist(), *predicted.tolist()]
    domain = [min(both), max(both)]
    x, y = (
        loss_axis("predicted", "predicted, nats per token", both),
        loss_axis("measured", "measured, nats per token", both),
    )
    for axis in (x, y):
        axis["scale"] |= {"domain": domain}
    line = {
        "data": {"values": [{"predicted": value, "measured": value} for value in domain]},
        "mark": {"type": "line", "color": "currentColor", "strokeDash": [4, 4], "opacity": 0.6},
        "encoding": {"x": x, "y": y},
    }
    points = {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.7},
        "encoding": {
            "x": x,
            "y": y,
            "color": {
                "field": "keeps",
                "type": "nominal",
                "title": None,
                "scale": {"domain": ["keeps the budget", "larger"], "range": [FRONT, FAINT]},
            },
            "tooltip": [tip("predicted", "predicted", ".4f"), tip("measured", "measured", ".4f"), tip("keeps", "")],
        },
    }
    return {"width": "container", "height": 320, "autosize": FIT, "layer": [line, points]}


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
            "x": {"field": "a", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0}},
            "y": {"field": "b", "type": "ordinal", "title": "block"},
            "color": {
                "field": "value",
                "type": "quantitative",
                "scale": {"scheme": "blueorange", "domain": [-most, most]},
                "legend": gradient(pairs.unit, 5),
            },
            "tooltip": [tip("a", "block"), tip("b", "and block"), tip("value", pairs.unit, ".3~g")],
        },
    }


def search_figure(record: RunRecord) -> Spec:
    """Losses of assignments that keep the budget, and the best so far, by forwards of the model."""
    points = record.searched
    fits = np.flatnonzero(points.n_bytes <= record.plan.budget_bytes)
    losses, forwards = points.losses[fits], record.scoring + points.forwards[fits]
    best = np.minimum.accumulate(losses)
    rows: list[dict[str, Any]] = [
        {"forwards": round(float(f), 2), "loss": float(one), "best": float(so_far), "order": int(i) + 1}
        for f, one, so_far, i in zip(forwards, losses, best, fits, strict=True)
    ]
    found = int(np.argmin(losses))
    marks = [{**rows[0], "label": "first plan"}, {**rows[found], "label": "best found"}]
    if not found:
        marks = [{**rows[0], "label": "the first plan is the best"}]
    for row in marks:
        row["is_right"] = row["forwards"] > rows[-1]["forwards"] / 2
    loss = LOSS_NAMES[record.plan.request.search.loss]
    x = number_axis("forwards", "forwards of the model over the calibration text", zero=True)
    y = loss_axis("loss", f"{loss}, nats per token", losses.tolist())
    tips = [tip("forwards", "forwards", ".1f"), tip("loss", loss, ".4f"), tip("best", "best so far", ".4f")]
    return {
        "width": "container",
        "height": 280,
        "autosize": FIT,
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "point", "filled": True, "size": 30, "opacity": 0.45, "color": FAINT},
                "encoding": {"x": x, "y": y, "tooltip": [tip("order", "measured as number", "d"), *tips]},
            },
            {
                "data": {"values": rows},
                "mark": {"type": "line", "interpolate": "step-after", "color": FRONT, "strokeWidth": 2},
                "encoding": {"x": x, "y": {**y, "field": "best"}},
            },
            labelled(marks, x, y, {"shape": "diamond", "color": CHOICE, "size": 110}, tips),
        ],
    }


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
            "MiB": _mib(player.n_bytes[f"{player.bits:g}"]),
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
        tip("MiB", "size, MiB", ".3~f"),
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


def _mib(n_bytes: int | npt.NDArray[Any]) -> float:
    return float(n_bytes) / 2**20
