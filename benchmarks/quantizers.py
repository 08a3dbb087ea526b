"""What each quantizer loses by itself, what it takes, and whether a cheap one may search for a strong one.

    python benchmarks/quantizers.py            # two hours on one core, nearly all of them AutoRound's; resumes

Reference models with every layer at 2 or at 4 bits; then plans of one of them at 2.5 average bits, searched on the
weights of a cheap backend or on AutoRound's own, and saved by AutoRound. Judged on WikiText-2. Writes
docs/results/quantizers.md.
"""

import argparse
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

import coopq
from coopq.calibration import wikitext2
from coopq.checkpoint import is_saved_model
from coopq.engine import model_nll
from coopq.evaluate import judge_windows
from coopq.evidence import Evidence
from coopq.files import read_json, write_json
from coopq.methods import measure, plans_on
from coopq.models import load_model
from coopq.pipeline import apply
from coopq.plan import Plan
from coopq.run import CalibrationConfig, RunConfig
from coopq.storage import Budget
from coopq.types import UNTOUCHED, Losses
from coopq.workbench import open_workbench
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "quantizers", ROOT / "docs" / "results" / "quantizers.md"
DATA = ROOT / "benchmarks" / "data"
MODELS = ("llama", "qwen")
TEXT = CalibrationConfig(sequences=8, length=512)
GROUP, JUDGE_TOKENS, WINDOW = 64, 32768, 512
QUANTIZERS: Mapping[str, Mapping[str, Any]] = {
    "rtn": {"backend": "rtn"},
    "hqq": {"backend": "hqq"},
    "quanto": {"backend": "quanto", "group_size": None},  # its own: 128
    "gptq": {"backend": "gptq"},
    "gptq --asymmetric": {"backend": "gptq", "symmetric": False},
    "gptq-static --asymmetric": {"backend": "gptq-static", "symmetric": False},
    "autoround": {"backend": "autoround"},
    "autoround --asymmetric": {"backend": "autoround", "symmetric": False},
}
STRONG, CHEAP = "autoround", "hqq"
SEARCHED, BUDGETS = ("llama",), ("2.5avg",)
"""What plans are searched and saved for: each is two passes of AutoRound more."""


def spent() -> float:
    """Seconds of the processor by this process and those that it waited for."""
    return sum(of.ru_utime + of.ru_stime for of in map(resource.getrusage, (0, resource.RUSAGE_CHILDREN)))


@dataclass(frozen=True)
class Found:
    """What one quantizer comes to on one model.

    Attributes:
        losses: On windows of WikiText-2 with every layer at 2 bits, at 4, and untouched, shape (3, n_windows).
        seconds: Of the processor, for the weights of both widths; None where that was interrupted.
        plans: By budget: the plan, and its losses on the windows with the weights that were searched.
    """

    losses: Losses
    seconds: float | None
    plans: Mapping[str, tuple[Plan, Losses]]


def found_by(name: str, quantizer: str, bars: Progress) -> Found:
    """Weights of both widths, judged; and plans of the active search on them."""
    folder = WORK / f"{name}-{quantizer.replace(' ', '')}"
    config = RunConfig(str(DATA / name), calibration=TEXT, **{"group_size": GROUP, **QUANTIZERS[quantizer]})
    timed, is_new, start = folder / "seconds.json", not folder.exists(), spent()
    with open_workbench(config, folder, bars_for(bars, folder.name)) as bench:
        if not timed.exists():
            write_json(timed, spent() - start if is_new else None)
        plans = []
        if name in SEARCHED and quantizer in (STRONG, CHEAP):
            plans = [measure(bench, p) for p in plans_on(bench, "active", [Budget.parse(of) for of in BUDGETS])]
        uniform = [[width] * len(bench.players) for width in (2, 4, UNTOUCHED)]
        points = np.array([*uniform, *(plan.assignment for plan in plans)], dtype=np.int8)
        losses = judge_windows(bench, points, length=WINDOW, max_tokens=JUDGE_TOKENS)
    by_budget = {budget: (plan, of) for budget, plan, of in zip(BUDGETS, plans, losses[3:], strict=False)}
    return Found(losses[:3], read_json(timed), by_budget)


def saved_by_autoround(name: str, plan: Plan) -> Losses:
    """Losses on the windows of WikiText-2 of a plan that AutoRound saves."""
    widths = "".join(map(str, plan.assignment))
    folder = WORK / f"{name}-saved-{widths}"
    file = folder.with_suffix(".json")
    if not file.exists():
        if not is_saved_model(folder):
            apply(plan, folder, backend=None if plan.quantizer["name"] == STRONG else STRONG, group_size=GROUP)
        tokenizer = load_model(str(DATA / name), device="cpu").tokenizer
        text = wikitext2(tokenizer, WINDOW, JUDGE_TOKENS).tokens
        model = coopq.load(folder, device="cpu")
        write_json(file, np.concatenate(list(model_nll(model, text))).tolist())
    return np.array(read_json(file))


def perplexity(losses: Losses) -> str:
    """For people."""
    return f"{np.exp(losses.mean()):.2f}"


def above(losses: Losses, others: Losses) -> str:
    """How much higher losses are than others, with the paired interval, for people."""
    low, high = Evidence.of(others, losses).interval or (np.nan, np.nan)
    return f"{losses.mean() - others.mean():+.4f} ({low:+.4f} to {high:+.4f})"


def run(name: str, bars: Progress) -> list[str]:
    """The report of a model."""
    every = {quantizer: found_by(name, quantizer, bars) for quantizer in QUANTIZERS}
    *_, full = every[STRONG].losses
    lines = [
        "",
        f"## {name}",
        "",
        f"In full precision {perplexity(full)}.",
        "",
        "| backend | seconds | 2 bits: perplexity | loss above full precision | 4 bits: perplexity | loss above |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for quantizer, found in every.items():
        two, four, _ = found.losses
        cells = [perplexity(two), above(two, full), perplexity(four), above(four, full)]
        seconds = "" if found.seconds is None else f"{found.seconds:.0f}"
        lines.append(f"| {' | '.join([quantizer, seconds, *cells])} |")
    if name not in SEARCHED:
        return lines
    lines += [
        "",
        "| searched with | budget | perplexity with these weights | saved by autoround | loss above its own plan |",
        "| --- | --- | --- | --- | --- |",
    ]
    for budget in BUDGETS:
        served = {backend: saved_by_autoround(name, every[backend].plans[budget][0]) for backend in (STRONG, CHEAP)}
        for backend, losses in served.items():
            searched = perplexity(every[backend].plans[budget][1])
            difference = "" if backend == STRONG else above(losses, served[STRONG])
            lines.append(f"| {backend} | {budget} | {searched} | {perplexity(losses)} | {difference} |")
    return lines


def main() -> None:
    """Some models, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all unless named")
    models = parser.parse_args().models or MODELS
    with Progress() as bars:
        rows = [row for name in models for row in run(name, bars)]
    lines = [
        "# Quantizers",
        "",
        f"Written by `python benchmarks/quantizers.py`: groups of {GROUP}, fitted to {TEXT.sequences} x {TEXT.length}",
        f"tokens of C4 where a backend fits; judged on the first {JUDGE_TOKENS:,} tokens of WikiText-2 in windows of",
        f"{WINDOW}. Seconds of the processor for the weights of both widths. Plans are of the active search by block",
        "on the same tokens. Losses in nats per token, differences with 95 %, paired bootstrap over windows.",
        *rows,
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
