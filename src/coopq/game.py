"""The quantization game: losses by assignment, measured once and journalled."""

import numpy as np
import numpy.typing as npt

from coopq.engine import PrefixEngine
from coopq.journal import Journal
from coopq.types import Assignments, Losses, ProgressCallback, silent


class QuantizationGame:
    """v(assignment) = mean negative log-likelihood per token on one fixed token set.

    Args:
        engine: What measures.
        journal: Where values are kept; what it knows is never measured again.
        n_players: Length of an assignment.
        progress: Told of every value.
        stage: Name of the work for `progress`.
    """

    def __init__(
        self,
        engine: PrefixEngine,
        journal: Journal,
        n_players: int,
        progress: ProgressCallback = silent,
        stage: str = "measuring",
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._n_players = n_players
        self._progress = progress
        self._stage = stage

    @property
    def n_players(self) -> int:
        """Number of players."""
        return self._n_players

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments, nats per token, shape (n,)."""
        return self.per_sequence(assignments).mean(axis=1)

    def per_sequence(self, assignments: Assignments) -> npt.NDArray[np.float64]:
        """Losses of each assignment on each sequence, shape (n, n_sequences)."""
        unique = np.unique(assignments, axis=0)
        unknown = np.array([row for row in unique if self._journal.get(row) is None], dtype=np.int8)
        done = len(unique) - len(unknown)
        if len(unknown):
            self._progress(self._stage, done, len(unique))
            for assignment, losses, layer_forwards in self._engine.evaluate(unknown):
                self._journal.append(assignment, losses, layer_forwards)
                done += 1
                self._progress(self._stage, done, len(unique))
        known = [self._journal.get(row) for row in assignments]
        return np.stack([losses for losses in known if losses is not None])
