"""Plans by searches on the true loss."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from coopq.core.errors import InfeasibleBudget
from coopq.core.goal import Limit
from coopq.core.sizes import Budget
from coopq.core.specs import SolverSpec
from coopq.core.types import Assignments, Game
from coopq.game.engines.prefix_engine import prefix_tree_size
from coopq.game.game import Meter, Meters
from coopq.game.session import Session
from coopq.plan.allocate import make_plan, search_space
from coopq.plan.estimation import Spent
from coopq.plan.methods import Method, names
from coopq.plan.plan import Plan
from coopq.plan.rivals import N_RIVALS, compared
from coopq.plan.searches.describe import describe
from coopq.plan.searches.search_log import SearchLog
from coopq.plan.searches.step_prior import step_prior
from coopq.search import ActiveSearch, Known, Measured, Search, SearchSpace, run_search
from coopq.search.prior import Prior

_N_FINALISTS = 8
"""Assignments of each budget that a search with screening measures on the whole calibration set; chosen by hand."""
_TOLD = 0.02
"""Share of the loss by which a search improves before it says so again."""
_log = logging.getLogger(__name__)


def plans_by_search(
    session: Session, method: Method, budgets: Sequence[Budget], solver: SolverSpec, limit: Limit | None = None
) -> list[Plan]:
    """The plans of budgets by one search, which shares what it measures between the budgets.

    With screening the search looks at the first calibration sequences; its finalists are measured on all of them.
    """
    space, text = search_space(session, budgets), session.request.text
    search, prior, meters, scoring = _search(session, method, space, budgets, limit)
    share, n_blocks = text.n_screen_sequences / text.n_sequences, session.n_blocks
    spent = Spent(
        scoring + round(meters.block_forwards * share), scoring + round(meters.evaluations * share) * n_blocks
    )
    ranked = {capacity: _rank(space, search, capacity) for capacity in space.capacities}
    if share < 1:
        ranked, deciding = _decide(session, space, method, ranked)
        spent = Spent(spent.block_forwards + deciding.block_forwards, spent.unshared + deciding.unshared)
    plans = []
    for budget, capacity in zip(budgets, space.capacities, strict=True):
        chosen = ranked[capacity][0]
        choice = describe(space, capacity, method.name, chosen, search.measured, spent, prior)
        if share < 1:  # a surrogate of the screening sequences predicts no loss of all sequences
            choice = replace(choice, predicted_loss=None)
        plan = compared(
            session, make_plan(session, budget, choice), ranked[capacity], is_best=not method.trusts_surrogate
        )
        plans.append(plan.replace(stopped_after=limit.text if limit is not None and limit.is_reached else None))
    return plans


def make_search(method: Method, space: SearchSpace, known: Known, prior: Prior | None = None) -> Search:
    """The strategy of a method.

    Args:
        method: A search.
        space: What the strategy chooses from.
        known: Points measured before the search began, for strategies that learn from them.
        prior: What each step costs about, for strategies that take it.
    """
    arguments = [known] * method.learns + [prior] * method.takes_prior
    search: Search = method.load()(space, *arguments, **method.options)
    return search


def smallest_plan(session: Session, max_loss: float, limit: Limit | None = None) -> Plan:
    """The plan of the smallest size whose loss, measured on the calibration set, stays under a limit.

    Sizes are bisected, to a hundredth of the bytes between the lowest and the highest width. At each size an active
    search goes on from everything that is measured.

    Raises:
        InfeasibleBudget: If the loss is higher with every player at the highest width.
    """
    whole = search_space(session)
    total, least = int(whole.step_bytes.sum()), int(whole.step_bytes.min())
    low, high = 0, total
    with session.game("searching the smallest size", limit=limit) as game:
        name = _search_name(f"at most {max_loss}", whole, session.journal())
        known = game.journal.first(SearchLog(session.folder.path).n_known(name, game.journal))
        meter, measured = Meter(game, session.blocks, known[0], limit), Measured(whole)
        prior, scoring = step_prior(session, whole, meter)
        measured.add(*known)
        ends = whole.assignments(np.array([[False], [True]]).repeat(whole.n_steps, axis=1))
        losses = meter(ends)
        measured.add(ends, losses)
        if losses[0] > max_loss:
            raise InfeasibleBudget(
                f"a loss of {max_loss} cannot be kept: with every player at {whole.widths[-1]} bits the loss is "
                f"{losses[0]:.4f}; allow more, or take wider widths"
            )
        if losses[1] <= max_loss:
            high = 0
        if limit is not None:
            limit.spend(scoring / session.n_blocks)
            limit.begin()
        while high - low > max(least, total // 100):
            middle = (low + high) // 2
            search = ActiveSearch(replace(whole, capacities=(middle,)), measured.known(), prior)
            measured = run_search(search, lambda _: meter, limit).measured
            if limit is not None and limit.is_reached:
                measured.add(*game.journal.first(len(game.journal)))  # of the last round, too
                high = int(measured.bytes_above_min[measured.losses <= max_loss].min())
                break
            if measured.lowest(middle) <= max_loss:
                high = int(measured.bytes_above_min[measured.losses <= max_loss].min())
            else:
                low = middle
    best = whole.assignments(measured.best(high, N_RIVALS))
    chosen = best[0]
    budget = Budget.parse(f"{session.sizes.file_bytes(chosen) + session.sizes.reserved}B")
    spent = Spent(scoring + meter.block_forwards, scoring + meter.evaluations * session.n_blocks)
    (capacity,) = search_space(session, [budget]).capacities
    choice = describe(whole, capacity, "active", chosen, measured, spent, prior)
    plan = compared(session, make_plan(session, budget, choice), best, is_best=True)
    stopped_after = limit.text if limit is not None and limit.is_reached else None
    return plan.replace(max_loss=max_loss, stopped_after=stopped_after)


def begin_with_nothing(session: Session, methods: Sequence[str], budgets: Sequence[Budget]) -> None:
    """Keep other methods' losses from searches that have not started: compared methods learn from their own alone."""
    space, log = search_space(session, budgets), SearchLog(session.folder.path)
    journal = session.journal(session.request.text.n_screen_sequences)
    for method in (name for name in methods if name in names(learns=True)):
        log.begin_with_nothing(_search_name(method, space, journal))


