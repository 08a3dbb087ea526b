"""Assignments that know nothing of the game, to compare with under the same budget."""

import numpy as np

from coopq.core.sizes import Storage
from coopq.core.types import Assignment, Assignments, Width


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
    levels = storage.levels(*widths)
    players = np.repeat(np.arange(len(levels)), [len(of_player) - 1 for of_player in levels])
    found = np.full((n, len(levels)), widths[0], dtype=np.float32)
    for row, assignment in enumerate(found):
        raised, left = [0] * len(levels), limit - storage.bytes_of(assignment)
        for player in np.random.default_rng([seed, row]).permutation(players):
            width, wider = levels[player][raised[player] :][:2]
            cost = storage.n_bytes[wider][player] - storage.n_bytes[width][player]
            if cost <= left:
                left -= cost
                raised[player] += 1
                assignment[player] = wider
    return found
