"""Searches on the demo model: loss reached, what it cost, and perplexity with intervals.

    python benchmarks/search.py hqq-3-4                     # one part; hours for all of them, resumes
    python benchmarks/search.py hqq-3-4 --tokens 8192       # searched on more calibration tokens

What was chosen is measured again on more of the calibration text (the searched sequences among it), which says what the
ranking was worth. Cost is set against the paper's protocol, M = 100 walks without shared prefixes. Intervals are 95 %,
by a bootstrap over windows of WikiText-2; differences to the active search are paired. Writes docs/results/search.json
and search.md, and keeps every loss measured in benchmarks/data/journals: a part goes on from there, to more walks, say.
To measure everything again, delete its folder there and in build/search.
"""

import argparse
import json
import lzma
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from coopq.plan.scores import PAPER_BASELINES
from coopq.model.texts import calibration_set
from coopq.judge.comparison import judge_windows
from coopq.plan.confidence import Evidence
from coopq.core.files import atomic_file
from coopq.plan.methods import measure, plans_on
from coopq.plan.plan import Plan
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.core.sizes import Budget
from coopq.game.session import open_workbench
from main_job import bars_for

ROOT = Path(__file__).parents[1]
WORK, RESULTS = ROOT / "build" / "search", ROOT / "docs" / "results" / "search.json"
JOURNALS = ROOT / "benchmarks" / "data" / "journals"
LENGTH, WINDOW, JUDGE_TOKENS = 256, 512, 16384
PAPER_WALKS = 100
WIDE, NARROW = ("2.25avg", "2.5avg", "3.0avg", "3.5avg"), ("3.25avg", "3.5avg", "3.75avg")
PARTS: dict[str, tuple[RunConfig, tuple[str, ...]]] = {
    "hqq-2-4": (RunConfig("demo", "hqq", low=2, high=4), WIDE),
    "quanto-2-4": (RunConfig("demo", "quanto", low=2, high=4), WIDE),
    "hqq-3-4": (RunConfig("demo", "hqq", low=3, high=4), NARROW),
    "hqq-3-4-linear": (RunConfig("demo", "hqq", low=3, high=4, granularity="linear"), NARROW),
    "quanto-4-8-linear": (
        RunConfig("demo", "quanto", low=4, high=8, granularity="linear"),
        ("4.5avg", "5.0avg", "6.0avg"),
    ),
}
METHODS = ("active", "fisher", *PAPER_BASELINES, "greedy-up", "greedy-down", "coopq", "shapley", "interactions")
"""In this order: what a search knows at its start is what was measured before it, and `active` is to know nothing."""


def run_part(name: str, tokens: int, walks: int, methods: list[str], more: list[int]) -> dict[str, Any]:
    """All methods on one part."""
    config, budgets = PARTS[name]
    config = replace(config, calibration=calibration(tokens), permutations=walks)
    parsed = [Budget.parse(budget) for budget in budgets]
    folder, kept = WORK / f"{name}-{tokens}", JOURNALS / f"{name}-{tokens}"
    restore(kept, folder)
    with Progress() as bars, open_workbench(config, folder, bars_for(bars, name)) as bench:
        plans = [measure(bench, plan) for method in methods for plan in plans_on(bench, method, parsed)]
        points = np.array([plan.assignment for plan in plans], dtype=np.float32)
        windows = judge_windows(bench, points, length=WINDOW, max_tokens=JUDGE_TOKENS)
        paper = PAPER_WALKS * len(bench.players) * len({player.block for player in bench.players})
        rows = [row(plan, of, windows[of_active(plan, plans)]) for plan, of in zip(plans, windows, strict=True)]
        for n in more:
            larger = calibration_set(calibration(n), bench.loaded.tokenizer)
            with bench.game(larger, bench.folder.path / f"more-{n}.jsonl", f"measuring on {n} tokens") as game:
                for of, loss in zip(rows, game(points).tolist(), strict=True):
                    of["more"][str(n)] = loss
    keep(folder, kept)
    return {"tokens": tokens, "walks": walks, "paper": paper, "rows": rows}


def restore(kept: Path, folder: Path) -> None:
    """Put a kept journal into a new run folder, with the record of what the searches knew when they began."""
    if kept.is_dir() and not (folder / "journal.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept / "searches.json", folder)
        with atomic_file(folder / "journal.jsonl") as path:
            path.write_bytes(lzma.decompress((kept / "journal.jsonl.xz").read_bytes()))


def keep(folder: Path, kept: Path) -> None:
    """Keep the journal of a finished part, compressed."""
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "searches.json", kept)
    with atomic_file(kept / "journal.jsonl.xz") as path:
        path.write_bytes(lzma.compress((folder / "journal.jsonl").read_bytes()))


