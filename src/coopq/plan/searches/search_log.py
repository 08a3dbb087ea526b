"""The recorded losses that each search may reuse; the set is frozen when the search first starts."""

import hashlib
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from coopq.core.errors import RunError
from coopq.core.files import read_record, write_record
from coopq.core.types import Assignments
from coopq.game.journal import Journal

_FORMAT_VERSION = 2


class SearchLog:
    """The file searches.json of a run folder.

    A search may reuse losses that were recorded before the search first started. The log freezes that set: it holds, by
    search, how many losses of the journal the search knew, and a hash of their assignments. Losses measured since are
    replayed when the search asks for them again.

    Args:
        folder: The run folder.
    Raises:
        RunError: If the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "searches.json"
        self._known: dict[str, tuple[int, str]] = {}
        if self._path.is_file():
            self._known = read_record(
                self._path,
                dict[str, dict[str, tuple[Annotated[int, Meta(ge=0)], str]]],
                _FORMAT_VERSION,
                what="record of searches",
                missing=f"{self._path} is gone; run the same command again",
                way_out="restore the file from a copy, or use another run folder",
                error=RunError,
            ).get("searches", {})

    def n_known(self, search: str, journal: Journal) -> int:
        """Number of recorded losses that a search may reuse, frozen at its first call."""
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
        write_record(self._path, {"searches": self._known}, _FORMAT_VERSION)


def _digest(assignments: Assignments) -> str:
    return hashlib.blake2b(np.ascontiguousarray(assignments).tobytes(), digest_size=16).hexdigest()
