"""Reading and writing tensors as safetensors files, with errors that say what to do."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coopq.core.errors import OutputError

_ORDER = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of dtypes in safetensors files. The file has the tensors of the last dtype first."""
_METADATA = {"format": "pt"}
"""PyTorch's mark. Other loaders insist on it."""


def saved_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `save_tensors` would write. The tensors may have no storage."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    dtypes, end = list(_ORDER), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-dtypes.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _ORDER[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=_METADATA)
    except SafetensorError as error:
        raise OutputError(
            f"cannot write {path} ({error}); free disk space and run the same command again: nothing computed is lost"
        ) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def load_tensors(path: Path, device: str = "cpu", *, way_out: str) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        path: The file.
        device: The device that the tensors go to.
        way_out: What a user should do about a damaged or missing file.
    Raises:
        OutputError: If the file is damaged or missing.
    """
    try:
        with _interrupts_wait():
            return load_file(path, device=device)
    except (SafetensorError, FileNotFoundError) as error:
        raise OutputError(f"{path} is damaged or missing ({error}); {way_out}") from error


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until a file is read: safetensors turns the interrupt into an unrelated error."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # only the main thread gets interrupts
        return
    waiting: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
