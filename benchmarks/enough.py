"""How long the active search of many players and several widths should go on.

    python benchmarks/enough.py           # half an hour of one core; resumes

The fused layers of reference models of benchmarks/data are the players, 48 of them, with four widths; three budgets,
searched together on 1,024 tokens of C4, until every step between widths had six points, and as the search ends. Writes
docs/results/enough.md.
"""

import argparse

from rich.progress import Progress

from convert import DATA
from coopq.estimators.active import descent, most_points
from coopq.run import CalibrationConfig, RunConfig
from coopq.storage import Budget
from coopq.workbench import open_workbench
from main_job import bars_for
from openings import ROOT, head_of, row_of, searched

WORK, REPORT = ROOT / "build" / "enough", ROOT / "docs" / "results" / "enough.md"
CASES = {"qwen": "kl", "gemma": "nll"}
"""Loss."""
BUDGETS = ("2.5avg", "3.2avg", "4.5avg")
ENDS = {"six points a step": lambda setting: 6 * setting.n_steps, "as the search ends": most_points}
CHECKPOINTS = (400, 500, 600, 800)
"""Costs at which searches are looked at, in forwards of the whole model."""


def main() -> None:
    """All models."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = [
        "# How long the active search of several widths goes on",
        "",
        "Written by `python benchmarks/enough.py`: 48 fused layers of the reference models by `rtn`, 4 x 256 tokens of",
        f"C4, 2, 3, 4 and 8 bits, budgets of {', '.join(BUDGETS)} together. Cost in forwards of the model; the lowest",
        "loss found for each budget, nats per token, after so many and at the end.",
        "",
    ]
    for name, loss in CASES.items():
        config = RunConfig(
            str(DATA / name),
            "rtn",
            low=2,
            high=8,
            between=(3, 4),
            granularity="fused",
            loss=loss,
            calibration=CalibrationConfig("c4", 4, 256),
        )
        lines += head_of(f"{name}, {loss}", "points after the descent", CHECKPOINTS)
        with Progress() as bars, open_workbench(config, WORK / name, bars_for(bars, name)) as bench:
            for end, most in ENDS.items():
                trace = searched(bench, [Budget.parse(text) for text in BUDGETS], descent, most)
                lines.append(row_of(end, trace, CHECKPOINTS))
                print(lines[-1], flush=True)
        lines.append("")
    REPORT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
