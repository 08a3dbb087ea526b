"""What searches knew when they began: one that goes on must not learn its own losses before it asked for them."""

import hashlib
from pathlib import Path

import numpy as np

from coopq.core.files import read_json, write_json
from coopq.game.journal import Journal
from coopq.core.types import Assignments


class Beginnings:
    """The file searches.json of a run folder: by search, how many losses of its journal it knew, and a hash of them.

    What was measured since is replayed, not known.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "searches.json"
        self._begun: dict[str, tuple[int, str]] = read_json(self._path) if self._path.is_file() else {}

    def known(self, search: str, journal: Journal) -> int:
        """Number of losses in the journal when a search began, which is now if it never did."""
        known, digest = self._begun.get(search, (0, ""))
        if digest != _digest(journal.first(known)[0]):  # never begun, or the journal is another one by now
            known = len(journal)
            self._write(search, known, _digest(journal.first(known)[0]))
        return known

    def from_nothing(self, search: str) -> None:
        """Let a search that has not begun yet know nothing when it does."""
        if search not in self._begun:
            self._write(search, 0, _digest(np.zeros((0, 0), dtype=np.float32)))

    def _write(self, search: str, known: int, digest: str) -> None:
        self._begun[search] = known, digest
        write_json(self._path, self._begun)


def _digest(assignments: Assignments) -> str:
    return hashlib.blake2b(np.ascontiguousarray(assignments).tobytes(), digest_size=16).hexdigest()
