"""The quantization game: the loss of each assignment, measured once and kept in a journal."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coopq.core.errors import EstimationError
from coopq.core.goal import Limit
from coopq.core.types import Assignment, Assignments, Game, Losses, ProgressCallback, as_widths, silent
from coopq.game.engines.prefix_engine import prefix_tree_size
from coopq.game.journal import Journal


class Engine(Protocol):
    """Measures assignments: `coopq.game.engines.prefix_engine.PrefixEngine` here, or workers on a cluster."""

    def evaluate(self, assignments: Assignments) -> Iterator[tuple[Assignment, npt.NDArray[np.float64], int]]:
        """Each distinct assignment in any order, its loss on each sequence, and the block forwards that it took."""
        ...


class Workers(Protocol):
    """Processes that measure for a session, as `coopq.game.engines.ray_cluster.Cluster`."""

    n_workers: int

    def engine(self, name: str, tokens: npt.NDArray[np.int64], loss: str) -> Engine:
        """What measures a loss on tokens, which have a name of their own."""
        ...


class QuantizationGame:
    """v(assignment) = mean loss per token on one fixed token set; the engine decides which loss.

    Args:
        engine: Measures assignments.
        journal: Losses measured before; they are not measured again.
        progress: Told of every loss.
        stage: Name of the work for `progress`.
        limit: When to end early.

    Attributes:
        journal: The journal, with every loss measured here.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        progress: ProgressCallback = silent,
        stage: str = "measuring",
        limit: Limit | None = None,
    ) -> None:
        self._engine = engine
        self.journal = journal
        self._progress = progress
        self._stage = stage
        self._limit = limit
        self._done = self._total = 0

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, nats per token, shape (n,).

        Raises:
            EstimationError: As `per_sequence`.
        """
        return self.per_sequence(assignments).mean(axis=1)

    def per_sequence(self, assignments: Assignments) -> npt.NDArray[np.float64]:
        """Losses of each assignment on each sequence, nats per token, shape (n, n_sequences).

        Raises:
            EstimationError: If the engine returns no loss for an assignment.
            Stopped: If the time is over; losses measured until then are in the journal.
        """
        unique = np.unique(assignments, axis=0)
        unknown = np.array([row for row in unique if self.journal.get(row) is None], dtype=np.float32)
        self._total += len(unique)
        self._done += len(unique) - len(unknown)
        if len(unknown):
            self._progress(self._stage, self._done, self._total)
            self._check_time()
            for n_measured, (assignment, losses, block_forwards) in enumerate(self._engine.evaluate(unknown), 1):
                self.journal.append(assignment, losses, block_forwards)
                self._done += 1
                self._progress(self._stage, self._done, self._total)
                if n_measured < len(unknown):
                    self._check_time()
        return np.stack([self._recorded(row) for row in assignments])

    def _check_time(self) -> None:
        if self._limit is not None:
            self._limit.check_time()

    def _recorded(self, assignment: Assignment) -> npt.NDArray[np.float64]:
        """The losses of an assignment that was measured, shape (n_sequences,)."""
        losses = self.journal.get(assignment)
        if losses is None:
            raise EstimationError(
                f"the engine returned no loss for assignment {as_widths(assignment)}; run the same command again: "
                "losses that are in the journal are not measured again"
            )
        return losses


class Meter:
    """A game that counts the assignments that are measured for the first time.

    Args:
        game: The game.
        blocks: Block of each player, shape (n_players,).
        known: Assignments that count as measured before, shape (n, n_players).
        limit: When to end early.
        share: Share of the calibration sequences that the game measures on.

    Attributes:
        block_forwards: Block forwards over all tokens that an uninterrupted run spends. Assignments share prefixes
            within a call only.
        evaluations: Assignments measured.
    """

    def __init__(
        self,
        game: Game,
        blocks: Sequence[int],
        known: Assignments,
        limit: Limit | None = None,
        share: float = 1.0,
    ) -> None:
        self._game = game
        self._blocks = blocks
        self._limit, self._share = limit, share
        self._known = {row.tobytes() for row in known}
        self.block_forwards = 0
        self.evaluations = 0

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, nats per token, shape (n,).

        Raises:
            Stopped: If the limit does not allow them.
        """
        new = [row for row in np.unique(assignments, axis=0) if row.tobytes() not in self._known]
        if new:
            block_forwards = prefix_tree_size(np.array(new), self._blocks)
            if self._limit is not None:
                self._limit.spend(self._share * block_forwards / len(set(self._blocks)))
            self._known.update(row.tobytes() for row in new)
            self.block_forwards += block_forwards
            self.evaluations += len(new)
        return self._game(assignments)


class Meters:
    """Meters of one game on different shares of its sequences; work on a share counts as that share of the work.

    Args:
        make_game: Returns the game on the first n sequences.
        n_sequences: Number of all sequences.
        blocks: Block of each player, shape (n_players,).
        known: Assignments that count as measured before, shape (n, n_players).
        limit: When to end early.
    """

    def __init__(
        self,
        make_game: Callable[[int], Game],
        n_sequences: int,
        blocks: Sequence[int],
        known: Assignments,
        limit: Limit | None = None,
    ) -> None:
        self._make_game = make_game
        self._n_sequences = n_sequences
        self._blocks = blocks
        self._known = known
        self._limit = limit
        self._meters: dict[int, Meter] = {}

    def __call__(self, share: float) -> Meter:
        """The game on a share of the sequences, at least one."""
        n = max(1, round(share * self._n_sequences))
        if n not in self._meters:
            self._meters[n] = Meter(self._make_game(n), self._blocks, self._known, self._limit, n / self._n_sequences)
        return self._meters[n]

    @property
    def block_forwards(self) -> float:
        """Block forwards, in units of one over all sequences."""
        return sum(n * meter.block_forwards for n, meter in self._meters.items()) / self._n_sequences

    @property
    def evaluations(self) -> float:
        """Assignments measured, in units of one on all sequences."""
        return sum(n * meter.evaluations for n, meter in self._meters.items()) / self._n_sequences
