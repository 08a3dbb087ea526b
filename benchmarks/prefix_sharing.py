"""Block forwards of SPQE walks with and without shared prefixes: exact counts that need no model.

    python benchmarks/prefix_sharing.py

Writes docs/results/prefix_sharing.md.
"""

import numpy as np

from _common import RESULTS, command_line, row, table, write_report
from coopq.game.engines.prefix_engine import prefix_tree_size
from coopq.search import SPQE

SEED = 0
LINEARS = 7
"""Linear layers of a block in Llama, Mistral and Qwen."""


def main() -> None:
    """Count block forwards for models of 30 to 64 blocks and 10 to 100 walks, and write the report."""
    command_line(__doc__).parse_args()
    lines = [
        f"Written by `python benchmarks/prefix_sharing.py`: walks from seed {SEED}, every walk measured at each of its",
        "N + 1 points. Without sharing, M walks of N players in L blocks take M N L block forwards (N evaluations a",
        "walk besides the common start, L blocks each). The engine takes one for each distinct prefix of blocks.",
        f"Players are the blocks, or the {LINEARS} linear layers of each block.",
        "",
        *table(["blocks L", "players N", "walks M", "M N L", "prefix tree", "times fewer"], []),
    ]
    for per_block in (1, LINEARS):
        for n_blocks in (30, 32, 64):
            blocks = np.repeat(np.arange(n_blocks), per_block).tolist()
            n_players = len(blocks)
            for permutations in (10, 25, 50, 100):
                points = SPQE(n_players, low=2, high=4, permutations=permutations, seed=SEED).points
                unshared, shared = permutations * n_players * n_blocks, prefix_tree_size(points, blocks)
                lines.append(row([n_blocks, n_players, permutations, unshared, shared, f"{unshared / shared:.2f}"]))
    write_report(RESULTS / "prefix_sharing.md", lines)


if __name__ == "__main__":
    main()
