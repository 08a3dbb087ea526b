"""Plans by scores: what gradients, activations or weights say, without a loss of any assignment."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from coopq.core.errors import EstimationError
from coopq.core.files import as_plain
from coopq.core.sizes import Budget
from coopq.core.specs import SolverSpec
from coopq.core.types import ProgressCallback, silent
from coopq.game.sensitivity import Sensitivity
from coopq.game.session import Session
from coopq.plan.allocate import choose_by_gains, make_plan, search_space
from coopq.plan.estimation import Spent
from coopq.plan.methods import Method
from coopq.plan.plan import Plan
from coopq.plan.scores import Gains
from coopq.plan.scores.kept import Score, kept_score, save_score


def plans_by_score(session: Session, method: Method, budgets: Sequence[Budget], solver: SolverSpec) -> list[Plan]:
    """The plans of budgets by a score."""
    score = cached_score(session, method, sensitivities(session))
    spent, space = Spent(score.block_forwards, score.block_forwards), search_space(session, budgets)
    stage = f"solving the program, {method.name}"
    return [
        make_plan(
            session,
            budget,
            choose_by_gains(space, capacity, method.name, score.gains, score.pairs, spent, solver),
        )
        for budget, capacity in zip(session.each(stage, budgets), space.capacities, strict=True)
    ]


def sensitivities(session: Session) -> list[Sensitivity]:
    """What scores look at: one for each pair of neighbouring widths, the highest pair first."""
    blockwise = session.engine(session.calibration).blockwise
    return [
        Sensitivity(blockwise, session.bank, low, high, session.player_widths)
        for high, low in pairwise(session.request.widths.bits[::-1])
    ]


def cached_score(session: Session, method: Method, measured_at: Sequence[Sensitivity]) -> Score:
    """A score, from the run folder if the score is kept there."""
    fingerprint = as_plain(
        {**session.fingerprint, "bits": session.request.widths.bits, "player widths": session.player_widths}
    )
    if (kept := kept_score(session.folder, method.name, fingerprint)) is not None:
        return kept
    found = score(method, measured_at, session.progress)
    own = Score(
        _sum_to_own_steps(session, found.gains),
        None if found.pairs is None else _sum_to_own_steps(session, _sum_to_own_steps(session, found.pairs).T),
        found.block_forwards,
    )
    if not all(np.isfinite(terms).all() for terms in (own.gains, own.pairs) if terms is not None):
        raise EstimationError(
            f"the scores of {method.name} are not all numbers; choose another method, or compute in --dtype float32"
        )
    save_score(session.folder, method.name, own, fingerprint)
    return own


def score(method: Method, measured_at: Sequence[Sensitivity], progress: ProgressCallback = silent) -> Score:
    """A score of the steps between all widths.

    Args:
        method: The score.
        measured_at: One sensitivity for each pair of neighbouring widths, the highest pair first.
        progress: Told of every block forward, out of as many as the method's cost lets expect.
    """
    before = sum(sensitivity.block_forwards for sensitivity in measured_at)
    passes = measured_at[:1] if method.is_at_once else measured_at
    expected = sum(cost(method, len(measured_at) + 1) * len(set(sensitivity.blocks)) for sensitivity in passes)
    stage, function = f"scoring by {method.name}, block forwards", method.load()

    def report() -> None:
        done = sum(sensitivity.block_forwards for sensitivity in measured_at) - before
        progress(stage, done, max(expected, done + 1))

    report()
    for sensitivity in measured_at:
        sensitivity.on_work = report
    if method.scores_pairs:
        gains, pairs = function(measured_at)
    elif method.is_at_once:
        gains, pairs = function(measured_at).ravel(), None
    else:
        gains, pairs = np.stack([function(sensitivity) for sensitivity in measured_at], axis=1).ravel(), None
    spent = sum(sensitivity.block_forwards for sensitivity in measured_at) - before
    progress(stage, max(spent, 1), max(spent, 1))
    return Score(gains, pairs, spent)


def cost(method: Method, n_widths: int) -> int:
    """Forwards of the model that a score takes; experts take one more, which is not counted."""
    return (method.cost or 0) + method.cost_of_width * (n_widths - 2)


def _sum_to_own_steps(session: Session, terms: Gains) -> Gains:
    """Terms of the steps between widths that players have: sums over steps between all widths, along the first axis."""
    bits = session.request.widths.bits
    sums = []
    for own, by_step in zip(session.player_widths, np.split(terms, len(session.players)), strict=True):
        ends = [bits[::-1].index(width) for width in own[::-1]]
        sums += [by_step[start:end].sum(axis=0) for start, end in pairwise(ends)]
    return np.array(sums)
