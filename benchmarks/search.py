"""Searches on the demo model: loss reached, cost, and perplexity with intervals.

    python benchmarks/search.py hqq-3-4                     # one part; hours for all parts, resumes
    python benchmarks/search.py hqq-3-4 --tokens 8192       # searched on more calibration tokens

The chosen assignments are measured again on more of the calibration text, which contains the searched sequences: that
says what the ranking is worth. Cost is compared with the paper's protocol, M = 100 walks without shared prefixes.
Intervals are 95 %, by a bootstrap over windows of WikiText-2; differences to the active search are paired. Writes
docs/results/search.json and search.md. benchmarks/data/journals keeps every loss that is measured, so a later run of a
part can add walks, for example. To measure everything again, delete the part's folders there and in build/search.
"""

import lzma
import shutil
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from _common import DATA, RESULTS, WORK, command_line, table, write_report
from _models import measured_plans, session_on
from coopq.core.files import atomic_file, write_json
from coopq.core.specs import Request
from coopq.judge.windows import judge_windows
from coopq.model.texts import HeldOut, calibration_set
from coopq.plan.confidence import confidence
from coopq.plan.methods import names
from coopq.plan.plan import Plan

RECORD, JOURNALS = RESULTS / "search.json", DATA / "journals"
LENGTH, WINDOW, JUDGE_TOKENS = 256, 512, 16384
PAPER_WALKS, N_RESAMPLES = 100, 10_000
WIDE, NARROW = ("2.25avg", "2.5avg", "3.0avg", "3.5avg"), ("3.25avg", "3.5avg", "3.75avg")
PARTS: dict[str, tuple[Request, tuple[str, ...]]] = {
    "hqq-2-4": (Request.from_options(model="demo", backend="hqq", bits=(2, 4)), WIDE),
    "quanto-2-4": (Request.from_options(model="demo", backend="quanto", bits=(2, 4)), WIDE),
    "hqq-3-4": (Request.from_options(model="demo", backend="hqq", bits=(3, 4)), NARROW),
    "hqq-3-4-linear": (
        Request.from_options(model="demo", backend="hqq", bits=(3, 4), granularity="linear"),
        NARROW,
    ),
    "quanto-4-8-linear": (
        Request.from_options(model="demo", backend="quanto", bits=(4, 8), granularity="linear"),
        ("4.5avg", "5.0avg", "6.0avg"),
    ),
}
METHODS = (
    *("active", "fisher", *names(is_in_paper=True)),
    *("greedy-up", "greedy-down", "coopq", "shapley", "interactions"),
)
"""In this order, because a search may reuse what was measured before the search: `active` comes first."""


class Chosen(msgspec.Struct):
    """What a method chose for a budget.

    Attributes:
        method: The method.
        budget: The budget.
        block_forwards: Block forwards for all budgets together, prefixes shared.
        calibration: Loss on the searched tokens, nats per token.
        more: Loss on more of the calibration text, by number of tokens.
        perplexity: Perplexity on WikiText-2.
        interval: 95 % interval of the perplexity.
        over_active: WikiText-2 loss above that of the active search, nats per token.
        over_active_interval: Paired 95 % interval of that difference.
    """

    method: str
    budget: str
    block_forwards: int
    calibration: float | None
    more: dict[str, float]
    perplexity: float
    interval: tuple[float, float]
    over_active: float
    over_active_interval: tuple[float, float]


class Part(msgspec.Struct):
    """All methods on one model, backend and pair of widths.

    Attributes:
        tokens: Calibration tokens.
        walks: Number of walks of the methods that walk.
        paper: Block forwards of the paper's protocol.
        rows: What each method chose for each budget.
    """

    tokens: int
    walks: int
    paper: int
    rows: list[Chosen]


def run_part(name: str, tokens: int, walks: int, methods: list[str], more: list[int]) -> Part:
    """All methods on one part; `more` are numbers of tokens that the choices are measured on again."""
    request, budgets = PARTS[name]
    request = request.replace(tokens=tokens, sequence_length=LENGTH, permutations=walks)
    folder, kept = WORK / "search" / f"{name}-{tokens}", JOURNALS / f"{name}-{tokens}"
    restore(kept, folder)
    with session_on(request, folder) as session:
        plans = [plan for method in methods for plan in measured_plans(session, method, budgets)]
        points = np.array([plan.assignment for plan in plans], dtype=np.float32)
        windows = judge_windows(session, points, HeldOut(WINDOW, JUDGE_TOKENS))
        by_active = {
            plan.budget: losses for plan, losses in zip(plans, windows, strict=True) if plan.method == "active"
        }
        rows = [choice(plan, losses, by_active[plan.budget]) for plan, losses in zip(plans, windows, strict=True)]
        for n in more:
            larger = calibration_set(request.replace(tokens=n).text, session.loaded.tokenizer)
            with session.game_on(larger, folder / f"more-{n}.jsonl", f"measuring on {n} tokens") as game:
                for found, loss in zip(rows, game(points).tolist(), strict=True):
                    found.more[str(n)] = loss
        paper = PAPER_WALKS * len(session.players) * len(set(session.blocks))
    keep(folder, kept)
    return Part(tokens, walks, paper, rows)


