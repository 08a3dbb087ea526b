"""The append-only record of every loss that a run measures.

The file has one JSON object a line: a header with a fingerprint, then a record for each assignment. A record is written
before the next evaluation starts, so a process that is killed loses at most the record that it was writing.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import JournalError, Mismatch
from coopq.core.files import as_plain
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, Assignments, Losses, as_widths

_FORMAT_VERSION = 2
_log = logging.getLogger(__name__)


class Journal:
    """Losses by assignment, kept in a file that is read again when a run resumes.

    Args:
        path: The file; it is created if it is missing.
        fingerprint: What the losses depend on: model, players, backend, tokens, loss, dtype.

    Attributes:
        path: The file.
        block_forwards: Block forwards of all records.

    Raises:
        JournalError: If a line other than the last is broken, or the file has another format version.
        Mismatch: If the file has another fingerprint.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.block_forwards = 0
        self._losses: dict[bytes, npt.NDArray[np.float64]] = {}
        self._loss = _loss_name(fingerprint)
        intact = self._read(fingerprint) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(intact)
        if intact == 0:
            self._write({"format_version": _FORMAT_VERSION, "fingerprint": dict(fingerprint)})

    def get(self, assignment: Assignment) -> npt.NDArray[np.float64] | None:
        """Loss of each calibration sequence, shape (n_sequences,), nats per token; None if not measured."""
        return self._losses.get(_key(assignment))

    def first(self, n: int) -> tuple[Assignments, Losses]:
        """The first n recorded assignments and their mean losses, shapes (n, n_players) and (n,)."""
        records = list(self._losses.items())[:n]
        assignments = [np.frombuffer(key, dtype=np.float32) for key, _ in records]
        return np.array(assignments, dtype=np.float32), np.array([losses.mean() for _, losses in records])

    def append(self, assignment: Assignment, losses: npt.NDArray[np.float64], block_forwards: int) -> None:
        """Record the loss of one assignment on each sequence, and the block forwards that it took."""
        self._write({"bits": as_widths(assignment), self._loss: losses.tolist(), "block_forwards": block_forwards})
        self._losses[_key(assignment)] = losses
        self.block_forwards += block_forwards

    @staticmethod
    def peek(path: Path) -> tuple[tuple[Assignments, Losses], int]:
        """All assignments of a journal, their mean losses, and the block forwards of all records.

        Nothing is written: another process may be writing the file. Broken lines are skipped.
        """
        bits, losses, block_forwards, loss = [], [], 0, ""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                continue
            try:
                record = json.loads(line)
                if not loss:  # the header names the loss
                    loss = _loss_name(record["fingerprint"])
                    continue
                value, spent = float(np.mean(record[loss])), int(record["block_forwards"])
                bits.append(np.array(record["bits"], dtype=np.float32))
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # opening the journal reports broken lines
            losses.append(value)
            block_forwards += spent
        return (np.array(bits), np.array(losses)), block_forwards

    def __len__(self) -> int:
        return len(self._losses)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: Mapping[str, Any]) -> int:
        """Read the file; returns the number of bytes up to the end of the last intact line."""
        intact = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line has no end")
                record = json.loads(line)
                if number == 1:
                    self._check_header(record, fingerprint)
                else:
                    self._learn(record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                if number < len(lines) or (number == 1 and line.endswith(b"\n")):
                    raise JournalError(
                        f"{self.path}, line {number} is broken ({error}); restore the file from a copy, "
                        + ("or use another run folder" if number == 1 else "or delete the line to measure it again")
                    ) from error
                _log.warning("%s: dropped the last line, which was not written whole", self.path)
                break
            intact += len(line)
        return intact

    def _check_header(self, header: dict[str, Any], fingerprint: Mapping[str, Any]) -> None:
        if header["format_version"] != _FORMAT_VERSION:
            raise JournalError(
                f"{self.path} has format {header['format_version']}, and this version of coopq reads "
                f"{_FORMAT_VERSION}; use another run folder"
            )
        ours = as_plain(dict(fingerprint))
        if header["fingerprint"] != ours:
            what = f"{self.path} was measured on something else"
            raise Mismatch(what, ours, header["fingerprint"], "use another run folder")

    def _learn(self, record: dict[str, Any]) -> None:
        assignment = np.array(record["bits"], dtype=np.float32)
        losses = np.array(record[self._loss], dtype=np.float64)
        block_forwards = record["block_forwards"]
        if not ((assignment >= REMOVED) & (assignment <= UNTOUCHED)).all():
            raise ValueError("not widths")
        if assignment.ndim != 1 or losses.ndim != 1 or not losses.size or not isinstance(block_forwards, int):
            raise ValueError("not a record of losses")
        if any(losses.size != known.size for known in self._losses.values()):
            raise ValueError("another number of sequences than before")
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError("a loss is not finite")
        self._losses[_key(assignment)] = losses
        self.block_forwards += block_forwards


def _loss_name(fingerprint: Mapping[str, Any]) -> str:
    """The name of the loss that was measured: the key of its values in the records."""
    return str(fingerprint.get("loss", "nll"))


def _key(assignment: Assignment) -> bytes:
    return np.ascontiguousarray(assignment, dtype=np.float32).tobytes()