def calibration(tokens: int) -> CalibrationConfig:
    """The packaged sample of C4."""
    return CalibrationConfig(sequences=tokens // LENGTH, length=LENGTH)


def of_active(plan: Plan, plans: list[Plan]) -> int:
    """Position of the active search's plan of the same budget."""
    return next(i for i, other in enumerate(plans) if (other.method, other.budget) == ("active", plan.budget))


def row(plan: Plan, windows: Any, active: Any) -> dict[str, Any]:
    """One line of the table."""
    means = windows[np.random.default_rng(0).integers(0, len(windows), size=(10_000, len(windows)))].mean(axis=1)
    against = Evidence.of(active, windows)
    return {
        "method": plan.method,
        "budget": plan.budget,
        "layer_forwards": plan.layer_forwards,
        "calibration": plan.measured_loss,
        "more": {},
        "perplexity": float(np.exp(windows.mean())),
        "interval": np.exp(np.quantile(means, [0.025, 0.975])).tolist(),
        "over active": against.difference,
        "over active interval": against.interval,
    }


def markdown(parts: dict[str, Any]) -> str:
    """The report."""
    lines = [
        "# Searches on SmolLM2-135M-Instruct",
        "",
        "Written by `python benchmarks/search.py PART --tokens T --permutations M`; model and texts as in",
        f"[main_job.md](main_job.md), calibration sequences of {LENGTH} tokens, judged on the first {JUDGE_TOKENS}",
        f"tokens of WikiText-2 in windows of {WINDOW}. Cost: layer forwards with shared prefixes for all budgets",
        f"together, as a share of the paper's protocol (M = {PAPER_WALKS}, without sharing). Intervals: 95 %,",
        "bootstrap over windows; the last column is the WikiText-2 loss above that of the active search, paired, in",
        "nats per token. Columns of more tokens: the loss of the same assignments on more of the calibration text, and",
        "above each table the rank correlation of both, over methods, by budget.",
    ]
    for name, part in parts.items():
        more = list(part["rows"][0]["more"])
        lines += ["", f"## {name}", "", *summary(part), ""]
        lines += [
            "| budget | method | cost | calibration NLL |"
            + "".join(f" {n} tokens |" for n in more)
            + " WikiText-2 perplexity | NLL over active |",
            "| --- | --- | --- | --- |" + " --- |" * len(more) + " --- | --- |",
        ]
        for of in sorted(part["rows"], key=lambda of: (of["budget"], of["calibration"])):
            low, high = of["interval"]
            least, most = of["over active interval"]
            cost = of["layer_forwards"] / part["paper"]
            lines.append(
                f"| {of['budget']} | {of['method']} | {cost:.2%} | {of['calibration']:.4f} |"
                + "".join(f" {of['more'][n]:.4f} |" for n in more)
                + f" {of['perplexity']:,.1f} ({low:,.1f} to {high:,.1f}) "
                f"| {of['over active']:+.4f} ({least:+.4f} to {most:+.4f}) |"
            )
    return "\n".join(lines) + "\n"


def summary(part: dict[str, Any]) -> list[str]:
    """Who wins, by calibration loss and by perplexity, and what more tokens make of the ranking."""
    budgets = dict.fromkeys(of["budget"] for of in part["rows"])
    tables = [[of for of in part["rows"] if of["budget"] == budget] for budget in budgets]
    active = [next(of for of in table if of["method"] == "active") for table in tables]
    lowest, best = (
        sum(ours[key] <= min(of[key] for of in table) for ours, table in zip(active, tables, strict=True))
        for key in ("calibration", "perplexity")
    )
    cost = active[0]["layer_forwards"] / part["paper"]
    lines = [
        f"M = {part['walks']} for the methods that walk. The active search took {cost:.2%} of the paper's layer",
        f"forwards; its calibration loss is the lowest at {lowest} of {len(tables)} budgets, its perplexity at {best}.",
    ]
    for n in part["rows"][0]["more"]:
        ranks = [
            np.argsort(
                np.argsort([[of["calibration"] for of in table], [of["more"][n] for of in table]], axis=1), axis=1
            )
            for table in tables
        ]
        correlations = ", ".join(f"{np.corrcoef(of)[0, 1]:.2f}" for of in ranks)
        lines.append(f"Rank correlation of the calibration loss with that on {n} tokens: {correlations}.")
    return lines


def main() -> None:
    """Run one part and rewrite the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    parser.add_argument("--permutations", type=int, default=PAPER_WALKS, help="walks")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="active must be among them")
    parser.add_argument("--more", type=int, nargs="*", default=[8192], help="tokens to measure the choices on again")
    arguments = parser.parse_args()
    part, tokens = arguments.part, arguments.tokens
    result = run_part(part, tokens, arguments.permutations, arguments.methods, arguments.more)
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # now: another part may have ended meanwhile
    parts[f"{part}, {tokens} tokens"] = result
    RESULTS.write_text(json.dumps(dict(sorted(parts.items())), indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(dict(sorted(parts.items()))))


if __name__ == "__main__":
    main()
