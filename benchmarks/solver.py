"""How long SCIP and HiGHS take to solve the program of a budget, and how well descents do without a proof.

    python benchmarks/solver.py        # five minutes on one core

Three kinds of programs: the paper's, with the covariance of walks as K (positive semidefinite); interactions of a
synthetic game (indefinite); and the surrogates that the active search fits (indefinite), of players with two and with
four widths. The budget is half of the bytes between the ends. Both solvers get the same linear program. Writes
docs/results/solver.md.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import numpy as np

from _common import command_and_page, command_line, row, table, write_report
from _highs import allocate_by_highs
from coopq.search import ActiveSearch, SearchSpace, run
from coopq.search.solver.exact import Allocation, allocate, near_optimum
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.search.surrogate import best_surrogate
from coopq.search.synthetic import SteppedGame, SyntheticGame

WALKS = 50
SEEDS = range(2)
SIZES, FITTED_SIZES = (32, 64, 128, 300), (12, 24, 32)
MOST_BRANCHED = 64
"""Steps up to which branch and bound gets a game's interactions: at 128 steps SCIP proves nothing in a minute."""
WIDTHS = {"two": (2, 4), "four": (2, 3, 4, 8)}
FITTED_POINTS_PER_STEP = 6
"""Points that a surrogate is fitted to, for each step: as the search of several widths measures."""


@dataclass(frozen=True)
class Solved:
    """What a solver makes of a program.

    Attributes:
        seconds: Processor time.
        solution: The solution with its bound.
    """

    seconds: float
    solution: Allocation


def paper_like(n_players: int, seed: int) -> QuadraticProgram:
    """The paper's program of a synthetic game: K is the covariance of permutation walks."""
    game = SyntheticGame(n_players, "quadratic", seed)
    rng = np.random.default_rng(seed)
    marginals = []
    for _ in range(WALKS):
        order = rng.permutation(n_players)
        before = np.zeros((n_players, n_players))
        before[order] = np.tril(np.ones((n_players, n_players)), -1)[:, np.argsort(order)]
        marginals.append(game.a + 2 * (game.K * before).sum(axis=1))
    samples = np.array(marginals)
    covariance = np.cov(samples, rowvar=False).astype(np.float64)
    return paper_program(samples.mean(axis=0), covariance, 0.5, np.ones(n_players, dtype=np.int64), n_players // 2)


def game_like(n_players: int, seed: int) -> QuadraticProgram:
    """The program of a synthetic game: K is the game's own interactions."""
    game = SyntheticGame(n_players, "quadratic", seed)
    return QuadraticProgram.two_widths(game.a, game.K, np.ones(n_players, dtype=np.int64), n_players // 2)


def fitted(n_steps: int, seed: int, *, widths: tuple[int, ...]) -> QuadraticProgram:
    """The surrogate of an active search on a synthetic game that is no quadratic.

    Steps that are left over after players with all widths belong to a player with the lowest widths.
    """
    n_whole, n_left = divmod(n_steps, len(widths) - 1)
    player_widths = (widths,) * n_whole + ((widths[: n_left + 1],) if n_left else ())
    step_bytes = np.array([high - low for own in player_widths for low, high in reversed(list(pairwise(own)))])
    capacity = int(step_bytes.sum()) // 2
    space = SearchSpace(player_widths, step_bytes, (capacity,), seed)
    game = SteppedGame(SyntheticGame(n_steps, "super-linear", seed), space)
    search = run(ActiveSearch(space, limit=FITTED_POINTS_PER_STEP * n_steps), game)
    return best_surrogate(search.measured.surrogates(capacity)).program(space.constraint(capacity))


def programs() -> Iterator[tuple[str, int, Callable[[int, int], QuadraticProgram]]]:
    """Kinds of programs with their numbers of steps, and what makes one from the number and a seed."""
    for n in SIZES:
        yield "the paper's, positive semidefinite", n, paper_like
    for n in SIZES:
        yield "a game's interactions, indefinite", n, game_like
    for name, widths in WIDTHS.items():
        for n in FITTED_SIZES:
            yield f"fitted, {name} widths, indefinite", n, partial(fitted, widths=widths)


def timed(solve: Callable[[QuadraticProgram], Allocation], program: QuadraticProgram) -> Solved:
    """What a solver makes of a program."""
    start = time.process_time()
    solution = solve(program)
    return Solved(time.process_time() - start, solution)


def cells(solved: Sequence[Solved]) -> list[str]:
    """Longest time, programs proven, and worst gap of a solver."""
    n_proven = sum(one.solution.status == "optimal" for one in solved)
    longest, widest = max(one.seconds for one in solved), max(one.solution.gap for one in solved)
    return [f"{longest:.2f}", f"{n_proven} of {len(solved)}", f"{widest:.1%}"]


def compare(made: Sequence[QuadraticProgram], limit: float | None) -> list[str]:
    """The cells of a row: both solvers, unless the limit is None, then descents, then objectives above the best."""
    solvers: list[Callable[[QuadraticProgram], Allocation]] = [near_optimum]
    if limit is not None:
        solvers = [partial(allocate, time_limit=limit), partial(allocate_by_highs, time_limit=limit), near_optimum]
    groups = [[timed(solver, program) for program in made] for solver in solvers]
    *branched, descents = ([one.solution.objective for one in group] for group in groups)
    best = np.min([*branched, descents], axis=0)
    above = [float((np.array(objectives) - best).max()) for objectives in (*branched, descents)]
    seconds, _, gap = cells(groups[-1])
    proofs = [cell for group in groups[:-1] for cell in cells(group)] or [""] * 6
    return [*proofs, seconds, gap, ", ".join("0" if value < 1e-9 else f"{value:.1e}" for value in above)]


def main() -> None:
    """Solve all programs and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--time-limit", type=float, default=15.0, help="seconds for branch and bound, each program")
    options = parser.parse_args()
    limit, (command, page) = options.time_limit, command_and_page(parser, options, "solver")
    lines = [
        f"Written by `{command}`, at most {limit:g} seconds a program; pyscipopt {version('pyscipopt')}, HiGHS of",
        f"scipy {version('scipy')}, one thread. Programs: K is the covariance of {WALKS} walks (the paper's), the",
        "interactions of a synthetic game, or what the active search fits to losses of a synthetic game that is no",
        "quadratic, for players with two widths or with four. Budget: half of the bytes between the ends.",
        f"{len(SEEDS)} seeds: the longest processor time, the worst gap, (objective - bound) / |objective|, and the",
        "worst objective above the best of all. SCIP and HiGHS solve the same program with linearised products. SCIP",
        "starts from the best of 30 descents. scipy hands HiGHS no start, so an unproven solution of HiGHS is the",
        "better of HiGHS's and the descents'. Descents have the bound of `coopq.search.solver.lower_bound`; both",
        "solvers have the better of this bound and their own.",
        "",
    ]
    head = [
        "K",
        "steps",
        *(f"{solver}: {what}" for solver in ("SCIP", "HiGHS") for what in ("seconds", "proven", "gap")),
    ]
    lines += table([*head, "descents: seconds", "descents: gap", "objectives above the best"], [])
    for kind, n_steps, make in programs():
        is_branched = make is not game_like or n_steps <= MOST_BRANCHED
        found = compare([make(n_steps, seed) for seed in SEEDS], limit if is_branched else None)
        lines.append(row([kind, n_steps, *found]))
        print(lines[-1], flush=True)
        write_report(page, lines, quiet=True)


if __name__ == "__main__":
    main()
