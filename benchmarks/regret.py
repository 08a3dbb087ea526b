"""How far from the true optimum every estimator ends, by what it costs, on games whose optimum is known.

    python benchmarks/regret.py            # synthetic games; about a quarter of an hour on one core

Regret is (loss of the chosen assignment - optimum) / (mean loss of random assignments of the budget - optimum),
averaged over the budgets: 0 is the optimum and 1 is chance. Cost is the number of block forwards for all budgets
together, prefixes shared, in forwards of the whole model. Writes docs/results/regret.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from _common import RESULTS, command_line, table, write_report
from coopq.core.types import Assignment, Assignments, Game, Losses
from coopq.game.engines.prefix_engine import prefix_tree_size
from coopq.search import (
    SPQE,
    ActiveSearch,
    CrossLayer,
    Evolution,
    Greedy,
    OneShot,
    Regression,
    Search,
    SearchSpace,
    run,
    run_search,
)
from coopq.search.solver.exact import allocate
from coopq.search.solver.local_search import local_optima, neighbours, random_fill
from coopq.search.solver.quadratic_program import Steps, paper_program
from coopq.search.strategies.evolution import SHARES
from coopq.search.synthetic import HIGH, LOW, SyntheticGame

AVERAGES = (2.25, 2.5, 3.0, 3.5)
SIZES, SEEDS = (24, 32, 36), range(3)
CHECKPOINTS = (60, 100, 150, 200, 250)
"""Costs at which the report looks at the active search, in forwards of the whole model."""

SWAPS = 10
"""Exchanges measured at a time at each budget."""

Choose = Callable[[int], Assignment]
"""The assignment for a capacity."""
Rows = dict[str, list[float]]
"""Cost and regret of each method on a game."""


class Counted:
    """A game that keeps all losses, and counts block forwards.

    Args:
        game: The game.
        share: Share of the sequences that this game stands for.
        whole: The game on all sequences, which counts the forwards; None if this is that game.

    Attributes:
        forwards: Block forwards so far, prefixes shared, in forwards of the whole model.
        watch: Told of `forwards` before new assignments are measured.
    """

    def __init__(self, game: Game, share: float = 1.0, whole: "Counted | None" = None) -> None:
        self._game = game
        self._share = share
        self._whole = whole or self
        self._known: dict[bytes, float] = {}
        self.forwards = 0.0
        self.watch: Callable[[float], None] = lambda _: None

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, shape (n,); assignments that are new are counted."""
        new = np.array([x for x in np.unique(assignments, axis=0) if x.tobytes() not in self._known])
        if len(new):
            self.watch(self.forwards)
            self._whole.forwards += self._share * prefix_tree_size(new) / new.shape[1]
            self._known.update(zip((x.tobytes() for x in new), self._game(new).tolist(), strict=True))
        return np.array([self._known[x.tobytes()] for x in assignments])

    def part(self, share: float) -> "Counted":
        """The game on a share of the sequences; the forwards count for the whole game."""
        return self if share == 1.0 else Counted(self._game, share, self)


class Judge:
    """Regret of assignments of a game.

    Args:
        game: The game.
        space: Players and budgets.
        optima: The optimum of each budget.
    """

    def __init__(self, game: Game, space: SearchSpace, optima: list[Assignment]) -> None:
        self._game = game
        self._space = space
        self._best = game(np.array(optima))
        rng = np.random.default_rng(0)
        self._chance = [
            float(game(space.assignments(np.array([random_fill(space.constraint(c), rng) for _ in range(300)]))).mean())
            for c in space.capacities
        ]

    def __call__(self, choose: Choose) -> float:
        """Mean regret over the budgets."""
        chosen = [choose(capacity) for capacity in self._space.capacities]
        for assignment, capacity in zip(chosen, self._space.capacities, strict=True):
            assert self._space.step_bytes[assignment == HIGH].sum() <= capacity
        losses = self._game(np.array(chosen))
        return float(np.mean((losses - self._best) / (np.array(self._chance) - self._best)))


