"""What searches knew when they began: a resumed search must propose the same points again."""

import hashlib
from pathlib import Path

import numpy as np

from coopq.core.files import read_json, write_json
from coopq.core.types import Assignments
from coopq.game.journal import Journal


class SearchLog:
    """The file searches.json of a run folder.

    A search may reuse losses that were recorded before the search first started. The log freezes that set: it holds, by
    search, how many losses of the journal the search knew, and a hash of their assignments. Losses measured since are
    replayed when the search asks for them again.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "searches.json"
        self._known: dict[str, tuple[int, str]] = read_json(self._path) if self._path.is_file() else {}

    def n_known(self, search: str, journal: Journal) -> int:
        """Number of losses in the journal when a search began; a search that never began begins now."""
        known, digest = self._known.get(search, (0, ""))
        if digest != _digest(journal.first(known)[0]):  # the search never began, or the journal is another one by now
            known = len(journal)
            self._write(search, known, _digest(journal.first(known)[0]))
        return known

    def begin_with_nothing(self, search: str) -> None:
        """Let a search that has not begun yet know nothing when it begins."""
        if search not in self._known:
            self._write(search, 0, _digest(np.zeros((0, 0), dtype=np.float32)))

    def _write(self, search: str, known: int, digest: str) -> None:
        self._known[search] = known, digest
        write_json(self._path, self._known)


def _digest(assignments: Assignments) -> str:
    return hashlib.blake2b(np.ascontiguousarray(assignments).tobytes(), digest_size=16).hexdigest()
