"""Assignments that know nothing of the game, to compare with under the same budget."""

import numpy as np

from coopq.storage import Storage
from coopq.types import Assignment, Assignments, Width


def uniform_assignment(n_players: int, bits: Width) -> Assignment:
    """Every player at `bits`."""
    return np.full(n_players, bits, dtype=np.float32)


def random_assignments(storage: Storage, widths: tuple[Width, ...], limit: int, n: int, seed: int) -> Assignments:
    """Random assignments that use up a budget.

    Players are taken in random order, and each is raised by a width if it still fits.

    Args:
        storage: Sizes of the players.
        widths: The widths to choose from, ascending.
        limit: Bytes of the quantized weights at most.
        n: How many.
        seed: Seed of the orders.
    Returns:
        Shape (n, n_players).
    """
    steps = len(widths) - 1
    costs = storage.raise_costs(*widths).reshape(-1, steps)[:, ::-1]
    levels = np.zeros((n, len(costs)), dtype=np.intp)
    for row, level in enumerate(levels):
        left = limit - sum(storage.n_bytes[widths[0]])
        for drawn in np.random.default_rng([seed, row]).permutation(costs.size):
            player = drawn // steps
            if costs[player, level[player]] <= left:
                left -= costs[player, level[player]]
                level[player] += 1
    return np.array(widths, dtype=np.float32)[levels]
