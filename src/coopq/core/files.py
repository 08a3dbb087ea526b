"""Folders and files: atomic writes, locks, and checks made before expensive work starts."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from filelock import FileLock, Timeout

from coopq.core.errors import CoopQError, OutputError, RunError

Kind = TypeVar("Kind")
_BROKEN = (ValueError, RecursionError)
"""What decoding raises for bytes that are no JSON: malformed text, NaN, numbers out of range, or too deep nesting."""


def write_json(path: Path, data: Any) -> None:
    """Write `data` to `path` so that a reader sees the old file or the new one, never half of it."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with temporary.open("r+b") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends without an error.

    What an interrupted run left behind is removed first.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()  # empty: `require_new_folder` saw to that
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        RunError: If the file is not JSON.
    """
    try:
        return msgspec.json.decode(path.read_bytes())
    except _BROKEN as error:
        raise RunError(f"{path} is not readable as JSON ({error}); delete it and run the same command again") from error


def checksum(record: Any, before: str = "") -> str:
    """A hash of plain data, for telling whether a file still holds what was written.

    Args:
        record: Plain data, as a JSON file gives it back.
        before: The checksum of the record before this one, if the order of records counts.
    """
    content = before.encode() + msgspec.json.encode(record, order="deterministic")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def read_record(
    path: Path, kind: type[Kind], version: int, *, what: str, missing: str, way_out: str, error: type[CoopQError]
) -> Kind:
    """A record from a JSON file, checked against its type and its checksum.

    Args:
        path: The file.
        kind: Type of the record: a dataclass or a msgspec Struct.
        version: The format version that the file has to have.
        what: What the file is, for messages: "plan".
        missing: The message if there is no file.
        way_out: What a user should do about a damaged file.
        error: The class of the errors.
    Raises:
        CoopQError: Of the class `error`, if the file is missing, broken, of another format, incomplete or changed.
    """
    try:
        data = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as reason:
        raise error(missing) from reason
    except (OSError, *_BROKEN) as reason:
        raise error(f"{path} is not a {what} ({reason}); {way_out}") from reason
    if not isinstance(data, dict) or "format_version" not in data:
        raise error(f"{path} is not a {what} (it has no format version); {way_out}")
    found, written = data.pop("format_version"), data.pop("checksum", None)
    if found != version:
        theirs = _shortened(found)
        raise error(f"{path} has {what} format {theirs}, and this version of coopq reads {version}; {way_out}")
    try:
        record = msgspec.convert(data, kind)
    except (msgspec.ValidationError, CoopQError, *_BROKEN) as reason:
        raise error(f"{path} is not a complete {what} ({reason}); {way_out}") from reason
    if written != checksum(data):
        raise error(f"{path} was changed after it was written: its checksum does not fit the {what}; {way_out}")
    return record


def _shortened(value: Any) -> str:
    """A value for a message of one line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def write_record(path: Path, record: Any, version: int) -> None:
    """Write a dataclass or a msgspec Struct as JSON, with its format version and a checksum; see `write_json`."""
    data = as_plain(msgspec.to_builtins(record))
    write_json(path, {"format_version": version, "checksum": checksum(data), **data})


def as_plain(data: Any) -> Any:
    """Data as a JSON file gives it back: tuples are lists, and keys are texts."""
    return json.loads(json.dumps(data))


def expanded(path: str | Path) -> Path:
    """The path with the user's home for a leading `~`; the name of an unknown user stays as it is.

    Raises:
        OutputError: If the path is not UTF-8: no record could hold it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{str(path)!r} is not UTF-8; rename it") from error
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises for an unknown user


def cache_folder() -> Path:
    """The user's cache folder: converted models, and weights of Ray workers. It is made if it is missing.

    Raises:
        OutputError: If the folder cannot be written.
    """
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "coopq"
    require_writable(folder, "set XDG_CACHE_HOME to another folder")
    return folder


def require_new_folder(path: Path) -> None:
    """Check that `path` can be made as a new folder, and make its parent.

    Raises:
        OutputError: If it holds something, is a file, or its parent cannot be written.
    """
    if path.is_file():
        raise OutputError(f"output {path} is a file; name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"output folder {path} is not empty; name another, or empty it first")
    require_writable(path.parent)


def require_no_input(out: Path, inputs: Iterable[Path]) -> None:
    """Check that writing `out` touches no input, and puts nothing into one.

    Links are followed, so another name of the same place does not hide an input.

    Args:
        out: The file or the folder to write.
        inputs: Files and folders that are read; those that do not exist are ignored.
    Raises:
        OutputError: If `out` is an input, lies in an input, or contains one.
    """
    target = expanded(out).resolve()
    for given in inputs:
        path = expanded(given).resolve()
        if not path.exists():
            continue
        if target == path or (target.exists() and target.samefile(path)):
            where = f"is the same as the input {given}"
        elif target.is_relative_to(path):
            where = f"lies in the input {given}"
        elif path.is_relative_to(target):
            where = f"contains the input {given}"
        else:
            continue
        raise OutputError(f"output {out} {where}, which would be changed; name another place")


def require_writable(folder: Path, way_out: str = "choose another folder") -> None:
    """Make `folder` and check that files can be written into it.

    Args:
        folder: The folder.
        way_out: How a user chooses another folder.
    Raises:
        OutputError: If not, with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; {way_out}") from error


def require_space(folder: Path, n_bytes: int, what: str, way_out: str = "choose another folder") -> None:
    """Check that the disk of `folder` has room.

    Args:
        folder: The folder.
        n_bytes: Bytes that will be written.
        what: What will be written, for the message.
        way_out: How a user chooses another folder.
    Raises:
        OutputError: With the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OutputError(
            f"{what} needs {n_bytes / 2**20:,.0f} MiB in {folder}, and {free / 2**20:,.0f} MiB are free; "
            f"free some space or {way_out}, then run again: nothing computed is lost"
        )


@contextmanager
def locked(folder: Path, what: str = "run folder") -> Iterator[None]:
    """Hold `folder` for this process; the system frees it when the process ends, however it ends.

    Args:
        folder: The folder.
        what: What the folder is, for the message.
    Raises:
        RunError: If another process holds it.
    """
    try:
        with FileLock(folder / "run.lock", timeout=0):
            yield
    except Timeout as error:
        raise RunError(f"{what} {folder} is in use by another process; wait for it, or use another folder") from error
