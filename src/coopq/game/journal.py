"""The append-only record of every loss that a run measures.

The file has one JSON object a line: a header with a fingerprint, then a record for each assignment. A record is written
before the next evaluation starts, so a process that is killed loses at most the record that it was writing. Each line
has a checksum of itself and the lines before it.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from coopq.core.errors import JournalError, Mismatch
from coopq.core.files import as_plain, checksum
from coopq.core.types import REMOVED, UNTOUCHED, Assignment, Assignments, Losses, as_widths

_FORMAT_VERSION = 3
_DELETE = "or delete this line and all lines after it: their losses are measured again"
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
        self._check = ""
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
    def peek(path: Path) -> tuple[tuple[Assignments, Losses], npt.NDArray[np.int64]]:
        """All assignments of a journal, their mean losses, and the block forwards of each record.

        Nothing is written: another process may be writing the file. A last line that is not whole is skipped.

        Raises:
            JournalError: As for a journal that is opened.
        """
        bits, losses, block_forwards, loss = [], [], [], ""
        for line in _intact_lines(path) if path.exists() else ():
            if line.number == 1:
                loss = _loss_name(line.record["fingerprint"])
            else:
                bits.append(np.array(line.record["bits"], dtype=np.float32))
                losses.append(float(np.mean(line.record[loss])))
                block_forwards.append(line.record["block_forwards"])
        return (np.array(bits), np.array(losses)), np.array(block_forwards, dtype=np.int64)

    @staticmethod
    def header(path: Path) -> dict[str, Any] | None:
        """The fingerprint of a journal, as JSON gives it back; None without a journal.

        Raises:
            JournalError: As for a journal that is opened.
        """
        line = next(_intact_lines(path), None) if path.exists() else None
        return None if line is None else line.record["fingerprint"]

    def __len__(self) -> int:
        return len(self._losses)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        plain = as_plain(record)
        self._check = checksum(plain, self._check)
        self._file.write(json.dumps({**plain, "check": self._check}, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, fingerprint: Mapping[str, Any]) -> int:
        """Read the file; returns the number of bytes up to the end of the last intact line."""
        intact = 0
        for line in _intact_lines(self.path):
            if line.number == 1:
                self._compare(line.record["fingerprint"], fingerprint)
            else:
                self._learn(line.record)
            self._check = line.check
            intact += line.n_bytes
        return intact

    def _compare(self, theirs: dict[str, Any], fingerprint: Mapping[str, Any]) -> None:
        ours = as_plain(dict(fingerprint))
        if theirs != ours:
            raise Mismatch(f"{self.path} was measured on something else", ours, theirs, "use another run folder")

    def _learn(self, record: dict[str, Any]) -> None:
        self._losses[_key(np.array(record["bits"], dtype=np.float32))] = np.array(record[self._loss], dtype=np.float64)
        self.block_forwards += record["block_forwards"]


class _Line(NamedTuple):
    """An intact line of a journal.

    Attributes:
        number: Its number, from 1 on.
        record: What it says, without the checksum.
        check: Its checksum.
        n_bytes: Its length.
    """

    number: int
    record: dict[str, Any]
    check: str
    n_bytes: int


def _intact_lines(path: Path) -> Iterator[_Line]:
    """The lines of a journal, each checked; a last line that is broken ends them.

    The checksum of a line depends on all lines before it, so a line that is changed, moved or missing is noticed.

    Raises:
        JournalError: If a line before the last is broken, or the file has another format version.
    """
    check, loss, shape = "", "", None
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            record = msgspec.json.decode(line, type=dict[str, Any])
            found = record.pop("check", None)
            if number == 1:
                loss = _check_header(path, record)
            else:
                shape = _check_record(record, loss, shape)
            check = checksum(record, check)
            if found != check:
                raise ValueError("its checksum does not fit: the line, or one before it, was changed or removed")
        except (ValueError, RecursionError) as error:
            if number < len(lines) or (number == 1 and line.endswith(b"\n")):
                raise JournalError(
                    f"{path}, line {number} is broken ({error}); restore the file from a copy, "
                    + ("or use another run folder" if number == 1 else _DELETE)
                ) from error
            _log.warning("%s: the last line is not whole (%s) and is skipped", path, error)
            return
        yield _Line(number, record, check, len(line))


def _check_header(path: Path, header: dict[str, Any]) -> str:
    """Check the first line of a journal; returns the name of the loss."""
    version = header.get("format_version")
    if isinstance(version, int) and version != _FORMAT_VERSION:
        raise JournalError(
            f"{path} has format {version}, and this version of coopq reads {_FORMAT_VERSION}; use another run folder"
        )
    fingerprint = header.get("fingerprint")
    if version is None or not isinstance(fingerprint, dict):
        raise ValueError("not the header of a journal")
    return _loss_name(fingerprint)


def _check_record(record: dict[str, Any], loss: str, shape: tuple[int, int] | None) -> tuple[int, int]:
    """Check a record of losses.

    Args:
        record: What the line says.
        loss: Name of the loss.
        shape: Number of players and of sequences in the records before; None for the first record.
    Returns:
        The number of players and of sequences.
    Raises:
        ValueError: If the record is not complete, or has another number of players or sequences than before.
    """
    bits = msgspec.convert(record.get("bits"), list[Annotated[float, Meta(ge=REMOVED, le=UNTOUCHED)]])
    losses = msgspec.convert(record.get(loss), list[float])
    msgspec.convert(record.get("block_forwards"), Annotated[int, Meta(ge=0)])
    found = len(bits), len(losses)
    if not losses or not np.isfinite(losses).all():
        raise ValueError("not finite losses")
    if shape is not None and found != shape:
        raise ValueError(f"{found[0]} players and {found[1]} sequences, {shape[0]} and {shape[1]} before")
    return found


def _loss_name(fingerprint: Mapping[str, Any]) -> str:
    """The name of the loss that was measured: the key of its values in the records."""
    return str(fingerprint.get("loss", "nll"))


def _key(assignment: Assignment) -> bytes:
    return np.ascontiguousarray(assignment, dtype=np.float32).tobytes()
