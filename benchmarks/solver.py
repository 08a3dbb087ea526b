"""How long programs of a budget take to solve, and how well they are solved.

    python benchmarks/solver.py --time-limit 60

Two kinds of K: covariances of walks (positive semidefinite, as the paper's) and random interactions (indefinite, as
fitted ones), each for a budget of half the players. Writes docs/results/solver.md.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from coopq.search.solver.exact import Allocation, allocate, near_optimum
from coopq.search.solver.quadratic_program import QuadraticProgram, paper_program
from coopq.search.synthetic import SyntheticGame

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "solver.md"
SIZES = (32, 64, 128, 300)
WALKS = 50
SEEDS = range(3)


def program(kind: str, n_players: int, seed: int) -> QuadraticProgram:
    """A program of a synthetic game: with the covariance of its walks, or with its interactions."""
    game = SyntheticGame(n_players, "quadratic", seed)
    step_bytes = np.ones(n_players, dtype=np.int64)
    if kind == "indefinite":
        return QuadraticProgram.two_widths(game.a, game.K, step_bytes, n_players // 2)
    rng = np.random.default_rng(seed)
    marginals = []
    for _ in range(WALKS):
        order = rng.permutation(n_players)
        before = np.zeros((n_players, n_players))
        before[order] = np.tril(np.ones((n_players, n_players)), -1)[:, np.argsort(order)]
        marginals.append(game.a + 2 * (game.K * before).sum(axis=1))
    samples = np.array(marginals)
    covariance = np.cov(samples, rowvar=False).astype(np.float64)
    return paper_program(samples.mean(axis=0), covariance, 0.5, step_bytes, n_players // 2)


def timed(solve: Callable[[QuadraticProgram], Allocation], of: QuadraticProgram) -> tuple[float, Allocation]:
    """Seconds and the solution."""
    start = time.perf_counter()
    found = solve(of)
    return time.perf_counter() - start, found


def main() -> None:
    """Solve all programs both ways and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for branch and bound")
    limit = parser.parse_args().time_limit
    lines = [
        "# Solving the program of a budget",
        "",
        f"Written by `python benchmarks/solver.py --time-limit {limit:g}`; pyscipopt {version('pyscipopt')}, one",
        "thread. K is the covariance of 50 walks (positive semidefinite) or the game's own interactions (indefinite);",
        f"budget: half the players; {len(SEEDS)} seeds. Gap: (objective - bound) / |objective|; the worst is shown,",
        "and the longest time. Branch and bound is SCIP's from the best of 30 descents; near optimum is those descents",
        "with the bound of a convex relaxation, which is also the bound of branch and bound where its own is worse.",
        "",
        "| K | players | branch and bound: seconds | proven | gap | near optimum: seconds | gap | worse objective |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in ("positive semidefinite", "indefinite"):
        for n_players in SIZES:
            programs = [program(kind, n_players, seed) for seed in SEEDS]
            exact = [timed(partial(allocate, time_limit=limit), of) for of in programs]
            near = [timed(near_optimum, of) for of in programs]
            worse = [n.objective - e.objective for (_, e), (_, n) in zip(exact, near, strict=True)]
            proven = sum(e.status == "optimal" for _, e in exact)
            seconds = [max(t for t, _ in of) for of in (exact, near)]
            gaps = [max(found.gap for _, found in of) for of in (exact, near)]
            lines.append(
                f"| {kind} | {n_players} | {seconds[0]:.1f} | {proven} of {len(SEEDS)} | {gaps[0]:.2%} "
                f"| {seconds[1]:.1f} | {gaps[1]:.2%} | {max(worse):.1e} |"
            )
            print(lines[-1], flush=True)
            RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
