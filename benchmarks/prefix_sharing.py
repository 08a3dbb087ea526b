"""Layer forwards of SPQE walks with and without sharing prefixes; exact counts, no model needed.

    python benchmarks/prefix_sharing.py

Writes docs/results/prefix_sharing.md.
"""

from pathlib import Path

from coopq.engine import prefix_tree_size
from coopq.estimators import SPQE

REPORT = Path(__file__).parents[1] / "docs" / "results" / "prefix_sharing.md"
SEED = 0


def main() -> None:
    """Count for models of 30 to 64 blocks and 10 to 100 walks."""
    lines = [
        "# Layer forwards with and without sharing prefixes",
        "",
        f"Written by `python benchmarks/prefix_sharing.py`: walks from seed {SEED}, every walk measured at each of its",
        "L + 1 points. Without sharing, M walks take M L^2 layer forwards (L evaluations a walk beside the common",
        "start, L blocks each). The engine takes one for each distinct prefix.",
        "",
        "| blocks L | walks M | M L^2 | prefix tree | times fewer |",
        "| --- | --- | --- | --- | --- |",
    ]
    for n_players in (30, 32, 64):
        for permutations in (10, 25, 50, 100):
            points = SPQE(n_players, low=2, high=4, permutations=permutations, seed=SEED).points
            unshared, shared = permutations * n_players**2, prefix_tree_size(points)
            lines += [f"| {n_players} | {permutations} | {unshared} | {shared} | {unshared / shared:.2f} |"]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
