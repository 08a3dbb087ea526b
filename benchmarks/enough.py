"""How long the active search of several widths should go on.

    python benchmarks/enough.py                          # half an hour of one core; resumes
    python benchmarks/enough.py --granularity block      # minutes

The players are the 48 fused layers of reference models of benchmarks/data, or the 12 blocks, with four widths. Three
budgets are searched together on 1,024 tokens of C4. One search measures a number of points for each step between
widths: as many as a search of two widths measures for each player. The other search ends by its own rule. Writes
docs/results/enough-GRANULARITY.md.
"""

from _common import RESULTS, WORK, command_line, write_report
from _models import session_on, source_of
from coopq.core.specs import Request
from coopq.search.strategies.active import most_points
from openings import trace_head, trace_row, trace_search

CASES = {"qwen": "kl", "gemma": "nll"}
"""The loss of each model."""
BUDGETS = ("2.5avg", "3.2avg", "4.5avg")
PLAYERS = {"fused": "48 fused layers", "block": "12 blocks"}
POINTS_PER_STEP = {"fused": 6, "block": 13}
CHECKPOINTS = {"fused": (400, 500, 600, 800), "block": (100, 120, 140, 200)}
"""Costs at which the report looks at searches, in forwards of the whole model."""


def main() -> None:
    """Measure all models, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--granularity", choices=PLAYERS, default="fused", help="what the players are")
    granularity = parser.parse_args().granularity
    per_step, checkpoints = POINTS_PER_STEP[granularity], CHECKPOINTS[granularity]
    lines = [
        "# How long the active search of several widths goes on",
        "",
        f"Written by `python benchmarks/enough.py --granularity {granularity}`: {PLAYERS[granularity]} of the",
        f"reference models by `rtn`, 4 x 256 tokens of C4, 2, 3, 4 and 8 bits, budgets of {', '.join(BUDGETS)}",
        "together. Cost in forwards of the model; the lowest loss found for each budget, nats per token, at some costs",
        "and at the end.",
        "",
    ]
    limits = {f"{per_step} points a step": lambda space: per_step * space.n_steps, "as the search ends": most_points}
    for name, loss in CASES.items():
        request = Request.from_options(
            model=source_of(name),
            backend="rtn",
            bits=(2, 3, 4, 8),
            granularity=granularity,
            loss=loss,
            tokens=1024,
            sequence_length=256,
        )
        lines += trace_head(f"{name}, {loss}", "points measured", checkpoints)
        with session_on(request, WORK / "enough" / granularity / name) as session:
            for end, limit in limits.items():
                lines.append(trace_row(end, trace_search(session, BUDGETS, limit=limit), checkpoints))
                print(lines[-1], flush=True)
        lines.append("")
    write_report(RESULTS / f"enough-{granularity}.md", lines, quiet=True)


if __name__ == "__main__":
    main()
