"""The quantization game: losses by assignment, measured once and journalled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coopq.game.prefix_engine import prefix_tree_size
from coopq.game.journal import Journal
from coopq.core.types import Assignment, Assignments, Game, Losses, ProgressCallback, silent


class Engine(Protocol):
    """What measures assignments: `coopq.game.prefix_engine.PrefixEngine`, or a cluster of them."""

    def evaluate(self, assignments: Assignments) -> Iterator[tuple[Assignment, npt.NDArray[np.float64], int]]:
        """Each distinct assignment in any order, its loss on each sequence, and the layer forwards that it took."""
        ...


class QuantizationGame:
    """v(assignment) = mean negative log-likelihood per token on one fixed token set.

    Args:
        engine: What measures.
        journal: What it knows is never measured again.
        n_players: Length of an assignment.
        progress: Told of every value.
        stage: Name of the work for `progress`.

    Attributes:
        journal: Where values are kept.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        n_players: int,
        progress: ProgressCallback = silent,
        stage: str = "measuring",
    ) -> None:
        self._engine = engine
        self.journal = journal
        self._n_players = n_players
        self._progress = progress
        self._stage = stage
        self._done = self._total = 0

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
        unknown = np.array([row for row in unique if self.journal.get(row) is None], dtype=np.float32)
        self._total += len(unique)
        self._done += len(unique) - len(unknown)
        if len(unknown):
            self._progress(self._stage, self._done, self._total)
            for assignment, losses, layer_forwards in self._engine.evaluate(unknown):
                self.journal.append(assignment, losses, layer_forwards)
                self._done += 1
                self._progress(self._stage, self._done, self._total)
        known = [self.journal.get(row) for row in assignments]
        return np.stack([losses for losses in known if losses is not None])


class Meter:
    """A game that counts what is measured of it for the first time.

    Args:
        game: The game.
        blocks: The block of each player.
        known: Assignments that count as measured, shape (n, n_players).

    Attributes:
        layer_forwards: Block forwards over all tokens that an uninterrupted run spends, prefixes shared in each call.
        evaluations: Assignments measured.
    """

    def __init__(self, game: Game, blocks: Sequence[int], known: Assignments) -> None:
        self._game = game
        self._blocks = blocks
        self._known = {row.tobytes() for row in known}
        self.layer_forwards = 0
        self.evaluations = 0

    @property
    def n_players(self) -> int:
        """Number of players."""
        return self._game.n_players

    def __call__(self, assignments: Assignments) -> Losses:
        """Losses of the assignments."""
        new = [row for row in np.unique(assignments, axis=0) if row.tobytes() not in self._known]
        if new:
            self._known.update(row.tobytes() for row in new)
            self.layer_forwards += prefix_tree_size(np.array(new), self._blocks)
            self.evaluations += len(new)
        return self._game(assignments)


class Meters:
    """Meters of a game on more and less of its sequences; what each counts is taken by its share of them.

    Args:
        game_of: The game on a number of sequences.
        n_sequences: All of them.
        blocks: As in `Meter`.
        known: Likewise.
    """

    def __init__(
        self, game_of: Callable[[int], Game], n_sequences: int, blocks: Sequence[int], known: Assignments
    ) -> None:
        self._game_of = game_of
        self._n_sequences = n_sequences
        self._blocks = blocks
        self._known = known
        self._meters: dict[int, Meter] = {}

    def __call__(self, share: float) -> Meter:
        """The game on a share of the sequences, at least one."""
        n = max(1, round(share * self._n_sequences))
        if n not in self._meters:
            self._meters[n] = Meter(self._game_of(n), self._blocks, self._known)
        return self._meters[n]

    @property
    def layer_forwards(self) -> float:
        """Block forwards, in those over all sequences."""
        return sum(n * meter.layer_forwards for n, meter in self._meters.items()) / self._n_sequences

    @property
    def evaluations(self) -> float:
        """Assignments measured, likewise."""
        return sum(n * meter.evaluations for n, meter in self._meters.items()) / self._n_sequences
