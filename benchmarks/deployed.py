"""Searched with a cheap quantizer, deployed by a strong one: the loss compared with a search by the strong one.

    python benchmarks/deployed.py            # two hours on one core, nearly all of it AutoRound; resumes

The active search makes plans with the weights of `hqq` and of `autoround`, 2 and 4 bits by block. `autoround` saves the
models of both, and `hqq` the models of its own plans. The saved models are judged on WikiText-2. The report also says
how alike the two quantizers order random assignments. Writes docs/results/deployed.md.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import coopq
from _common import RESULTS, WORK, loss_above, perplexity, table, write_models_report
from _models import measured_plans, saved_losses, session_on
from coopq.cli.terminal import progress_bars
from coopq.core.specs import QuantizerSpec
from coopq.core.types import Losses
from coopq.export.checkpoint import SavedModel
from coopq.judge.references import random_assignments
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan
from gptq_static import GROUP, JUDGE_TOKENS, LENGTH, TOKENS, WINDOW, request_of

CHEAP, STRONG = "hqq", "autoround"
BUDGETS = ("2.25avg", "2.5avg", "3avg")
N_RANDOM, SEED = 100, 0


@dataclass(frozen=True)
class Searched:
    """A model, searched with the weights of one quantizer.

    Attributes:
        plans: The plan of the active search for each budget.
        random: Calibration losses of random assignments for each budget, shape (N_RANDOM,) each, nats per token.
        text: Windows of WikiText-2 to judge on, shape (n_windows, WINDOW).
    """

    plans: list[Plan]
    random: list[Losses]
    text: npt.NDArray[np.int64]


def search(model: str, backend: str) -> Searched:
    """Search a model with the weights of a backend."""
    request = request_of(model, backend)
    with session_on(request, WORK / "deployed" / f"{model}-{backend}") as session:
        plans = measured_plans(session, "active", BUDGETS)
        with session.game("random assignments") as game:
            limits = [plan.budget_bytes for plan in plans]
            drawn = [random_assignments(session.sizes, request.widths.bits, limit, N_RANDOM, SEED) for limit in limits]
            losses = [game(points) for points in drawn]
        text = HeldOut(WINDOW, JUDGE_TOKENS).windows(session.loaded.tokenizer).tokens
    return Searched(plans, losses, text)


def deploy(model: str, plan: Plan, backend: str, text: npt.NDArray[np.int64]) -> tuple[Plan, Losses]:
    """The plan of the model that a backend saves, and the saved model's losses on tokens."""
    saved = SavedModel(WORK / "deployed" / f"{model}-{plan.quantizer.backend}-by-{backend}" / plan.budget)
    if not saved.exists:
        deployment = None if backend == plan.quantizer.backend else QuantizerSpec(backend, GROUP)
        with progress_bars() as progress:
            coopq.apply(plan, saved.folder, deployment=deployment, progress=progress)
    return saved.plan, saved_losses(saved.folder, text)


def describe(model: str) -> list[str]:
    """The report of a model."""
    cheap, strong = (search(model, backend) for backend in (CHEAP, STRONG))
    rows = []
    for k, budget in enumerate(BUDGETS):
        cheap_plan, strong_plan = cheap.plans[k], strong.plans[k]
        _, before = deploy(model, cheap_plan, CHEAP, cheap.text)
        _, moved = deploy(model, cheap_plan, STRONG, cheap.text)
        saved, own = deploy(model, strong_plan, STRONG, cheap.text)
        n_apart = sum(a != b for a, b in zip(cheap_plan.assignment, strong_plan.assignment, strict=True))
        ranks = np.argsort(np.argsort([cheap.random[k], strong.random[k]], axis=1), axis=1)
        cells = [budget, perplexity(before), perplexity(moved), perplexity(own), loss_above(moved, own)]
        cells += [f"{strong_plan.measured_loss:.4f}", f"{saved.saved_loss:.4f}"]
        rows.append([*cells, f"{n_apart} of {len(cheap_plan.assignment)}", f"{np.corrcoef(ranks)[0, 1]:.2f}"])
    head = [f"{CHEAP} by {CHEAP}", f"{CHEAP} by {STRONG}", f"{STRONG} by {STRONG}", "gain of the own plan"]
    head += [f"{STRONG}: measured", "saved", "players apart", "order alike"]
    return ["", f"## {model}", "", *table(["budget", *head], rows)]


def main() -> None:
    """Measure the models that are named, and write the report."""
    head = [
        "# Do widths searched with one quantizer serve another?",
        "",
        "Written by `python benchmarks/deployed.py`: 2 and 4 bits by block, groups of",
        f"{GROUP}, active search on {TOKENS // LENGTH} x {LENGTH} tokens of C4, saved models judged on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}. `{CHEAP} by {STRONG}`: perplexity of a plan",
        f"that was searched with the weights of {CHEAP} and saved by {STRONG}. Gain of the own plan: the loss of",
        f"`{CHEAP} by {STRONG}` less the loss of `{STRONG} by {STRONG}`, nats per token, 95 %, paired bootstrap.",
        f"Measured: the loss on the calibration tokens of the weights that the search by {STRONG} saw; saved: of the",
        "weights that the saved model has. Order: the rank correlation of both quantizers' losses of",
        f"{N_RANDOM} random assignments of the budget.",
    ]
    write_models_report(__doc__, RESULTS / "deployed.md", head, describe)


if __name__ == "__main__":
    main()
