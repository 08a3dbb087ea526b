"""What the active search finds by what it spends, against the scores and one-shot losses alone.

    python benchmarks/informed.py llama fused rtn 2,3,4,8      # one case; minutes, resumes
    python benchmarks/informed.py --report                     # only write the report

Loss is the divergence from full precision on 8 x 512 tokens of C4 (4 x 256 for the demo model), three budgets in one
search. Cost is in forwards of the whole model over these tokens, scores included, prefixes shared. Each case starts
without earlier losses. Writes docs/results/informed.md.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from _common import DATA, RESULTS, WORK, command_line, table, write_report
from _models import session_on
from coopq.core.files import read_json, write_json
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.game.game import Meter
from coopq.game.session import Session
from coopq.plan.allocate import search_space
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS
from coopq.plan.scores.prior import step_prior
from coopq.search import ActiveSearch, OneShot, SearchSpace
from coopq.search.solver.exact import allocate

BUDGETS = {"demo": ("3.8bpw", "4.5bpw")}
LOOKS = (30, 60, 120)
"""Forwards at which the report looks at the search."""
SCORES = ("auto-quantize",)


def request_of(model: str, granularity: str, backend: str, bits: str) -> Request:
    """What is searched in a case."""
    tokens = {"tokens": 1024, "sequence_length": 256} if model == "demo" else {"tokens": 4096, "sequence_length": 512}
    return Request.from_options(
        model=model if model == "demo" else str(DATA / model),
        backend=backend,
        bits=tuple(float(width) if "." in width else int(width) for width in bits.split(",")),
        granularity=granularity,
        loss="kl",
        **tokens,
    )


def trace_of(session: Session, space: SearchSpace) -> Iterator[tuple[float, int, list[float]]]:
    """Forwards spent, points measured, and the lowest loss of each budget, after each round of a new search."""
    n_blocks = len(set(session.blocks))
    with session.game("searching") as game:
        meter = Meter(game, session.blocks, np.zeros((0, space.n_players), dtype=np.float32))
        prior, scoring = step_prior(session, space, meter)
        search = ActiveSearch(space, prior=prior)
        while len(assignments := search.propose()):
            search.learn(assignments, meter(assignments))
            lowest = [search.measured.lowest(capacity) for capacity in space.capacities]
            yield (scoring + meter.block_forwards) / n_blocks, len(search.measured), lowest


def measure(case: list[str], place: Path) -> dict[str, Any]:
    """The trace of one case, and what the scores alone choose."""
    request = request_of(*case)
    budgets = [Budget.parse(text) for text in BUDGETS.get(case[0], ("2.8bpw", "3.5bpw", "4.5bpw"))]
    with session_on(request, place / "run") as session:
        space = search_space(session, budgets)
        rounds = []
        for forwards, points, lowest in trace_of(session, space):
            rounds.append((round(forwards, 1), points, lowest))
            print(f"{forwards:7.1f} forwards, {points:4} points: ", *(f"{loss:.5f}" for loss in lowest), flush=True)
        others = {}
        for name in SCORES:
            if any(player.is_end for player in session.players) and not METHODS[name].is_at_once:
                continue
            score = cached_score(session, METHODS[name], sensitivities(session))
            others[name] = (score.block_forwards, _chosen(space, score.gains))
        with session.game("one-shot") as game:
            meter = Meter(game, session.blocks, np.zeros((0, space.n_players), dtype=np.float32))
            one_shot = OneShot(space, end="high")
            while len(assignments := one_shot.propose()):
                one_shot.learn(assignments, meter(assignments))
            chosen = np.array([one_shot.choose(capacity) for capacity in space.capacities])
            others["one-shot-high"] = (meter.block_forwards, chosen)
            n_blocks = len(set(session.blocks))
            found = {
                name: (spent / n_blocks, np.array(game(assignments)).tolist())
                for name, (spent, assignments) in others.items()
            }
    return {"case": case, "players": space.n_players, "steps": space.n_steps, "rounds": rounds, "others": found}


def _chosen(space: SearchSpace, gains: Any) -> Any:
    """What a score chooses for each budget."""
    from dataclasses import replace

    programs = [replace(space.constraint(capacity), a=gains) for capacity in space.capacities]
    return space.assignments(np.array([allocate(program).q for program in programs]))


def report_lines(found: list[dict[str, Any]]) -> list[str]:
    """The report on all cases."""
    lines = ["# What does the active search find, and what does it spend?", "", *(__doc__ or "").splitlines()[7:10], ""]
    for each in found:
        budgets = BUDGETS.get(each["case"][0], ("2.8bpw", "3.5bpw", "4.5bpw"))
        rounds = each["rounds"]
        rows: list[list[object]] = [
            [name, f"{spent:.0f}", *(f"{loss:.5f}" for loss in losses)]
            for name, (spent, losses) in each["others"].items()
        ]
        for look in LOOKS:
            seen = [entry for entry in rounds if entry[0] <= look]
            if seen and seen[-1] is not rounds[-1]:
                rows.append([f"active, after {look}", f"{seen[-1][0]:.0f}", *(f"{loss:.5f}" for loss in seen[-1][2])])
        rows.append(["active, at its end", f"{rounds[-1][0]:.0f}", *(f"{loss:.5f}" for loss in rounds[-1][2])])
        lines += [f"## {', '.join(each['case'])}: {each['players']} players, {each['steps']} steps", ""]
        lines += [*table(["method", "forwards", *budgets], rows), ""]
    return lines


def main() -> None:
    """Measure a case, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("case", nargs="*", help="model, granularity, backend, bits")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=WORK / "informed")
    parser.add_argument("--out", type=Path, default=RESULTS / "informed.md")
    options = parser.parse_args()
    if not options.report:
        place = options.work / "-".join(options.case)
        write_json(place / "found.json", json.loads(json.dumps(measure(options.case, place))))
    found = [read_json(file) for file in sorted(options.work.glob("*/found.json"))]
    write_report(options.out, report_lines(found))


if __name__ == "__main__":
    main()