def _search(
    session: Session, method: Method, space: SearchSpace, budgets: Sequence[Budget], limit: Limit | None
) -> tuple[Search, Prior | None, Meters, int]:
    """Run a search on the screening sequences.

    Returns:
        The search, its prior, what the search took, and the block forwards of the prior.
    """
    n_screen, stage = session.request.text.n_screen_sequences, f"searching, {method.name}"
    with session.game(stage, n_screen, limit) as game, ExitStack() as stack:
        name = _search_name(method.name, space, session.journal(n_screen))
        n_known = SearchLog(session.folder.path).n_known(name, game.journal) if method.learns else 0
        known = game.journal.first(n_known)

        def game_on_first(n: int) -> Game:
            return game if n == n_screen else stack.enter_context(session.game(stage, n, limit))

        meters = Meters(game_on_first, n_screen, session.blocks, known[0], limit)
        prior, scoring = step_prior(session, space, meters(1.0)) if method.takes_prior else (None, 0)
        if limit is not None:
            limit.spend(scoring / session.n_blocks)
        search = make_search(method, space, known, prior)
        if n_known:
            _log.info("%d losses are known; the search goes on from there", n_known)
        keeper = _Keeper(session, method.name, budgets, space, prior)
        run_search(search, meters, limit, keeper if method.is_anytime else lambda _: None)
        if limit is not None and limit.is_reached:
            search.measured.add(*game.journal.first(len(game.journal)))  # of the last round, too
        return search, prior, meters, scoring


class _Keeper:
    """Keeps the best plans so far in the run folder, so that a search that is interrupted leaves an answer.

    Args:
        session: The session.
        method: Name of the search.
        budgets: The budgets.
        space: Players and steps, with the capacities of the budgets.
        prior: What each step costs about.
    """

    def __init__(
        self, session: Session, method: str, budgets: Sequence[Budget], space: SearchSpace, prior: Prior | None
    ) -> None:
        self._session, self._method, self._budgets = session, method, budgets
        self._space, self._prior = space, prior
        self._kept = dict.fromkeys(space.capacities, math.inf)
        self._told = dict(self._kept)

    def __call__(self, search: Search) -> None:
        """Save the plans that became better."""
        for budget, capacity in zip(self._budgets, self._space.capacities, strict=True):
            loss = search.measured.lowest(capacity)
            if loss < self._kept[capacity]:
                self._kept[capacity] = loss
                self._save(budget, capacity, search)
            if loss < self._told[capacity] * (1 - _TOLD):
                what = "first plan" if self._told[capacity] == math.inf else "better plan"
                _log.info("%s, %s: loss %.4f, %d measured so far", budget.text, what, loss, len(search.measured))
                self._told[capacity] = loss

    def _save(self, budget: Budget, capacity: int, search: Search) -> None:
        """Write a plan over the one before."""
        measured, chosen = search.measured, search.choose(capacity)
        choice = describe(self._space, capacity, self._method, chosen, measured, Spent(0, 0), self._prior)
        plan = make_plan(self._session, budget, choice).replace(stopped_after=f"{len(measured)} losses")
        self._session.folder.plans.mkdir(exist_ok=True)
        plan.save(self._session.folder.plans / plan.file_name)


def _rank(space: SearchSpace, search: Search, capacity: int) -> Assignments:
    """What a search chooses for a budget, then the best others that the search measured, shape (n, n_players)."""
    chosen = search.choose(capacity)
    best = space.assignments(search.measured.best(capacity, N_RIVALS))
    return np.concatenate([chosen[None], best[(best != chosen).any(axis=1)]])


def _decide(
    session: Session, space: SearchSpace, method: Method, ranked: dict[int, Assignments]
) -> tuple[dict[int, Assignments], Spent]:
    """The finalists of each budget, best first on all calibration sequences, and what measuring the finalists takes."""
    n_finalists = 1 if method.trusts_surrogate else _N_FINALISTS
    finalists = np.unique(np.concatenate([best[:n_finalists] for best in ranked.values()]), axis=0)
    with session.game("deciding") as game:
        deciding = Measured(space)
        deciding.add(finalists, game(finalists))
    decided = {capacity: space.assignments(deciding.best(capacity, len(finalists))) for capacity in space.capacities}
    unshared = len(finalists) * session.n_blocks
    return decided, Spent(prefix_tree_size(finalists, session.blocks), unshared)


def _search_name(method: str, space: SearchSpace, journal: Path) -> str:
    """A search's name in the search log."""
    widths = ",".join(map(str, space.widths))
    return f"{method} {widths} {space.capacities} seed {space.seed} in {journal.name}"
