"""GPTQ on inputs of the full-precision model against GPTQ layer after layer: what it costs, and what is served.

    python benchmarks/gptq_static.py            # half an hour on one core; resumes

Plans of the active search on the banks of `gptq` and `gptq-static`, 2 and 4 bits by block; saved; the saved models
judged on WikiText-2. Writes docs/results/gptq_static.md.
"""

import argparse
import resource
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

import coopq
from coopq.model.texts import wikitext2
from coopq.export.checkpoint import is_saved_model
from coopq.game.prefix_engine import model_nll
from coopq.plan.confidence import Evidence
from coopq.core.files import read_json, write_json
from coopq.plan.methods import measure, plans_on
from coopq.model.load import load_model
from coopq.plan.plan import Plan
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.core.types import Losses
from coopq.game.session import open_workbench
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "gptq_static", ROOT / "docs" / "results" / "gptq_static.md"
DATA = ROOT / "benchmarks" / "data"
MODELS, BACKENDS = ("llama", "qwen"), ("gptq", "gptq-static")
TEXT = CalibrationConfig(sequences=8, length=512)
BUDGETS = ("2avg", "2.25avg", "2.5avg", "3avg", "3.5avg", "4avg")
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512


def spent() -> float:
    """Seconds of the processor by this process and those that it waited for."""
    return sum(of.ru_utime + of.ru_stime for of in map(resource.getrusage, (0, resource.RUSAGE_CHILDREN)))


def served(name: str, backend: str, bars: Progress) -> tuple[float, dict[str, tuple[Plan, Losses]]]:
    """Seconds for the bank, and for each budget the plan of the saved model with its losses on WikiText-2."""
    folder = WORK / f"{name}-{backend}"
    config = RunConfig(str(DATA / name), backend, GROUP, 2, 4, calibration=TEXT)
    timed = folder / "seconds.json"
    start = spent()
    with open_workbench(config, folder, bars_for(bars, folder.name)) as bench:
        if not timed.exists():  # an interrupted bank is counted in part: delete the folder
            write_json(timed, spent() - start)
        parsed = [Budget.parse(budget) for budget in BUDGETS]
        for budget, plan in zip(BUDGETS, plans_on(bench, "active", parsed), strict=True):
            if not is_saved_model(folder / budget):
                bench.save(measure(bench, plan), folder / budget)
        text = wikitext2(bench.loaded.tokenizer, WINDOW, JUDGE_TOKENS).tokens
    return read_json(timed), {budget: judged(folder / budget, text) for budget in BUDGETS}


def judged(saved: Path, text: npt.NDArray[np.int64]) -> tuple[Plan, Losses]:
    """The plan of a saved model, and its losses on tokens."""
    file = saved.with_name(f"{saved.name}.json")
    if not file.exists():
        model = coopq.load(saved, device="cpu")
        write_json(file, np.concatenate(list(model_nll(model, text))).tolist())
    return Plan.load(saved / "plan.json"), np.array(read_json(file))


def run(name: str, bars: Progress) -> list[str]:
    """The rows of a model."""
    (before, theirs), (after, ours) = (served(name, backend, bars) for backend in BACKENDS)
    loaded = load_model(str(DATA / name), device="cpu")
    text = wikitext2(loaded.tokenizer, WINDOW, JUDGE_TOKENS).tokens
    full = float(np.exp(np.concatenate(list(model_nll(loaded.model, text))).mean()))
    lines = [
        "",
        f"## {name}",
        "",
        f"In full precision {full:.2f}. The bank of both widths took {before:.0f} seconds of the processor by `gptq`,",
        f"{after:.0f} by `gptq-static`: {after / before:.2f} times.",
        "",
        "| budget | gptq: measured | saved | perplexity | gptq-static: measured | saved | perplexity | difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget in BUDGETS:
        (plan, losses), (static, static_losses) = theirs[budget], ours[budget]
        low, high = Evidence.of(losses, static_losses).interval or (np.nan, np.nan)
        lines.append(
            f"| {budget} | {plan.measured_loss:.4f} | {plan.saved_loss:.4f} | {np.exp(losses.mean()):.2f} "
            f"| {static.measured_loss:.4f} | the same | {np.exp(static_losses.mean()):.2f} "
            f"| {static_losses.mean() - losses.mean():+.4f} ({low:+.4f} to {high:+.4f}) |"
        )
    return lines


def main() -> None:
    """Some models, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all unless named")
    models = parser.parse_args().models or MODELS
    with Progress() as bars:
        rows = [row for name in models for row in run(name, bars)]
    lines = [
        "# GPTQ on inputs of the full-precision model",
        "",
        "Written by `python benchmarks/gptq_static.py`: 2 and 4 bits by block, groups of",
        f"{GROUP}, active search on {TEXT.sequences} x {TEXT.length} tokens of C4, saved models judged on the first",
        f"{JUDGE_TOKENS:,} tokens of WikiText-2 in windows of {WINDOW}; at 2avg all blocks have 2 bits.",
        "Measured: the loss on the calibration tokens of the weights that were searched; saved: of those that the",
        "saved model has. Differences: `gptq-static` less `gptq`, nats per token, 95 %, paired bootstrap over windows.",
        *rows,
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
