"""The append-only record of every loss that was ever measured in a run.

One JSON object a line: a header with a fingerprint, then one record for each assignment. A record is
written whole, before the next evaluation starts, so a process killed at any moment loses at most the value
that it was writing.
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
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, Assignments, Losses, as_widths

_FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


class Journal:
    """Losses by assignment, kept in a file and replayed from it.

    Args:
        path: The file; it is made when missing.
        fingerprint: What the losses depend on: model, players, backend, tokens, loss, dtype.

    Raises:
        JournalError: If a line other than the last is broken.
        Mismatch: If the file belongs to something else.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.layer_forwards = 0
        self._losses: dict[bytes, npt.NDArray[np.float64]] = {}
        self._loss = _loss_of(fingerprint)
        intact = self._replay(fingerprint) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(intact)
        if intact == 0:
            self._write({"format_version": _FORMAT_VERSION, "fingerprint": dict(fingerprint)})

    def get(self, assignment: Assignment) -> npt.NDArray[np.float64] | None:
        """Loss of each calibration sequence, shape (n_sequences,), nats per token; None if not measured."""
        return self._losses.get(_key(assignment))

    def first(self, n: int) -> tuple[Assignments, Losses]:
        """The first n assignments ever recorded and their mean losses, shape (n, n_players) and (n,)."""
        records = list(self._losses.items())[:n]
        assignments = [np.frombuffer(key, dtype=np.float32) for key, _ in records]
        return np.array(assignments, dtype=np.float32), np.array([losses.mean() for _, losses in records])

    def append(self, assignment: Assignment, losses: npt.NDArray[np.float64], layer_forwards: int) -> None:
        """Record the losses of one assignment and the layer forwards that they cost."""
        self._write({"bits": as_widths(assignment), self._loss: losses.tolist(), "layer_forwards": layer_forwards})
        self._losses[_key(assignment)] = losses
        self.layer_forwards += layer_forwards

    @staticmethod
    def peek(path: Path) -> tuple[tuple[Assignments, Losses], int]:
        """All assignments of a journal, their mean losses and the layer forwards that they cost; nothing is written.

        Safe while another process writes it.
        """
        bits, losses, layer_forwards, loss = [], [], 0, ""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if not line.endswith(b"\n"):
                continue
            try:
                record = json.loads(line)
                if not loss:  # the first line says which
                    loss = _loss_of(record["fingerprint"])
                    continue
                value, spent = float(np.mean(record[loss])), int(record["layer_forwards"])
                bits.append(np.array(record["bits"], dtype=np.float32))
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # replaying is what judges broken lines
            losses.append(value)
            layer_forwards += spent
        return (np.array(bits), np.array(losses)), layer_forwards

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

    def _replay(self, fingerprint: Mapping[str, Any]) -> int:
        """Read the file; the number of bytes up to the end of its last intact line."""
        intact = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("the line does not end")
                record = json.loads(line)
                if number == 1:
                    self._check_header(record, fingerprint)
                else:
                    self._learn(record)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                if number < len(lines) or (number == 1 and line.endswith(b"\n")):
                    raise JournalError(
                        f"{self.path}, line {number} is broken ({error}); restore the file from a copy, "
                        + (
                            "or use another run folder"
                            if number == 1
                            else "or delete the broken line: only its value is then measured again"
                        )
                    ) from error
                _log.warning("%s: dropped a last line that was not written whole", self.path)
                break
            intact += len(line)
        return intact

    def _check_header(self, header: dict[str, Any], fingerprint: Mapping[str, Any]) -> None:
        if header["format_version"] != _FORMAT_VERSION:
            raise JournalError(
                f"{self.path} has format {header['format_version']}, and this version of coopq reads "
                f"{_FORMAT_VERSION}; use another run folder"
            )
        ours = json.loads(json.dumps(dict(fingerprint)))
        if header["fingerprint"] != ours:
            raise Mismatch(
                f"{self.path} was measured on something else",
                ours,
                header["fingerprint"],
                "use another run folder",
            )

    def _learn(self, record: dict[str, Any]) -> None:
        assignment = np.array(record["bits"], dtype=np.float32)
        losses = np.array(record[self._loss], dtype=np.float64)
        layer_forwards = record["layer_forwards"]
        if not ((assignment >= REMOVED) & (assignment <= UNTOUCHED)).all():
            raise ValueError("not widths")
        if assignment.ndim != 1 or losses.ndim != 1 or not losses.size or not isinstance(layer_forwards, int):
            raise ValueError("not a record of losses")
        if any(losses.size != known.size for known in self._losses.values()):
            raise ValueError("another number of sequences than before")
        if not all(math.isfinite(loss) for loss in losses):
            raise ValueError("a loss is not finite")
        self._losses[_key(assignment)] = losses
        self.layer_forwards += layer_forwards


def _loss_of(fingerprint: Mapping[str, Any]) -> str:
    """The name of what was measured, under which records hold it."""
    return str(fingerprint.get("loss", "nll"))


def _key(assignment: Assignment) -> bytes:
    return np.ascontiguousarray(assignment, dtype=np.float32).tobytes()
