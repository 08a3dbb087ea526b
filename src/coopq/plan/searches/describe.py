"""What a search says of its choice: what each player costs, and how far its surrogate is to be trusted."""

import numpy as np

from coopq.core.types import Assignment
from coopq.plan.allocate import Choice
from coopq.plan.estimation import Spent
from coopq.search.informed import fit_informed
from coopq.search.measured import Measured
from coopq.search.prior import Prior
from coopq.search.space import SearchSpace
from coopq.search.surrogate import best_surrogate, fidelity_of


def describe(
    space: SearchSpace,
    capacity: int,
    method: str,
    chosen: Assignment,
    measured: Measured,
    spent: Spent,
    prior: Prior | None = None,
) -> Choice:
    """The choice of a search. A search measures and solves no program, so its choice has no bound.

    Scores are in nats per token. With a prior: the rise of the loss when a player alone goes from its highest to its
    lowest width, as the surrogate sees it. Otherwise: the Shapley value of the quadratic fitted to the losses.

    Args:
        space: Players and steps.
        capacity: Bytes that steps not taken may cost together.
        method: Name of the search.
        chosen: The assignment, shape (n_players,).
        measured: What the search measured.
        spent: What the search took.
        prior: What the search knew of each step.
    """
    q = space.steps_down(chosen)
    if prior is None:
        surrogates = measured.surrogates(capacity)
        fitted = best_surrogate(surrogates)
        scores, predicted, fidelity = (
            space.sum_by_player(surrogates[0].shapley()),
            fitted.predict(q[None]),
            fitted.fidelity,
        )
    else:
        informed = fit_informed(prior, measured.q, measured.losses, measured.lowest(capacity))
        highest = np.zeros((1, space.n_steps), dtype=bool)
        losses = informed.predict(np.concatenate([highest, space.one_player_lowest(), q[None]]))
        scores, predicted = losses[1:-1] - losses[0], losses[-1:]
        fill = min(1.0, capacity / space.step_bytes.sum())
        left_out = informed.losses_of(informed.left_out)
        fidelity = fidelity_of("log", left_out, measured.losses, measured.fill(), fill)
    return Choice(
        method=method,
        assignment=chosen,
        allocation=None,
        scores=scores,
        spent=spent,
        # A surrogate does not predict what it was fitted to.
        predicted_loss=None if q in measured else float(predicted[0]),
        fidelity=fidelity,
    )
