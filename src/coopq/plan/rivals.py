"""How sure a choice is against the best rival that was measured beside it."""

import numpy as np

from coopq.core.types import Assignments, as_widths
from coopq.game.session import Session
from coopq.plan.confidence import selected_confidence
from coopq.plan.plan import Plan

N_RIVALS = 200
"""Best assignments of a budget among which the runner-up is."""
_REAL = 0.05
"""Share of the weights whose width has to differ, so that a rival is another choice and not another rounding of it."""


def compared(session: Session, plan: Plan, points: Assignments, *, is_best: bool) -> Plan:
    """The plan with its loss, its runner-up and the confidence in the choice between the two.

    Args:
        session: The session.
        plan: The plan.
        points: Assignments that were measured and keep the budget, best first, shape (n, n_players).
        is_best: Whether the plan is the best of these points, because its method chooses so.
    """
    chosen = np.array([plan.assignment], dtype=np.float32)
    points = np.concatenate([chosen, points[(points != chosen).any(axis=1)]])
    weights = np.array(session.sizes.n_weights) / sum(session.sizes.n_weights)
    differs = np.stack([(points != point) @ weights >= _REAL for point in points])
    with session.game("measuring the plan") as game:
        losses = game.per_sequence(points)
    sure, runner_up = selected_confidence(losses, 0, differs, is_best=is_best)
    return plan.replace(
        measured_loss=float(losses[0].mean()),
        confidence=sure,
        runner_up=None if runner_up is None else tuple(as_widths(points[runner_up])),
    )
