"""Searched with a cheap quantizer, deployed by a strong one: what is lost to searching with the strong one.

    python benchmarks/deployed.py            # two hours on one core, nearly all of it AutoRound's; resumes

Plans of the active search on the banks of `hqq` and `autoround`, 2 and 4 bits by block; both saved by `autoround`, the
first by `hqq` too; the saved models judged on WikiText-2. And how alike the two banks order random assignments.
Writes docs/results/deployed.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from coopq import pipeline
from coopq.judge.references import random_assignments
from coopq.model.texts import wikitext2
from coopq.export.checkpoint import is_saved_model
from coopq.plan.methods import measure, plans_on
from coopq.plan.plan import Plan
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import Losses
from coopq.game.session import open_workbench
from gptq_static import judged
from main_job import bars_for
from quantizers import above, perplexity, write_report

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "deployed", ROOT / "docs" / "results" / "deployed.md"
DATA = ROOT / "benchmarks" / "data"
CHEAP, STRONG = "hqq", "autoround"
TEXT = CalibrationConfig(sequences=8, length=512)
BUDGETS = ("2.25avg", "2.5avg", "3avg")
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512
RANDOM, SEED = 100, 0


@dataclass(frozen=True)
class Search:
    """What one quantizer's weights say.

    Attributes:
        plans: For each budget the plan of the active search.
        random: For each budget the calibration losses of random assignments, shape (RANDOM,).
        text: Windows of WikiText-2, to judge on.
    """

    plans: list[Plan]
    random: list[Losses]
    text: npt.NDArray[np.int64]


def searched(name: str, backend: str, bars: Progress) -> Search:
    """A model, searched with the weights of a backend."""
    folder = WORK / f"{name}-{backend}"
    config = RunConfig(str(DATA / name), backend, GROUP, 2, 4, calibration=TEXT)
    with open_workbench(config, folder, bars_for(bars, folder.name)) as bench:
        budgets = [Budget.parse(budget) for budget in BUDGETS]
        plans = [measure(bench, plan) for plan in plans_on(bench, "active", budgets)]
        with bench.calibration_game("random assignments") as game:
            drawn = [random_assignments(bench.storage, config.widths, of.budget_bytes, RANDOM, SEED) for of in plans]
            losses = [game(points) for points in drawn]
        text = wikitext2(bench.loaded.tokenizer, WINDOW, JUDGE_TOKENS).tokens
    return Search(plans, losses, text)


def served(name: str, plan: Plan, backend: str, text: npt.NDArray[np.int64], bars: Progress) -> tuple[Plan, Losses]:
    """The plan of the model that a backend saves, and that model's losses on tokens."""
    own = str(plan.quantizer["name"])
    folder = WORK / f"{name}-{own}-by-{backend}" / plan.budget
    if not is_saved_model(folder):
        other: dict[str, Any] = {} if backend == own else {"backend": backend, "group_size": GROUP}
        pipeline.apply(plan, folder, progress=bars_for(bars, f"{own} by {backend}, {plan.budget}"), **other)
    return judged(folder, text)


def run(name: str, bars: Progress) -> list[str]:
    """The rows of a model."""
    cheap, strong = (searched(name, backend, bars) for backend in (CHEAP, STRONG))
    lines = [
        "",
        f"## {name}",
        "",
        f"| budget | {CHEAP} by {CHEAP} | {CHEAP} by {STRONG} | {STRONG} by {STRONG} | its own plan is worth "
        f"| {STRONG}: measured | saved | players apart | order alike |",
        "| --- |" + " --- |" * 8,
    ]
    for k, budget in enumerate(BUDGETS):
        ours, theirs = cheap.plans[k], strong.plans[k]
        _, before = served(name, ours, CHEAP, cheap.text, bars)
        _, moved = served(name, ours, STRONG, cheap.text, bars)
        saved, own = served(name, theirs, STRONG, cheap.text, bars)
        apart = sum(a != b for a, b in zip(ours.assignment, theirs.assignment, strict=True))
        ranks = np.argsort(np.argsort([cheap.random[k], strong.random[k]], axis=1), axis=1)
        alike = np.corrcoef(ranks)[0, 1]
        lines.append(
            f"| {budget} | {perplexity(before)} | {perplexity(moved)} | {perplexity(own)} | {above(moved, own)} "
            f"| {theirs.measured_loss:.4f} | {saved.saved_loss:.4f} | {apart} of {len(ours.assignment)} | {alike:.2f} |"
        )
    return lines


def main() -> None:
    """Some models, or all."""
    head = [
        "# Searched with one quantizer, deployed by another",
        "",
        "Written by `python benchmarks/deployed.py`: 2 and 4 bits by block, groups of",
        f"{GROUP}, active search on {TEXT.sequences} x {TEXT.length} tokens of C4, saved models judged on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. `{CHEAP} by {STRONG}`: perplexity of a plan",
        f"that was searched with {CHEAP}'s weights, saved by {STRONG}. What its own plan is worth: the loss of",
        f"`{CHEAP} by {STRONG}` less that of `{STRONG} by {STRONG}`, nats per token, 95 %, paired bootstrap.",
        f"Measured: the loss on the calibration tokens of the weights that {STRONG}'s search saw; saved: of those that",
        f"the saved model has. Order: the rank correlation of both quantizers' losses of {RANDOM} random assignments",
        "of the budget.",
    ]
    write_report(__doc__, RESULTS, head, run)


if __name__ == "__main__":
    main()
