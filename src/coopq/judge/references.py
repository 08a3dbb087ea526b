"""Assignments that are chosen without measuring anything, to compare methods with at the same budget."""

import numpy as np

from coopq.core.sizes import Sizes
from coopq.core.types import Assignment, Assignments, Width

FULL_PRECISION, UNIFORM, RANDOM = REFERENCES = ("full precision", "uniform", "random")
"""Names of the references, in tables and saved files."""
N_RANDOM = 5
"""Random assignments of each budget; losses are averaged over them."""


def uniform_assignment(n_players: int, bits: Width) -> Assignment:
    """Every player at `bits`, shape (n_players,)."""
    return np.full(n_players, bits, dtype=np.float32)


def random_assignments(sizes: Sizes, widths: tuple[Width, ...], limit: int, n: int, seed: int) -> Assignments:
    """Random assignments that use up a budget.

    Steps up are taken in random order; a step is taken if it still fits into the budget.

    Args:
        sizes: Bytes of the players at each width.
        widths: The widths to choose from, ascending.
        limit: Most bytes of the quantized weights.
        n: Number of assignments.
        seed: Seed of the orders.
    Returns:
        Shape (n, n_players).
    """
    player_widths = sizes.player_widths(widths)
    player_of_step = np.repeat(np.arange(len(player_widths)), [len(own) - 1 for own in player_widths])
    found = np.full((n, len(player_widths)), widths[0], dtype=np.float32)
    for row, assignment in enumerate(found):
        steps_up, left = [0] * len(player_widths), limit - sizes.total_bytes(assignment)
        for player in np.random.default_rng([seed, row]).permutation(player_of_step):
            width, wider = player_widths[player][steps_up[player] :][:2]
            step_bytes = sizes.n_bytes[wider][player] - sizes.n_bytes[width][player]
            if step_bytes <= left:
                left -= step_bytes
                steps_up[player] += 1
                assignment[player] = wider
    return found