def synthetic(n_players: int, form: str, seed: int) -> tuple[Game, SearchSpace, list[Assignment]]:
    """A game, its budgets, and the optimum of each budget, by many descents on the quadratic behind the game."""
    game = SyntheticGame(n_players, form, seed)
    capacities = tuple(int((average - LOW) / (HIGH - LOW) * n_players + 1e-9) for average in AVERAGES)
    space = SearchSpace.uniform((LOW, HIGH), np.ones(n_players, dtype=np.int64), capacities, seed)
    optima = []
    for capacity in capacities:
        program = replace(space.constraint(capacity), a=game.a, K=game.K)
        best = local_optima(program, np.zeros((0, n_players), bool), 500, np.random.default_rng(0))[0]
        optima.append(space.assignments(best))
    return game, space, optima


class AntitheticSPQE(SPQE):
    """SPQE whose every second walk is the walk before in reverse order.

    A pair of walks gives exact Shapley values for games of single and pair terms, and tells half as much about pairs.

    Source: Mitchell et al., Sampling Permutations for Shapley Value Estimation, 2022.
    """

    @staticmethod
    def order(n_players: int, seed: int, m: int) -> npt.NDArray[np.intp]:
        """The players in the order in which walk m lowers them, shape (n_players,)."""
        return SPQE.order(n_players, seed, m // 2)[:: -1 if m % 2 else 1]


def by_paper(space: SearchSpace, game: Game, *, walks: int, make: type[SPQE] = SPQE) -> Choose:
    """The paper's method, or a variant with other walks."""
    spqe = make(space.n_players, low=LOW, high=HIGH, permutations=walks, seed=space.seed)
    estimate = run(spqe, game).estimate()

    def choose(capacity: int) -> Assignment:
        program = paper_program(estimate.shapley, estimate.covariance, 0.5, space.step_bytes, capacity)
        return space.assignments(allocate(program).q)

    return choose


def by_search(space: SearchSpace, game: Game, *, make: Callable[[SearchSpace], Search]) -> Choose:
    """A search strategy."""
    return run(make(space), game).choose


def by_evolution(space: SearchSpace, game: Counted) -> Choose:
    """EvoPress. These games have no sequences: a loss on a share of the sequences is exact, and costs that share."""
    return run_search(Evolution(space), {share: game.part(share) for share in SHARES}.__getitem__).choose


class GreedyWithSwaps(Greedy):
    """Improves the best assignment of each budget after the path.

    Every step is flipped alone, and the exchanges that these flips promise most of are measured, as long as one
    exchange helps.
    """

    def __init__(self, space: SearchSpace, **options: Any) -> None:
        super().__init__(space, **options)
        self._exchanged: dict[int, bytes] = {}

    def propose(self) -> Assignments:
        """The path; then flips and exchanges at the budgets."""
        path = super().propose()
        if len(path):
            return path
        found = [q for capacity in self._space.capacities for q in self._exchanges(capacity)]
        return self._space.assignments(np.array(found, dtype=bool).reshape(-1, self._space.n_steps))

    def _exchanges(self, capacity: int) -> list[Steps]:
        """Flips of single steps at a budget's best point if the point is new, then the most promising exchanges."""
        best = self.measured.best(capacity)[0]
        free = np.flatnonzero(np.logical_or(*self._space.constraint(0).movable(best)))
        flips = best ^ np.eye(len(best), dtype=bool)[free]
        unknown = [q for q in flips if q not in self.measured]
        if unknown:
            return unknown
        if self._exchanged.get(capacity) == best.tobytes():  # no exchange at this point was better
            return []
        self._exchanged[capacity] = best.tobytes()
        origin = self.measured.loss(best)
        change = np.zeros(len(best))
        change[free] = np.array([self.measured.loss(q) for q in flips]) - origin
        exchanges = neighbours(self._space.constraint(capacity), best)
        promise = ((exchanges ^ best) * change).sum(axis=1)
        fresh = [q for q in exchanges[np.argsort(promise, kind="stable")] if q not in self.measured]
        return fresh[:SWAPS]


METHODS: dict[str, Callable[[SearchSpace, Counted], Choose]] = {
    "coopq, M = 10": partial(by_paper, walks=10),
    "coopq, M = 50": partial(by_paper, walks=50),
    "coopq, M = 100": partial(by_paper, walks=100),
    "coopq antithetic, M = 10": partial(by_paper, walks=10, make=AntitheticSPQE),
    "coopq antithetic, M = 50": partial(by_paper, walks=50, make=AntitheticSPQE),
    "one-shot, at all high": partial(by_search, make=partial(OneShot, end="high")),
    "one-shot, at all low": partial(by_search, make=partial(OneShot, end="low")),
    "evopress": by_evolution,
    "cross-layer": partial(by_search, make=CrossLayer),
    "regression, order 1, 250 points": partial(by_search, make=partial(Regression, n_points=250, order=1)),
    "regression, order 2, 250 points": partial(by_search, make=partial(Regression, n_points=250)),
    "greedy down": partial(by_search, make=Greedy),
    "greedy up": partial(by_search, make=partial(Greedy, direction="up")),
    "greedy down, 4 a move": partial(by_search, make=partial(Greedy, per_move=4)),
    "greedy up, 4 a move": partial(by_search, make=partial(Greedy, direction="up", per_move=4)),
    "greedy down, 12 candidates": partial(by_search, make=partial(Greedy, candidates=12)),
    "greedy up, 4 a move, 10 swaps": partial(by_search, make=partial(GreedyWithSwaps, direction="up", per_move=4)),
    "greedy down, 12 candidates, 10 swaps": partial(by_search, make=partial(GreedyWithSwaps, candidates=12)),
    "active": partial(by_search, make=ActiveSearch),
}


def measure(game: Game, space: SearchSpace, optima: list[Assignment]) -> Rows:
    """Cost and regret of every method on one game; the active search also at the checkpoints."""
    judge = Judge(game, space, optima)
    rows: Rows = {}
    for name, method in METHODS.items():
        if name == "active":
            continue
        counted = Counted(game)
        regret = judge(method(space, counted))
        rows[name] = [counted.forwards, regret]
    counted, search = Counted(game), ActiveSearch(space)
    trace: list[list[float]] = []
    counted.watch = lambda forwards: trace.append([forwards, judge(search.choose)]) if len(search.measured) else None
    run(search, counted)
    trace.append([counted.forwards, judge(search.choose)])
    rows["active"] = trace[-1]
    for limit in CHECKPOINTS:
        within = [point for point in trace if point[0] <= limit]
        if within:
            rows[f"active, within {limit}"] = within[-1]
    return rows


def describe(groups: dict[str, list[Rows]]) -> list[str]:
    """The report: mean regret by method and form of game, with the standard error over games."""
    rows = []
    for name in dict.fromkeys(name for games in groups.values() for game in games for name in game):
        by_form = [[game[name] for game in games if name in game] for games in groups.values()]
        every = [found for form in by_form for found in form]
        cells = [mean_regret([regret for _, regret in found]) for found in (*by_form, every)]
        rows.append([name, f"{np.mean([cost for cost, _ in every]):.0f}", *cells])
    return [
        "Written by `python benchmarks/regret.py`. Regret is 0 at the optimum and 1 at the mean of random assignments,",
        f"averaged over the budgets {', '.join(f'{a}avg' for a in AVERAGES)}; cost is block forwards with shared",
        "prefixes for all budgets together, in forwards of the whole model. Mean ± standard error over games.",
        "",
        f"Synthetic games: {len(SIZES)} sizes (L = {', '.join(map(str, SIZES))}), {len(SEEDS)} seeds each.",
        "",
        *table(["method", "cost", *groups, "all"], rows),
    ]


def mean_regret(values: Iterable[float]) -> str:
    """Mean of regrets and its standard error, for people."""
    x = np.array(list(values))
    return f"{x.mean():.4f} ± {x.std(ddof=1) / np.sqrt(len(x)):.4f}" if len(x) > 1 else f"{x.mean():.4f}"


def main() -> None:
    """Play all games, and write the report."""
    command_line(__doc__).parse_args()
    jobs = [(form, size, seed) for form in SyntheticGame.FORMS for size in SIZES for seed in SEEDS]
    groups: dict[str, list[Rows]] = {form: [] for form in SyntheticGame.FORMS}
    for form, size, seed in track(jobs, description="games"):
        groups[form].append(measure(*synthetic(size, form, seed)))
    write_report(RESULTS / "regret.md", describe(groups))


if __name__ == "__main__":
    main()
