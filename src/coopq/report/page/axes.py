"""Pieces that all specifications share: axes, tips, labelled marks."""

from collections.abc import Sequence
from typing import Any

FIT = {"type": "fit-x", "contains": "padding"}
"""As wide as the page, with axes and legends inside."""
_WIDE = 8.0
"""Ratio of the largest to the smallest loss from which an axis is logarithmic."""


def number_axis(field: str, title: str, *, zero: bool = False) -> dict[str, Any]:
    """An axis of numbers; `zero` makes it include zero."""
    scale = {"zero": zero, "nice": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": {"tickCount": 8}}


def loss_axis(field: str, title: str, values: Sequence[float]) -> dict[str, Any]:
    """An axis of losses, logarithmic if they differ much."""
    scale = {"type": "log", "nice": False, "padding": 12} if is_wide(values) else {"zero": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": {"tickCount": 6}}


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that a logarithmic scale shows them better."""
    return len(values) > 0 and min(values) > 0 and max(values) > _WIDE * min(values)


def tip(field: str, title: str, form: str | None = None) -> dict[str, Any]:
    """A line of what a hover tells; `form` is the format of a number, and None stands for text."""
    kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
    return {"field": field, "title": title, **kind}


def gradient(title: str, n_ticks: int) -> dict[str, Any]:
    """The legend of a colour scale, as wide as there is room."""
    length = {"expr": "min(260, width - 20)"}
    return {"title": title, "titleLimit": 600, "format": ".3~g", "tickCount": n_ticks, "gradientLength": length}


def labelled(
    rows: Sequence[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], mark: dict[str, Any], tips: Sequence[Any]
) -> dict[str, Any]:
    """Marks with a label beside each: the field "label", to the left of a mark whose field "is_right" is true."""
    text = {
        "type": "text",
        "align": {"expr": "datum.is_right ? 'right' : 'left'"},
        "dx": {"expr": "datum.is_right ? -8 : 8"},
        "dy": -8,
        "fontWeight": "bold",
    }
    return {
        "data": {"values": list(rows)},
        "encoding": {"x": x, "y": y, "tooltip": [tip("label", ""), *tips]},
        "layer": [
            {"mark": {"type": "point", "filled": True, "opacity": 1, **mark}},
            {"mark": text, "encoding": {"text": {"field": "label"}}},
        ],
    }
