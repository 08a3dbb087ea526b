"""Assignments that are chosen without measuring anything, to compare methods with at the same budget."""

from collections.abc import Sequence

import numpy as np

from coopq.core.sizes import Sizes
from coopq.core.types import Assignment, Assignments, Width, next_width

ORIGINAL, UNIFORM, RANDOM, MIX = REFERENCES = ("original", "uniform", "random", "llama.cpp mix")
"""Names of the references, in tables and saved files."""
N_RANDOM = 5
"""Random assignments of each budget; losses are averaged over them."""


def uniform_assignment(player_widths: Sequence[Sequence[Width]], bits: Width) -> Assignment:
    """Every player at `bits`, or at its next wider width or, if it has no wider width, at its widest.

    Shape (n_players,).
    """
    return np.array([next_width(own, bits) for own in player_widths], dtype=np.float32)


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
    found = np.array([[own[0] for own in player_widths]] * n, dtype=np.float32)
    for row, assignment in enumerate(found):
        steps_up, left = [0] * len(player_widths), limit - sizes.total_bytes(assignment)
        for player in np.random.default_rng([seed, row]).permutation(player_of_step):
            width, wider = player_widths[player][steps_up[player] :][:2]
            step_bytes = sizes.player_bytes(player, wider) - sizes.player_bytes(player, width)
            if step_bytes <= left:
                left -= step_bytes
                steps_up[player] += 1
                assignment[player] = wider
    return found
