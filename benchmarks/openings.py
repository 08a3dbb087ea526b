"""How the active search of many players should open: descents of several paces, and none.

    python benchmarks/openings.py           # an hour of one core; resumes

The linear layers of the reference models of benchmarks/data are the players, 84 of them; three budgets, searched
together on 1,024 tokens of C4. Every opening is followed by as many points a player. Writes docs/results/openings.md.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.progress import Progress

from convert import DATA
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.game.game import Meter
from coopq.game.session import Workbench, open_workbench
from coopq.plan.allocate import search_space
from coopq.plan.by_score import starts_on
from coopq.search import ActiveSearch, Greedy, SearchSpace
from coopq.search.strategies.active import most_points
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, REPORT = ROOT / "build" / "openings", ROOT / "docs" / "results" / "openings.md"
CASES = {
    "llama": ("nll", 2, 4, ("2.3avg", "2.8avg", "3.4avg")),
    "gemma": ("nll", 2, 4, ("2.3avg", "2.8avg", "3.4avg")),
    "qwen": ("kl", 3, 4, ("3.15avg", "3.4avg", "3.7avg")),
}
"""Loss, widths, budgets."""
OPENINGS: dict[str, Callable[[SearchSpace], Greedy | None]] = {
    "none: each alone, at both ends": lambda _: None,
    "4 steps, of a quarter": lambda s: Greedy(s, per_move=s.n_steps // 4, candidates=s.n_steps // 4),
    "8 steps, of a quarter": lambda s: Greedy(s, per_move=s.n_steps // 8, candidates=s.n_steps // 4),
    "32 steps, of a third": Greedy.paced,
}
CHECKPOINTS = (300, 500, 700)
"""Costs at which searches are looked at, in forwards of the whole model."""


def searched(
    bench: Workbench,
    budgets: list[Budget],
    opening: Callable[[SearchSpace], Greedy | None],
    limit: Callable[[SearchSpace], int] = most_points,
) -> list[list[float]]:
    """Cost and lowest loss of every budget, round by round, shape (n_rounds, 1 + n_budgets)."""
    space = search_space(bench, budgets)
    starts, scoring = starts_on(bench, budgets)
    blocks = [player.block for player in bench.players]
    search, trace = ActiveSearch(space, starts=starts, opening=opening, limit=limit), []
    with bench.calibration_game("searching") as game:
        meter = Meter(game, blocks, np.zeros((0, len(blocks)), dtype=np.float32))
        while len(points := search.propose()):
            search.learn(points, meter(points))
            cost = (scoring + meter.layer_forwards) / len(set(blocks))
            trace.append([cost, *(search.measured.lowest(capacity) for capacity in space.capacities)])
    return trace


def head_of(title: str, variants: str, checkpoints: tuple[int, ...]) -> list[str]:
    """The head of a table of `row_of`."""
    return [
        f"## {title}",
        "",
        f"| {variants} | {' | '.join(f'after {n}' for n in checkpoints)} | at the end | forwards |",
        f"| --- |{' --- |' * (len(checkpoints) + 2)}",
    ]


def row_of(name: str, trace: list[list[float]], checkpoints: tuple[int, ...]) -> str:
    """A row of a table: lowest losses at some costs and at the end, and what the end cost."""
    reached = [next((row for row in reversed(trace) if row[0] <= n), None) for n in checkpoints]
    cells = ["" if row is None else ", ".join(map(shown, row[1:])) for row in (*reached, trace[-1])]
    return f"| {name} | {' | '.join(cells)} | {trace[-1][0]:.0f} |"


def shown(loss: float) -> str:
    """A loss for people; none is known yet where it is infinite."""
    return f"{loss:.4f}" if math.isfinite(loss) else "-"


def main() -> None:
    """All models and openings."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = [
        "# How the active search of many players opens",
        "",
        "Written by `python benchmarks/openings.py`: 84 linear layers of the reference models by `rtn`, 4 x 256 tokens",
        "of C4, three budgets together. A descent lowers so many players a step that it takes as many steps as named",
        "from one end of the game to the other, and measures a share of the players in each. Cost in forwards of the",
        "model; the lowest loss found for each budget, nats per token, after so many and at the end. The active",
        "search takes 8 steps, of a quarter of the players.",
        "",
    ]
    for name, (loss, low, high, texts) in CASES.items():
        config = RunConfig(
            str(DATA / name),
            "rtn",
            low=low,
            high=high,
            granularity="linear",
            loss=loss,
            calibration=CalibrationConfig("c4", 4, 256),
        )
        lines += head_of(f"{name}, {low} and {high} bits, {loss}: {', '.join(texts)}", "opening", CHECKPOINTS)
        budgets = [Budget.parse(text) for text in texts]
        with Progress() as bars, open_workbench(config, WORK / name, bars_for(bars, name)) as bench:
            for opening, make in OPENINGS.items():
                lines.append(row_of(opening, searched(bench, budgets, make), CHECKPOINTS))
                print(lines[-1], flush=True)
        lines.append("")
    REPORT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
