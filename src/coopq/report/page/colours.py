"""Colours: one for each width and each method, the same in every figure, for all kinds of colour vision."""

from collections.abc import Sequence

from coopq.core.types import Width
from coopq.judge.references import RANDOM

WIDTH_COLOURS: dict[Width, str] = {
    1: "#fff3a6",
    2: "#fde725",
    2.5: "#b5de2b",
    3: "#6ece58",
    3.5: "#35b779",
    4: "#1f9e89",
    4.5: "#26828e",
    5: "#31688e",
    6: "#3e4989",
    8: "#482878",
    16: "#7a7f87",
}
"""Viridis, from few bits to many; grey for weights that stay as they are."""
_LIGHT_BELOW = 4
"""Widths below have a colour on which black is readable."""
CHOICE, FRONT, RUNNER_UP, FAINT = "#d55e00", "#0072b2", "#cc79a7", "#8a929b"
STRENGTH = ("rgba(179, 71, 15, 0.06)", "rgba(179, 71, 15, 1)")
"""From little to much. Little is transparent, so that it is quiet on dark and on light pages."""
LESS_TO_MORE = ("rgba(0, 114, 178, 1)", "rgba(128, 128, 128, 0.06)", "rgba(213, 94, 0, 1)")
"""From less over nothing to more."""
_METHODS = {
    "active": "#0072b2",
    "coopq": "#d55e00",
    "auto-quantize": "#009e73",
    "evopress": "#cc79a7",
    "greedy-down": "#e69f00",
    "one-shot-high": "#56b4e9",
    RANDOM: FAINT,
}
"""The colours of Okabe and Ito for the methods that are shown most."""
_SPARE = "#5d3a9b"
METHOD_COLOURS = (*_METHODS.values(), _SPARE)
_LIKED = {"lim": "#009e73", "zd": "#cc79a7", "llm-mq": "#e69f00", "activation": "#56b4e9", "llm-mq-block": _SPARE}
"""Colours of the paper's baselines, which seldom meet the methods above."""


def width_colour(width: Width) -> str:
    """The colour of a width, or of the nearest one that has a colour."""
    return WIDTH_COLOURS[min(WIDTH_COLOURS, key=lambda known: abs(known - width))]


def is_light(width: Width) -> bool:
    """Whether black is readable on the colour of a width."""
    return width < _LIGHT_BELOW


def method_colours(methods: Sequence[str], most: int) -> dict[str, str]:
    """Colours of at most `most` methods: those of fixed colours first, then others in the order given.

    Another method has the colour that it likes best if that is free; no other method has a colour of CoopQ's own.
    """
    found = {method: _METHODS[method] for method in [method for method in methods if method in _METHODS][:most]}
    spare = [colour for method, colour in _METHODS.items() if method not in ("active", "coopq", RANDOM)] + [_SPARE]
    for method in methods:
        free = [colour for colour in spare if colour not in found.values()]
        if method not in _METHODS and free and len(found) < most:
            liked = _LIKED.get(method)
            found[method] = liked if liked in free else free[0]
    return found
