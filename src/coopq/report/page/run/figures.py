"""The figures of a run's page, as Vega-Lite specifications."""

from typing import Any

import numpy as np

from coopq.core.types import UNTOUCHED
from coopq.judge.references import MIX
from coopq.report.page.axes import FIT, labelled, loss_axis, number_axis, tip
from coopq.report.page.colours import CHOICE, FAINT, FRONT
from coopq.report.page.document import Spec
from coopq.report.page.run.record import RunRecord
from coopq.report.words import LOSS_NAMES


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
        }
        for i in np.flatnonzero(~is_full)
    ]
    order = sorted(rows, key=lambda row: (row["size"], row["loss"]))
    lowest = np.minimum.accumulate([row["loss"] for row in order]) if order else np.zeros(0)
    front = [row for i, row in enumerate(order) if i == 0 or row["loss"] < lowest[i - 1]]
    marks: list[dict[str, Any]] = [{"size": plan.bits_per_weight, "loss": plan.measured_loss, "label": "chosen"}]
    uniform: list[dict[str, Any]] = [
        {"size": round(float(bits[i]), 4), "loss": float(losses[i]), "label": f"uniform {points.assignments[i][0]:g}"}
        for i in np.flatnonzero((points.assignments == points.assignments[:, :1]).all(axis=1) & ~is_full)
    ]
    mixes = _mixes(record)
    tips = [tip("size", "bits per weight", ".3f"), tip("loss", loss, ".4f")]
    x = number_axis("size", "bits per weight, scales and zeros counted")
    y = loss_axis("loss", f"{loss}, nats per token", [row["loss"] for row in (*rows, *mixes)])
    budget = 8 * plan.budget_bytes / record.n_weights
    smallest, largest = order[0]["size"], order[-1]["size"]
    middle, is_left = (smallest + largest) / 2, budget < smallest + (largest - smallest) / 4
    for row in (*marks, *uniform, *mixes):
        row["is_right"] = row["size"] > middle
    layers = [
        {
            "data": {"values": [{"size": budget, "label": f"budget {plan.budget}"}]},
            "layer": [
                {"mark": {"type": "rule", "strokeDash": [4, 4], "opacity": 0.6}},
                {
                    "mark": {
                        "type": "text",
                        "align": "left" if is_left else "right",
                        "dx": 5 if is_left else -5,
                        "y": {"expr": "height - 8"},  # below the line of lowest losses nothing is drawn
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
        *(
            [labelled(mixes, x, y, {"shape": "triangle-up", "color": "currentColor", "size": 60}, tips)]
            if mixes
            else []
        ),
        labelled(marks, x, y, {"shape": "diamond", "color": CHOICE, "size": 160}, tips),
    ]
    return {"width": "container", "height": 320, "autosize": FIT, "layer": layers}


def _mixes(record: RunRecord) -> list[dict[str, Any]]:
    """llama.cpp's mix, where it was judged: its file's bytes beside those of the choice give the bits per weight."""
    plan = record.plan
    return [
        {
            "size": round(plan.bits_per_weight + 8 * (row.file_bytes - plan.file_bytes) / record.n_weights, 4),
            "loss": row.calibration_loss,
            "label": f"mix {row.budget}",
        }
        for judged in record.judged[:1]
        for row in judged.rows
        if row.method == MIX and row.file_bytes is not None
    ]


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
