"""Results of a bench, measured again from nothing, against the results that are published.

    coopq bench benchmarks/again.toml --out build/again     # one model, backend and seed: minutes
    python benchmarks/reproduced.py build/again docs/results/small

For cases and seeds that both folders have: the number of rows in which a method chose the same assignment, and the
differences of the losses. Writes docs/results/reproduced.md.
"""

from collections.abc import Iterator
from pathlib import Path

from _common import RESULTS, command_line, table, write_report
from coopq.judge.bench.config import read_bench
from coopq.judge.bench.results import Result, Row
from coopq.judge.bench.run import finished


def same_rows(ours: Result, published: Result) -> Iterator[tuple[Row, Row]]:
    """Rows of the same method and budget, or of the same width if they have no budget."""
    known = {key(row): row for row in published.rows}
    return ((row, known[key(row)]) for row in ours.rows if key(row) in known)


def key(row: Row) -> tuple[object, ...]:
    """What makes a row of one result comparable to a row of another."""
    return row.method, row.budget, row.average_bits if row.budget is None else None


def compare(ours: Result, published: Result) -> list[object]:
    """The row of a case and seed."""
    both = list(same_rows(ours, published))
    same = [abs(a.nll - b.nll) for a, b in both if a.assignment == b.assignment]
    other = [abs(a.nll - b.nll) for a, b in both if a.assignment != b.assignment]
    name = f"{ours.case}-seed{ours.seed}"
    return [name, len(both), len(same), f"{max(same, default=0.0):.1e}", f"{max(other, default=0.0):.4f}"]


def main() -> None:
    """Compare two folders, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("again", type=Path, help="folder of the bench that was measured again")
    parser.add_argument("published", type=Path, help="folder of the published bench")
    arguments = parser.parse_args()
    bench = read_bench(Path("benchmarks/again.toml"))  # relative, as it was run
    found = [finished(bench, folder)[1] for folder in (arguments.again, arguments.published)]
    ours, published = ({(result.case, result.seed): result for result in results} for results in found)
    columns = ["case and seed", "rows", "same assignment", "losses of these apart, at most"]
    lines = [
        "Written by `python benchmarks/reproduced.py`, from `benchmarks/again.toml`, a part of `small.toml`, run in a",
        "new folder. Rows: methods and budgets, full precision and uniform widths; WikiText-2 losses, nats/token.",
        "",
        *table(
            [*columns, "losses of the others, at most"],
            [compare(ours[run], published[run]) for run in ours if run in published],
        ),
    ]
    write_report(RESULTS / "reproduced.md", lines)


if __name__ == "__main__":
    main()
