"""What the active search knows of each step before it measures: a gradient score, and what kind of step it is."""

import numpy as np

from coopq.core.types import UNTOUCHED, Game
from coopq.game.session import Session
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS
from coopq.search import SearchSpace
from coopq.search.prior import PRIOR_SCORE, Prior, make_prior


def step_prior(session: Session, space: SearchSpace, game: Game) -> tuple[Prior, int]:
    """The prior of a session's steps, and the block forwards that it takes.

    Args:
        session: The session.
        space: Players and steps.
        game: Measures the loss of full precision, where the loss is not a divergence.
    """
    found = cached_score(session, METHODS[PRIOR_SCORE], sensitivities(session))
    origin = 0.0
    if session.request.search.loss != "kl":
        origin = float(game(np.full((1, space.n_players), UNTOUCHED, dtype=np.float32))[0])
    layers = [[linear.name for linear in player.linears] for player in session.players]
    return make_prior(space, found.gains, origin, session.blocks, layers), found.block_forwards