def choice(plan: Plan, windows: npt.NDArray[np.float64], active: npt.NDArray[np.float64]) -> Chosen:
    """A plan with its losses on windows of WikiText-2, beside those of the active search for the same budget."""
    drawn = np.random.default_rng(0).integers(0, len(windows), size=(N_RESAMPLES, len(windows)))
    low, high = np.exp(np.quantile(windows[drawn].mean(axis=1), [0.025, 0.975])).tolist()
    against = confidence(active, windows)
    assert against.difference is not None
    assert against.interval is not None
    return Chosen(
        method=plan.method,
        budget=plan.budget,
        block_forwards=plan.block_forwards,
        calibration=plan.measured_loss,
        more={},
        perplexity=float(np.exp(windows.mean())),
        interval=(low, high),
        over_active=against.difference,
        over_active_interval=against.interval,
    )


def restore(kept: Path, folder: Path) -> None:
    """Put a kept journal into a new run folder, with the log of what searches knew when they began."""
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


def describe(parts: dict[str, Part]) -> list[str]:
    """The report."""
    lines = [
        "Written by `python benchmarks/search.py PART --tokens T --permutations M`; model and texts as in",
        f"[main_job.md](main_job.md), calibration sequences of {LENGTH} tokens, judged on the first {JUDGE_TOKENS}",
        f"tokens of WikiText-2 in windows of {WINDOW}. Cost: block forwards with shared prefixes for all budgets",
        f"together, as a share of the paper's protocol (M = {PAPER_WALKS}, without sharing). Intervals: 95 %,",
        "bootstrap over windows; the last column is the WikiText-2 loss above that of the active search, paired, in",
        "nats per token. Columns of more tokens: the loss of the same assignments on more of the calibration text, and",
        "above each table the rank correlation of both, over methods, by budget.",
    ]
    for name, part in parts.items():
        lines += ["", f"## {name}", "", *summary(part), "", *choices_table(part)]
    return lines


def choices_table(part: Part) -> list[str]:
    """The choices of all methods, by budget and loss."""
    more = list(part.rows[0].more)
    columns = ["budget", "method", "cost", "calibration NLL", *(f"{n} tokens" for n in more)]
    rows = []
    for found in sorted(part.rows, key=lambda found: (found.budget, found.calibration)):
        (low, high), (least, most) = found.interval, found.over_active_interval
        cells = [found.budget, found.method, f"{found.block_forwards / part.paper:.2%}", f"{found.calibration:.4f}"]
        cells += [f"{found.more[n]:.4f}" for n in more]
        cells += [f"{found.perplexity:,.1f} ({low:,.1f} to {high:,.1f})"]
        rows.append([*cells, f"{found.over_active:+.4f} ({least:+.4f} to {most:+.4f})"])
    return table([*columns, "WikiText-2 perplexity", "NLL over active"], rows)


def summary(part: Part) -> list[str]:
    """Who wins, by calibration loss and by perplexity, and what more tokens make of the ranking."""
    by_budget = [
        [found for found in part.rows if found.budget == budget]
        for budget in dict.fromkeys(found.budget for found in part.rows)
    ]
    active = [next(found for found in same if found.method == "active") for same in by_budget]
    lowest, best = (
        sum(
            getattr(ours, measure) <= min(getattr(found, measure) for found in same)
            for ours, same in zip(active, by_budget, strict=True)
        )
        for measure in ("calibration", "perplexity")
    )
    cost = active[0].block_forwards / part.paper
    lines = [
        f"M = {part.walks} for the methods that walk. The active search took {cost:.2%} of the paper's block forwards.",
        f"Its calibration loss is the lowest at {lowest} of {len(by_budget)} budgets, its perplexity at {best}.",
    ]
    for n in part.rows[0].more:
        pairs = [np.array([(found.calibration, found.more[n]) for found in same]).T for same in by_budget]
        ranks = [np.argsort(np.argsort(losses, axis=1), axis=1) for losses in pairs]
        correlations = ", ".join(f"{np.corrcoef(both)[0, 1]:.2f}" for both in ranks)
        lines.append(f"Rank correlation of the calibration loss with that on {n} tokens: {correlations}.")
    return lines


def main() -> None:
    """Run one part, and write the report on all parts."""
    parser = command_line(__doc__)
    parser.add_argument("part", choices=PARTS, help="backend, widths and players")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens")
    parser.add_argument("--permutations", type=int, default=PAPER_WALKS, help="walks")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="active must be among them")
    parser.add_argument("--more", type=int, nargs="*", default=[8192], help="tokens to measure the choices on again")
    arguments = parser.parse_args()
    name, tokens = arguments.part, arguments.tokens
    part = run_part(name, tokens, arguments.permutations, arguments.methods, arguments.more)
    # Read now: another part may have ended meanwhile.
    parts = msgspec.json.decode(RECORD.read_bytes(), type=dict[str, Part]) if RECORD.exists() else {}
    parts = dict(sorted({**parts, f"{name}, {tokens} tokens": part}.items()))
    write_json(RECORD, msgspec.to_builtins(parts))
    write_report(RECORD.with_suffix(".md"), describe(parts), quiet=True)


if __name__ == "__main__":
    main()
