"""Tensors in safetensors files, with errors that say what to do."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coopq.errors import OutputError


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors that are contiguous, marked as PyTorch's, which other loaders insist on.

    Raises:
        OutputError: If the file cannot be written whole.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(
            f"cannot write {path} ({error}); make room and run the same command again: nothing computed is lost"
        ) from error
    path.chmod(0o644)  # safetensors leaves it to its owner alone


def load_tensors(path: Path, device: str = "cpu", *, way_out: str) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        path: The file.
        device: Where the tensors go.
        way_out: What a user should do about a damaged file.
    Raises:
        OutputError: If the file is damaged.
    """
    try:
        with _interrupts_wait():
            return load_file(path, device=device)
    except (SafetensorError, FileNotFoundError) as error:
        raise OutputError(f"{path} is damaged or missing ({error}); {way_out}") from error


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until a file is read: safetensors turns it into errors that say nothing of it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # it comes to the main thread alone, if at all
        return
    waiting: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
