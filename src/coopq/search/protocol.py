"""What an estimator and a search are, and the loops that run them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from coopq.core.goal import Limit, Stopped
from coopq.core.types import Assignment, Assignments, Game, Losses
from coopq.search.measured import Measured


class Estimator(Protocol):
    """Proposes assignments to measure and learns from their losses; an estimator never calls the game.

    A proposal is a function of the seed and of the losses learnt so far, nothing else: an interrupted run replays its
    losses from the journal and goes on.
    """

    def propose(self) -> Assignments:
        """The next assignments to measure, shape (n, n_players); n = 0 ends the run."""
        ...

    def learn(self, assignments: Assignments, losses: Losses) -> None:
        """Take the losses of the assignments proposed last, shape (n,), nats per token."""
        ...


class Search(Estimator, Protocol):
    """An estimator that chooses an assignment for each budget of its space.

    Attributes:
        measured: Points measured on all calibration sequences.
        share: Share of the calibration sequences that the assignments proposed last are to be measured on.
    """

    measured: Measured
    share: float = 1.0

    def choose(self, capacity: int) -> Assignment:
        """The assignment for a budget's capacity, shape (n_players,)."""
        ...


AnyEstimator = TypeVar("AnyEstimator", bound=Estimator)
AnySearch = TypeVar("AnySearch", bound=Search)


def run(estimator: AnyEstimator, game: Game) -> AnyEstimator:
    """Measure what an estimator proposes until it proposes nothing, and return the estimator."""
    while len(assignments := estimator.propose()):
        estimator.learn(assignments, game(assignments))
    return estimator


def run_search(
    search: AnySearch,
    games: Callable[[float], Game],
    limit: Limit | None = None,
    after: Callable[[AnySearch], None] = lambda _: None,
) -> AnySearch:
    """Measure what a search proposes, each time on the share of sequences that it asks for, and return the search.

    Args:
        search: The search.
        games: The game on a share of the calibration sequences. A game that meets the limit raises `Stopped`.
        limit: When to end early. The first points are measured in any case.
        after: Called whenever the search has learnt something.
    """
    while len(assignments := search.propose()):
        try:
            losses = games(search.share)(assignments)
        except Stopped:
            break
        search.learn(assignments, losses)
        after(search)
        if limit is not None:
            limit.begin()
    return search
