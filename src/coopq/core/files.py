"""Folders and files: atomic writes, locks, and checks made before expensive work starts."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from coopq.core.errors import OutputError, RunError


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
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not readable as JSON ({error}); delete it and run the same command again") from error


def require_new_folder(path: Path) -> None:
    """Check that `path` can be made as a new folder.

    Raises:
        OutputError: If it holds something, is a file, or its parent cannot be written.
    """
    if path.is_file():
        raise OutputError(f"output {path} is a file; name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"output folder {path} is not empty; name another, or empty it first")
    require_writable(path.parent)


def require_writable(folder: Path) -> None:
    """Make `folder` and check that files can be written into it.

    Raises:
        OutputError: If not, with the system's reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def require_space(folder: Path, n_bytes: int, what: str) -> None:
    """Check that the disk of `folder` has room.

    Raises:
        OutputError: With the bytes needed and free.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OutputError(
            f"{what} needs {n_bytes / 2**20:,.0f} MiB in {folder}, and {free / 2**20:,.0f} MiB are free; "
            "free some space or choose another folder, then run again: nothing computed is lost"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the system frees it when the process ends, however it ends.

    Raises:
        RunError: If another process holds it.
    """
    try:
        with FileLock(folder / "run.lock", timeout=0):
            yield
    except Timeout as error:
        raise RunError(
            f"run folder {folder} is in use by another process; wait for it, or use another folder"
        ) from error
