"""Assignments that know nothing of the game, to compare with under the same budget."""

import numpy as np

from coopq.storage import Storage
from coopq.types import Assignment, Assignments


def uniform_assignment(n_players: int, bits: int) -> Assignment:
    """Every player at `bits`."""
    return np.full(n_players, bits, dtype=np.int8)


def random_assignments(storage: Storage, low: int, high: int, limit: int, n: int, seed: int) -> Assignments:
    """Random assignments that use up a budget.

    Players are taken in random order, and each is raised from `low` to `high` if it still fits.

    Args:
        storage: Sizes of the players.
        low: The lower width.
        high: The higher width.
        limit: Bytes of the quantized weights at most.
        n: How many.
        seed: Seed of the orders.
    Returns:
        Shape (n, n_players).
    """
    costs = storage.raise_costs(low, high)
    assignments = np.full((n, len(costs)), low, dtype=np.int8)
    for row, assignment in enumerate(assignments):
        left = limit - sum(storage.n_bytes[low])
        for player in np.random.default_rng([seed, row]).permutation(len(costs)):
            if costs[player] <= left:
                assignment[player] = high
                left -= costs[player]
    return assignments
