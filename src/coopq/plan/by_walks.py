"""Plans by permutation walks: the paper's way, and other readings of the same walks."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from coopq.core.sizes import Budget
from coopq.core.specs import SolverSpec
from coopq.core.types import REMOVED, UNTOUCHED, Width
from coopq.game.engines.prefix_engine import prefix_tree_size
from coopq.game.session import Session
from coopq.plan.allocate import Choice, choose_by_gains, choose_by_walks, make_plan, search_space, settle
from coopq.plan.estimation import Estimation, Spent, save_estimation
from coopq.plan.methods import Method
from coopq.plan.plan import Plan
from coopq.plan.rivals import N_RIVALS, compared
from coopq.plan.searches.describe import describe
from coopq.search import SPQE, Measured, SearchSpace, run
from coopq.search.solver.local_search import local_optima
from coopq.search.surrogate import best_surrogate

_N_STARTS = 100
"""Random assignments from which descents on a surrogate fitted to walks start."""


def plans_by_walks(session: Session, method: Method, budgets: Sequence[Budget], solver: SolverSpec) -> list[Plan]:
    """The plans of budgets by a method that reads permutation walks."""
    removes_blocks = method.whole_blocks
    estimation = _estimate_pruning(session) if removes_blocks else estimate_walks(session)
    space = search_space(session, budgets)
    walked = Measured(space)
    if not removes_blocks:
        points = _spqe(session).points
        with session.game("measuring the walks") as game:
            walked.add(points, game(points))
    plans = []
    stage = f"solving the program, {method.name}"
    for budget, capacity in zip(session.each(stage, budgets), space.capacities, strict=True):
        if method.name == "shapley":
            phi = estimation.estimate.shapley
            choice = choose_by_gains(space, capacity, method.name, phi, None, estimation.spent, solver)
        elif method.name == "interactions":
            choice = _choose_by_interactions(space, capacity, walked, estimation.spent, solver)
        else:
            choice = choose_by_walks(estimation, budget, method.name, solver)
        plan = make_plan(session, budget, choice)
        if len(walked):
            rivals = space.assignments(walked.best(capacity, N_RIVALS))
            plan = compared(session, plan, rivals, is_best=False)
        plans.append(plan)
    return plans


def estimate_walks(session: Session) -> Estimation:
    """Shapley values and their covariance from walks that lower players; saved in the run folder."""
    estimation = _estimate(session, _spqe(session))
    save_estimation(session.folder, estimation)
    return estimation


def _estimate_pruning(session: Session) -> Estimation:
    """Shapley values and covariance from walks that remove blocks: the paper's ablation."""
    return _estimate(session, _spqe(session, low=REMOVED, high=UNTOUCHED))


def _spqe(session: Session, low: Width | None = None, high: Width | None = None) -> SPQE:
    """The walks of a session's request."""
    widths, search = session.request.widths, session.request.search
    return SPQE(
        len(session.players),
        low=widths.low if low is None else low,
        high=widths.high if high is None else high,
        permutations=search.permutations,
        seed=search.seed,
    )


def _estimate(session: Session, spqe: SPQE) -> Estimation:
    """What walks say, measured."""
    blocks = session.blocks
    with session.game("measuring the walks") as game:
        estimate = run(spqe, game).estimate()
    return Estimation(
        request=session.request,
        players=session.players,
        sizes=session.sizes,
        fingerprint=session.fingerprint,
        estimate=estimate,
        spent=Spent(
            prefix_tree_size(spqe.points, blocks),
            session.request.search.permutations * len(session.players) * len(set(blocks)),
        ),
    )


def _choose_by_interactions(
    space: SearchSpace, capacity: int, walked: Measured, spent: Spent, solver: SolverSpec
) -> Choice:
    """The best local optimum of a surrogate fitted to the walks."""
    fitted = best_surrogate(walked.surrogates(capacity))
    program = fitted.program(space.constraint(capacity))
    rng = np.random.default_rng([space.seed, 0])
    optima = local_optima(program, walked.best(capacity, 3), _N_STARTS, rng)
    chosen = space.assignments(optima[0])
    choice = describe(space, capacity, "interactions", chosen, walked, spent)
    return replace(choice, allocation=settle(program, solver))
