"""How the active search of many players should start: with descents of different pace, or without a descent.

    python benchmarks/openings.py           # an hour of one core; resumes

The players are the 84 linear layers of each reference model of benchmarks/data. Three budgets are searched together on
1,024 tokens of C4. After every start the search measures the same number of points a player. Writes
docs/results/openings.md.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from _common import RESULTS, WORK, command_line, row, table, write_report
from _models import session_on, source_of
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.game.game import Meter
from coopq.game.session import Session
from coopq.plan.allocate import search_space
from coopq.plan.by_score import starts_by_scores
from coopq.search import ActiveSearch, Greedy, SearchSpace
from coopq.search.strategies.active import descent, most_points

CASES = {
    "llama": ("nll", (2, 4), ("2.3avg", "2.8avg", "3.4avg")),
    "gemma": ("nll", (2, 4), ("2.3avg", "2.8avg", "3.4avg")),
    "qwen": ("kl", (3, 4), ("3.15avg", "3.4avg", "3.7avg")),
}
"""Loss, widths and budgets of each model."""
OPENINGS: dict[str, Callable[[SearchSpace], Greedy | None]] = {
    "none: each alone, at both ends": lambda _: None,
    "4 moves, of a quarter": lambda s: Greedy(s, per_move=s.n_steps // 4, candidates=s.n_steps // 4),
    "8 moves, of a quarter": lambda s: Greedy(s, per_move=s.n_steps // 8, candidates=s.n_steps // 4),
    "32 moves, of a third": Greedy.paced,
}
CHECKPOINTS = (300, 500, 700)
"""Costs at which the report looks at searches, in forwards of the whole model."""

Trace = list[list[float]]
"""For each round of a search its cost, in forwards of the whole model, and the lowest loss of each budget."""


def trace_search(
    session: Session,
    budgets: Sequence[str],
    opening: Callable[[SearchSpace], Greedy | None] = descent,
    limit: Callable[[SearchSpace], int] = most_points,
) -> Trace:
    """Run an active search, and look at the search after each round.

    Args:
        session: An open session.
        budgets: Budgets that are searched together.
        opening: The descent to start with, if any.
        limit: Most points to measure, starts and descent not counted.
    """
    parsed = [Budget.parse(budget) for budget in budgets]
    space, blocks = search_space(session, parsed), session.blocks
    starts, scoring = starts_by_scores(session, parsed)
    search, trace = ActiveSearch(space, starts=starts, opening=opening, limit=limit), []
    with session.game("searching") as game:
        meter = Meter(game, blocks, np.zeros((0, len(blocks)), dtype=np.float32))
        while len(points := search.propose()):
            search.learn(points, meter(points))
            cost = (scoring + meter.block_forwards) / len(set(blocks))
            trace.append([cost, *(search.measured.lowest(capacity) for capacity in space.capacities)])
    return trace


def trace_head(title: str, variants: str, checkpoints: Sequence[int]) -> list[str]:
    """The head of a table with rows by `trace_row`."""
    columns = [variants, *(f"after {n}" for n in checkpoints), "at the end", "forwards"]
    return [f"## {title}", "", *table(columns, [])]


def trace_row(name: str, trace: Trace, checkpoints: Sequence[int]) -> str:
    """A row of a table: lowest losses at some costs and at the end, and the cost at the end."""
    reached = [next((found for found in reversed(trace) if found[0] <= n), None) for n in checkpoints]
    cells = ["" if found is None else ", ".join(map(shown, found[1:])) for found in (*reached, trace[-1])]
    return row([name, *cells, f"{trace[-1][0]:.0f}"])


def shown(loss: float) -> str:
    """A loss for people; infinity means that nothing is measured yet."""
    return f"{loss:.4f}" if math.isfinite(loss) else "-"


def main() -> None:
    """Measure all models and openings, and write the report."""
    command_line(__doc__).parse_args()
    lines = [
        "# How the active search of many players starts",
        "",
        "Written by `python benchmarks/openings.py`: 84 linear layers of the reference models by `rtn`, 4 x 256 tokens",
        "of C4, three budgets together. A descent takes the named number of moves from one end of the game to the",
        "other, and measures the named share of the players before each move. Cost in forwards of the model; the",
        "lowest loss found for each budget, nats per token, at some costs and at the end. The active search takes 8",
        "moves, of a quarter of the players.",
        "",
    ]
    for name, (loss, bits, budgets) in CASES.items():
        request = Request.from_options(
            model=source_of(name),
            backend="rtn",
            bits=bits,
            granularity="linear",
            loss=loss,
            tokens=1024,
            sequence_length=256,
        )
        title = f"{name}, {request.widths.text} bits, {loss}: {', '.join(budgets)}"
        lines += trace_head(title, "opening", CHECKPOINTS)
        with session_on(request, WORK / "openings" / name) as session:
            for opening, make in OPENINGS.items():
                lines.append(trace_row(opening, trace_search(session, budgets, make), CHECKPOINTS))
                print(lines[-1], flush=True)
        lines.append("")
    write_report(RESULTS / "openings.md", lines, quiet=True)


if __name__ == "__main__":
    main()
