"""What the active search knows of each step before it measures: a gradient score, and what kind of step it is."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from coopq.core.types import UNTOUCHED, Game, Player
from coopq.game.session import Session
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS
from coopq.search import SearchSpace
from coopq.search.informed import Prior

SCORE = "auto-quantize"
"""The score that is the prior: benchmarks/informed.py compares scores."""
_FALL = 4.0
"""By what a bit more divides the error of rounding, in squares."""


def step_prior(session: Session, space: SearchSpace, game: Game) -> tuple[Prior, int]:
    """The prior of a session's steps, and the block forwards that it takes.

    Args:
        session: The session.
        space: Players and steps.
        game: Measures the loss of full precision, where the loss is not a divergence.
    """
    found = cached_score(session, METHODS[SCORE], sensitivities(session))
    origin = 0.0
    if session.request.search.loss != "kl":
        origin = float(game(np.full((1, space.n_players), UNTOUCHED, dtype=np.float32))[0])
    return make_prior(found.gains, origin, session.players, space), found.block_forwards


def make_prior(gains: npt.NDArray[np.float64], origin: float, players: Sequence[Player], space: SearchSpace) -> Prior:
    """The prior that a score stands for.

    Args:
        gains: The score of each step, shape (n_steps,).
        origin: Loss of the model in full precision, nats per token: 0 for divergences.
        players: The players, by block.
        space: Players and steps.
    """
    positive = gains[gains > 0]
    gains = np.maximum(gains, 0.01 * float(np.median(positive)) if len(positive) else 1.0)
    pairs = [pair for widths in space.player_widths for pair in zip(widths[:0:-1], widths[-2::-1], strict=True)]
    is_first = np.diff(space.player_of_step, prepend=-1) > 0
    apart = np.array([high - low for high, low in pairs], dtype=np.float64)
    base = float((gains / (_FALL**apart - 1))[is_first].sum())
    kinds = [_kind([linear.name for linear in players[player].linears]) for player in space.player_of_step]
    return Prior(
        gains=gains,
        base=base,
        origin=origin,
        blocks=np.array([player.block for player in players], dtype=np.intp)[space.player_of_step],
        kinds=_numbers([f"{kind} {pair}" for kind, pair in zip(kinds, pairs, strict=True)]),
        widths=_numbers([str(pair) for pair in pairs]),
    )


def _kind(names: Sequence[str]) -> str:
    """The projections of a player, by the last parts of the names of its layers."""
    return "+".join(name.rpartition(".")[2] for name in names)


def _numbers(names: Sequence[str]) -> npt.NDArray[np.intp]:
    """A number for each different name, in the order of the names."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp)
