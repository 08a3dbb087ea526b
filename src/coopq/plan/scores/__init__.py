"""One-layer scores that CoopQ is compared with, each turned into an assignment under the same byte budget."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.judge.references import random_assignments, uniform_assignment
from coopq.core.errors import EstimationError, hint

__all__ = [
    "BASELINES",
    "PAPER_BASELINES",
    "Gains",
    "gains_of_ranking",
    "get_baseline",
    "random_assignments",
    "uniform_assignment",
]

Gains = npt.NDArray[np.float64]
"""What raising each player to the high width is worth by a score, shape (n_players,); a knapsack adds them up."""

BASELINES = {
    "llm-mq": "coopq.plan.scores.llm_mq:gains_by_layer",
    "llm-mq-block": "coopq.plan.scores.llm_mq:gains_by_block",
    "lim": "coopq.plan.scores.lim:gains",
    "zd": "coopq.plan.scores.zd:gains_one_sided",
    "zd-two-sided": "coopq.plan.scores.zd:gains_two_sided",
    "activation": "coopq.plan.scores.activation:gains",
    "first-last": "coopq.plan.scores.first_last:gains",
    "hawq": "coopq.plan.scores.hawq:gains",
    "auto-quantize": "coopq.plan.scores.auto_quantize:gains_by_gradient",
    "auto-quantize-kl": "coopq.plan.scores.auto_quantize:gains_by_divergence",
}
PAPER_BASELINES = ("llm-mq", "llm-mq-block", "lim", "zd", "zd-two-sided", "activation")
"""Those that the paper compares with, two of them in two readings; each takes a few forwards of the model at most."""


def get_baseline(name: str) -> Callable[[Any], Gains]:
    """The function from a `coopq.game.sensitivity.Probe` to gains.

    Raises:
        EstimationError: If the name is unknown.
    """
    if name not in BASELINES:
        raise EstimationError(f"method {name!r} is unknown; {hint(name, BASELINES)}")
    module, _, attribute = BASELINES[name].partition(":")
    function: Callable[[Any], Gains] = getattr(importlib.import_module(module), attribute)
    return function


def gains_of_ranking(scores: Gains, shares: Gains) -> Gains:
    """Gains from scores that only rank players: how far each is above the lowest, by its share of a block's weights.

    With players of equal size the knapsack then raises those with the highest scores, as the scores' authors do; small
    players are worth no more for what they cost. The lowest gets a gain too, so that what fits into the budget is used.
    """
    above = scores - scores.min()
    spread = float(above.max()) or 1.0
    return (above + 1e-6 * spread) * shares
