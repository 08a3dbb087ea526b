"""Results of a bench, measured again from nothing, against those that are published.

    coopq bench benchmarks/again.toml --out build/again     # one model, backend and seed: minutes
    python benchmarks/reproduced.py build/again docs/results/small

Cases and seeds that both folders have: in how many rows a method chose the same assignment, and by how much losses
differ. Writes docs/results/reproduced.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from coopq.core.files import read_json
from coopq.judge.bench.run import Result, Row

REPORT = Path(__file__).parents[1] / "docs" / "results" / "reproduced.md"


def results(folder: Path) -> dict[str, Result]:
    """What a bench has measured, by the names of its files."""
    return {path.stem: Result.from_json(read_json(path)) for path in sorted((folder / "results").glob("*.json"))}


def pairs(ours: Result, theirs: Result) -> Iterator[tuple[Row, Row]]:
    """Rows of the same method and budget, and of the same width where there is no budget."""

    def key(row: Row) -> tuple[object, ...]:
        return row.method, row.budget, row.average_bits if row.budget is None else None

    known = {key(row): row for row in theirs.rows}
    return ((row, known[key(row)]) for row in ours.rows if key(row) in known)


def line(name: str, ours: Result, theirs: Result) -> str:
    """A case and seed as a line of the table."""
    both = list(pairs(ours, theirs))
    same = [(of, other) for of, other in both if of.assignment == other.assignment]
    others = [(of, other) for of, other in both if of.assignment != other.assignment]
    apart, moved = (max((abs(of.nll - other.nll) for of, other in some), default=0.0) for some in (same, others))
    return f"| {name} | {len(both)} | {len(same)} | {apart:.1e} | {moved:.4f} |"


def main() -> None:
    """Compare two folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("again", type=Path, help="folder of the bench measured again")
    parser.add_argument("published", type=Path, help="folder of the published one")
    arguments = parser.parse_args()
    ours, theirs = results(arguments.again), results(arguments.published)
    lines = [
        "# Measured again from nothing",
        "",
        "Written by `python benchmarks/reproduced.py`, from `benchmarks/again.toml`, a part of `small.toml`, run in a",
        "new folder. Rows: methods and budgets, full precision and uniform widths; WikiText-2 losses, nats/token.",
        "",
        "| case and seed | rows | same assignment | losses of these apart, at most | losses of the others, at most |",
        "| --- | --- | --- | --- | --- |",
        *(line(name, ours[name], theirs[name]) for name in ours if name in theirs),
    ]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
