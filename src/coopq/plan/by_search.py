"""Plans by searches on the true loss."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from coopq.plan.search_log import Beginnings
from coopq.game.prefix_engine import prefix_tree_size
from coopq.core.errors import InfeasibleBudget
from coopq.search import (
    ActiveSearch,
    CrossLayer,
    Enumeration,
    Evolution,
    Greedy,
    Known,
    Measured,
    OneShot,
    Regression,
    Search,
    Setting,
    run_estimator,
    run_search,
)
from coopq.game.game import Meter, Meters
from coopq.plan.by_score import starts_on
from coopq.plan.plan import Plan, plan_search, setting_of
from coopq.core.sizes import Budget
from coopq.core.types import Assignments, Game
from coopq.game.session import Workbench

_POINTS_PER_PLAYER = 8
"""Coalitions that the regression measures for each player."""
_FINALISTS = 8
"""Assignments of each budget that a search with screening measures on the whole calibration set."""

SEARCHES: dict[str, Callable[[Setting, Known, Assignments], Search]] = {
    "active": ActiveSearch,
    "greedy-down": lambda setting, *_: Greedy.paced(setting, "down"),
    "greedy-up": lambda setting, *_: Greedy.paced(setting, "up"),
    "regression": lambda setting, known, _: Regression(setting, known, n_points=_POINTS_PER_PLAYER * setting.n_steps),
    "cross-layer": lambda setting, *_: CrossLayer(setting),
    "one-shot-high": lambda setting, *_: OneShot(setting, "high"),
    "one-shot-low": lambda setting, *_: OneShot(setting, "low"),
    "evopress": lambda setting, *_: Evolution(setting),
    "exact": lambda setting, *_: Enumeration(setting),
}
LEARNERS = ("active", "regression")
"""Searches that learn from what was measured before them; the others only find it measured."""
BELIEVERS = ("regression", "cross-layer", "one-shot-high", "one-shot-low")
"""Searches that choose what their surrogate thinks best, measured or not."""


def plans_by_search(bench: Workbench, method: str, budgets: Sequence[Budget], time_limit: float | None) -> list[Plan]:
    """Plans by a search on the true loss: on the screening sequences, and decided on all of them."""
    setting, blocks = setting_of(bench, budgets), [player.block for player in bench.players]
    nowhere = np.zeros((0, setting.n_steps), dtype=bool)
    starts, scoring = starts_on(bench, budgets) if method == "active" else (setting.assignments(nowhere), 0)
    with bench.screening_game(f"searching, {method}") as game:
        name = _search_name(method, setting, game.journal.path)
        knows = Beginnings(bench.folder.path).known(name, game.journal) if method in LEARNERS else 0
        known = game.journal.first(knows)
        search, meters = _run(bench, SEARCHES[method](setting, known, starts), game, known[0])
    layer_forwards = scoring + round(meters.layer_forwards * bench.screening_share)
    unshared = scoring + round(meters.evaluations * bench.screening_share) * len(set(blocks))
    ranked = {c: _ranked(setting, search, c) for c in setting.capacities}
    if bench.screening_share < 1:
        n_finalists = 1 if method in BELIEVERS else _FINALISTS
        finalists = np.unique(np.concatenate([of[:n_finalists] for of in ranked.values()]), axis=0)
        with bench.calibration_game("deciding") as game:
            deciding = Measured(setting)
            deciding.add(finalists, game(finalists))
        ranked = {c: setting.assignments(deciding.best(c, 2)) for c in setting.capacities}
        layer_forwards += prefix_tree_size(finalists, blocks)
        unshared += len(finalists) * len(set(blocks))
    plans = []
    for budget, capacity in zip(bench.each(f"solving the program, {method}", budgets), setting.capacities, strict=True):
        chosen, *others = ranked[capacity]
        plan = plan_search(
            bench,
            method,
            chosen,
            budget,
            measured=search.measured,
            runner_up=others[0] if others else None,
            layer_forwards=layer_forwards,
            layer_forwards_unshared=unshared,
            time_limit=time_limit,
        )
        # What was fitted to the screening sequences predicts no loss of all of them.
        plans.append(plan if bench.screening_share == 1 else dataclasses.replace(plan, predicted_loss=None))
    return plans


def _run(bench: Workbench, search: Search, game: Game, known: Assignments) -> tuple[Search, Meters]:
    """Run a search; the meters of what it took."""
    with ExitStack() as stack:

        def game_of(n: int) -> Game:
            part = bench.first_sequences(n, "searching, evopress")
            return game if n == bench.n_screening else stack.enter_context(part)

        meters = Meters(game_of, bench.n_screening, [player.block for player in bench.players], known)
        return run_search(search, meters), meters


def smallest_on(bench: Workbench, max_loss: float, *, time_limit: float | None = None) -> Plan:
    """The plan of the smallest size whose loss, truly measured on the calibration set, stays under a limit.

    Sizes are bisected, to a hundredth of what lies between the widths; at each an active search goes on from all that
    is measured.

    Raises:
        InfeasibleBudget: If every player at the high width loses more.
    """
    whole, blocks = setting_of(bench), [player.block for player in bench.players]
    low, high = 0, int(whole.costs.sum())
    with bench.calibration_game("searching the smallest size") as game:
        name = _search_name(f"at most {max_loss}", whole, game.journal.path)
        known = game.journal.first(Beginnings(bench.folder.path).known(name, game.journal))
        meter, measured = Meter(game, blocks, known[0]), Measured(whole)
        measured.add(*known)
        ends = whole.assignments(np.array([[False], [True]]).repeat(whole.n_steps, axis=1))
        losses = meter(ends)
        measured.add(ends, losses)
        if losses[0] > max_loss:
            raise InfeasibleBudget(
                f"a loss of {max_loss} cannot be kept: with every player at {whole.widths[-1]} bits it is "
                f"{losses[0]:.4f}; allow more, or take wider widths"
            )
        if losses[1] <= max_loss:
            high = 0
        while high - low > max(int(whole.costs.min()), int(whole.costs.sum()) // 100):
            middle = (low + high) // 2
            setting = dataclasses.replace(whole, capacities=(middle,))
            search = run_estimator(ActiveSearch(setting, measured.known()), meter)
            measured = search.measured
            if measured.lowest(middle) <= max_loss:
                high = int(measured.raised_bytes[measured.losses <= max_loss].min())
            else:
                low = middle
    chosen, *others = whole.assignments(measured.best(high, 2))
    n_bytes = bench.storage.bytes_of(chosen)
    plan = plan_search(
        bench,
        "active",
        chosen,
        Budget.parse(f"{n_bytes}B"),
        measured=measured,
        runner_up=others[0] if others else None,
        layer_forwards=meter.layer_forwards,
        layer_forwards_unshared=meter.evaluations * len(set(blocks)),
        time_limit=time_limit,
    )
    return dataclasses.replace(plan, max_loss=max_loss)


def _ranked(setting: Setting, search: Search, capacity: int) -> Assignments:
    """What a search chooses for a budget, then the best of what else it measured, shape (n, n_players)."""
    chosen = search.choose(capacity)
    best = setting.assignments(search.measured.best(capacity, _FINALISTS))
    return np.concatenate([chosen[None], best[(best != chosen).any(axis=1)]])


def begin_with_nothing(bench: Workbench, methods: Sequence[str], budgets: Sequence[Budget]) -> None:
    """Let searches that have not begun know nothing of what others have measured, as where methods are compared."""
    setting, path = setting_of(bench, budgets), bench.folder.journal
    for method in (method for method in methods if method in LEARNERS):
        Beginnings(bench.folder.path).from_nothing(_search_name(method, setting, path))


def _search_name(method: str, setting: Setting, journal: Path) -> str:
    widths = ",".join(map(str, setting.widths))
    return f"{method} {widths} {setting.capacities} seed {setting.seed} in {journal.name}"
