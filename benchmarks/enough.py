"""How long the active search of several widths should go on.

    python benchmarks/enough.py                          # half an hour of one core; resumes
    python benchmarks/enough.py --granularity block      # minutes

The fused layers of reference models of benchmarks/data are the players, 48 of them, or the 12 blocks, with four widths;
three budgets, searched together on 1,024 tokens of C4, until every step between widths had some points, as every player
has where there are two, and as the search ends. Writes docs/results/enough-GRANULARITY.md.
"""

import argparse

from rich.progress import Progress

from convert import DATA
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.game.session import open_workbench
from coopq.search.strategies.active import descent, most_points
from main_job import bars_for
from openings import ROOT, head_of, row_of, searched

WORK, RESULTS = ROOT / "build" / "enough", ROOT / "docs" / "results"
CASES = {"qwen": "kl", "gemma": "nll"}
"""Loss."""
BUDGETS = ("2.5avg", "3.2avg", "4.5avg")
A_STEP = {"fused": 6, "block": 13}
CHECKPOINTS = {"fused": (400, 500, 600, 800), "block": (100, 120, 140, 200)}
"""Costs at which searches are looked at, in forwards of the whole model."""


def main() -> None:
    """All models."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--granularity", choices=A_STEP, default="fused", help="the players")
    granularity = arguments.parse_args().granularity
    a_step, checkpoints = A_STEP[granularity], CHECKPOINTS[granularity]
    players = {"fused": "48 fused layers", "block": "12 blocks"}[granularity]
    lines = [
        "# How long the active search of several widths goes on",
        "",
        f"Written by `python benchmarks/enough.py --granularity {granularity}`: {players} of the reference models by",
        f"`rtn`, 4 x 256 tokens of C4, 2, 3, 4 and 8 bits, budgets of {', '.join(BUDGETS)} together. Cost in forwards",
        "of the model; the lowest loss found for each budget, nats per token, after so many and at the end.",
        "",
    ]
    ends = {f"{a_step} points a step": lambda space: a_step * space.n_steps, "as the search ends": most_points}
    for name, loss in CASES.items():
        config = RunConfig(
            str(DATA / name),
            "rtn",
            low=2,
            high=8,
            between=(3, 4),
            granularity=granularity,
            loss=loss,
            calibration=CalibrationConfig("c4", 4, 256),
        )
        lines += head_of(f"{name}, {loss}", "points measured", checkpoints)
        folder = WORK / granularity / name
        with Progress() as bars, open_workbench(config, folder, bars_for(bars, name)) as bench:
            for end, limit in ends.items():
                trace = searched(bench, [Budget.parse(text) for text in BUDGETS], descent, limit)
                lines.append(row_of(end, trace, checkpoints))
                print(lines[-1], flush=True)
        lines.append("")
    report = RESULTS / f"enough-{granularity}.md"
    report.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
