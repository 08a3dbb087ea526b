"""What the active search finds by what it spends, against scores and one-shot losses, and what its parts give.

python benchmarks/informed.py llama fused rtn 2,3,4,8      # one case; minutes, resumes
python benchmarks/informed.py --ablate llama fused rtn 2,3,4,8
python benchmarks/informed.py --report                     # only write the report
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from _common import RESULTS, WORK, command_line, table, write_report
from _models import session_on, source_of
from coopq.core.files import read_json, write_json
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.core.types import Assignments
from coopq.game.game import Meter
from coopq.game.session import Session
from coopq.model.texts import HeldOut
from coopq.plan.allocate import search_space
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS
from coopq.plan.searches.step_prior import step_prior
from coopq.search import ActiveSearch, OneShot, SearchSpace
from coopq.search.informed import fit_informed
from coopq.search.prior import Prior
from coopq.search.solver.exact import allocate
from coopq.search.strategies import active

MEASURED = """\
Loss is the divergence from full precision on 8 x 512 tokens of C4 (4 x 256 for the demo model), two or three budgets in
one search. Held out are 8 x 512 tokens of WikiText-2. Cost is in forwards of the whole model over the calibration
tokens, scores included, prefixes shared. Each search starts without earlier losses. Writes docs/results/informed.md.
"""
"""Stands in the help and on the page."""
BUDGETS = {"demo": ("3.8bpw", "4.5bpw")}
LOOKS = (30, 60, 120)
"""Forwards at which the report looks at the search."""
SCORES = ("auto-quantize", "fisher", "llm-mq")
HELD_OUT = 8 * 512
VARIANTS = ("whole", "without the score", "without pairs", "one proposal a budget", "four proposals a budget")
"""The search, and the search with one part changed. Without the score a step costs by its bytes and widths alone."""


def request_of(model: str, granularity: str, backend: str, bits: str) -> Request:
    """What is searched in a case."""
    tokens = {"tokens": 1024, "sequence_length": 256} if model == "demo" else {"tokens": 4096, "sequence_length": 512}
    return Request.from_options(
        model=source_of(model),
        backend=backend,
        bits=tuple(float(width) if "." in width else int(width) for width in bits.split(",")),
        granularity=granularity,
        loss="kl",
        **tokens,
    )


def rounds_of(session: Session, space: SearchSpace, variant: str) -> Iterator[tuple[float, int, ActiveSearch]]:
    """Forwards spent, points measured, and the search, after each round of a new search."""
    n_blocks = len(set(session.blocks))
    with session.game(f"searching, {variant}") as game, ExitStack() as stack:
        meter = Meter(game, session.blocks, np.zeros((0, space.n_players), dtype=np.float32))
        prior, scoring = step_prior(session, space, meter)
        if variant == "without the score":
            prior, scoring = without_score(prior, space), 0
        elif variant == "without pairs":
            fit = lambda *args: fit_informed(*args, pairs=False)  # noqa: E731
            stack.enter_context(mock.patch.object(active, "fit_informed", fit))
        elif variant != "whole":
            per_round = {"one": 1, "four": 4}[variant.split()[0]]
            stack.enter_context(mock.patch.object(active, "_PER_ROUND", per_round))
        search = ActiveSearch(space, prior=prior)
        while len(assignments := search.propose()):
            search.learn(assignments, meter(assignments))
            yield (scoring + meter.block_forwards) / n_blocks, len(search.measured), search


def without_score(prior: Prior, space: SearchSpace) -> Prior:
    """The prior of somebody who knows the bytes and the widths of a step: squared errors fall fourfold by the bit."""
    below = space.player_widths
    widths = np.array([width for own in below for width in own[-2::-1]], dtype=np.float64)
    gains = space.step_bytes * 4.0**-widths
    return replace(prior, gains=gains, base=float(gains.sum() / 100))


def measure(case: Sequence[str], place: Path) -> dict[str, Any]:
    """The trace of one case, and what the scores alone choose."""
    with session_on(request_of(*case), place / "run") as session:
        space = search_space(session, [Budget.parse(text) for text in budgets_of(case)])
        rounds: list[tuple[float, int, list[float]]] = []
        chosen: dict[str, tuple[float, Assignments]] = {}
        for forwards, points, search in rounds_of(session, space, "whole"):
            lowest = [search.measured.lowest(capacity) for capacity in space.capacities]
            for look in LOOKS:
                if forwards <= look:
                    chosen[f"active, after {look}"] = forwards, _choices(space, search)
            chosen["active, at its end"] = forwards, _choices(space, search)
            rounds.append((round(forwards, 1), points, lowest))
            print(f"{forwards:7.1f} forwards, {points:4} points: ", *(f"{loss:.5f}" for loss in lowest), flush=True)
        n_blocks = len(set(session.blocks))
        for name in SCORES:
            if METHODS[name].scores_pairs and space.n_players < space.n_steps:
                continue
            if any(player.is_end for player in session.players) and not METHODS[name].is_at_once:
                continue
            score = cached_score(session, METHODS[name], sensitivities(session))
            chosen[name] = score.block_forwards / n_blocks, _knapsacks(space, score.gains)
        with session.game("one-shot") as game:
            meter = Meter(game, session.blocks, np.zeros((0, space.n_players), dtype=np.float32))
            one_shot = OneShot(space, end="high")
            while len(assignments := one_shot.propose()):
                one_shot.learn(assignments, meter(assignments))
            chosen["one-shot-high"] = meter.block_forwards / n_blocks, _choices(space, one_shot)
        found = {name: {"forwards": spent, **_judged(session, points)} for name, (spent, points) in chosen.items()}
    return {"case": case, "players": space.n_players, "steps": space.n_steps, "rounds": rounds, "found": found}


def ablate(case: Sequence[str], place: Path) -> dict[str, Any]:
    """Where each variant of the search is after some forwards, and where it ends."""
    found: dict[str, list[tuple[float, list[float]]]] = {}
    with session_on(request_of(*case), place / "run") as session:
        space = search_space(session, [Budget.parse(text) for text in budgets_of(case)])
        for variant in VARIANTS:
            found[variant] = [
                (forwards, [search.measured.lowest(capacity) for capacity in space.capacities])
                for forwards, _, search in rounds_of(session, space, variant)
            ]
            print(variant, found[variant][-1], flush=True)
    return {"case": case, "variants": found}


def budgets_of(case: Sequence[str]) -> tuple[str, ...]:
    """The budgets of a case."""
    return BUDGETS.get(case[0], ("2.8bpw", "3.5bpw", "4.5bpw"))


def _choices(space: SearchSpace, search: ActiveSearch | OneShot) -> Assignments:
    """What a search chooses for each budget, shape (n_budgets, n_players)."""
    return np.array([search.choose(capacity) for capacity in space.capacities])


def _knapsacks(space: SearchSpace, gains: Any) -> Assignments:
    """What a score chooses for each budget, shape (n_budgets, n_players)."""
    programs = [replace(space.constraint(capacity), a=gains) for capacity in space.capacities]
    return space.assignments(np.array([allocate(program).q for program in programs]))


def _judged(session: Session, assignments: Assignments) -> dict[str, list[float]]:
    """Divergences of assignments on the calibration text and on the held-out text."""
    tokens = HeldOut(512, HELD_OUT).windows(session.loaded.tokenizer)
    with session.game("measuring") as game:
        losses = game(assignments).tolist()
    with session.game_on(tokens, session.folder.path / "held-out.jsonl", "judging", loss="kl") as judge:
        return {"losses": losses, "held out": judge(assignments).tolist()}


def report_lines(found: Sequence[dict[str, Any]], ablated: Sequence[dict[str, Any]]) -> list[str]:
    """The report on all cases."""
    lines = [*MEASURED.splitlines(), ""]
    for each in found:
        budgets = budgets_of(each["case"])
        header = ["method", "forwards", *budgets, *(f"held out, {budget}" for budget in budgets)]
        rows: list[list[object]] = [
            [name, f"{one['forwards']:.0f}", *(f"{loss:.5f}" for loss in (*one["losses"], *one["held out"]))]
            for name, one in each["found"].items()
        ]
        lines += [f"## {', '.join(each['case'])}: {each['players']} players, {each['steps']} steps", ""]
        lines += [*table(header, rows), ""]
    for each in ablated:
        budgets = budgets_of(each["case"])
        rows = []
        for name, rounds in each["variants"].items():
            for look in (60, 120, np.inf):
                forwards, lowest = [entry for entry in rounds if entry[0] <= look][-1]
                at = "end" if look == np.inf else str(look)
                rows.append([name, at, f"{forwards:.0f}", *(f"{loss:.5f}" for loss in lowest)])
        lines += [f"## What each part gives: {', '.join(each['case'])}", ""]
        lines += [*table(["search", "look at", "forwards", *budgets], rows), ""]
    return lines


def main() -> None:
    """Measure a case, and write the report."""
    parser = command_line(f"{__doc__}\n{MEASURED}")
    parser.add_argument("case", nargs="*", help="model, granularity, backend, bits")
    parser.add_argument("--ablate", action="store_true", help="change one part of the search at a time")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=WORK / "informed")
    parser.add_argument("--out", type=Path, default=RESULTS / "informed.md")
    options = parser.parse_args()
    if not options.report:
        if len(options.case) != 4:
            parser.error("give a model, a granularity, a backend and bits, or --report")
        place = options.work / "-".join(options.case)
        name, what = ("ablated.json", ablate) if options.ablate else ("found.json", measure)
        write_json(place / name, json.loads(json.dumps(what(options.case, place))))
    found, ablated = (
        [read_json(file) for file in sorted(options.work.glob(f"*/{name}.json"))] for name in ("found", "ablated")
    )
    write_report(options.out, report_lines(found, ablated))


if __name__ == "__main__":
    main()
