"""Reading and writing tensors as safetensors files, with errors that say what to do."""

import json
import os
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from coopq.core.errors import ModelError, OutputError, differing

_ORDER = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of dtypes in safetensors files. The file has the tensors of the last dtype first."""
_METADATA = {"format": "pt"}
"""PyTorch's mark. Other loaders insist on it."""
_CHECKSUM = "crc32"


def saved_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `save_tensors` would write. The tensors may have no storage."""
    header, n_bytes = _header(tensors)
    return len(header) + n_bytes


def save_zeros(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of tensors of these shapes and dtypes that holds zeros, and takes next to no room on disk."""
    header, n_bytes = _header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_bytes)


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """What a file of tensors begins with, and the bytes of the tensors' values."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    dtypes, end = list(_ORDER), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-dtypes.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _ORDER[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length), end


def require_finite(tensors: Iterable[tuple[str, Tensor]], what: str, way_out: str) -> None:
    """Check that tensors hold numbers only.

    Args:
        tensors: Names and tensors.
        what: What holds the tensors, for the message.
        way_out: What a user should do.
    Raises:
        ModelError: With the name of the first tensor that has a NaN or an infinite value.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            n_wrong, dtype = int((~torch.isfinite(tensor)).sum()), str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{what}: tensor {name} ({dtype}) has {n_wrong} values that are not finite; {way_out}")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write contiguous tensors.

    Args:
        tensors: The tensors by name.
        path: The file.
        about: What the tensors are. The file then says so, with a checksum, and `load_tensors` compares both.
    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        metadata = _METADATA if about is None else {**_METADATA, **about, _CHECKSUM: _checksum(tensors)}
        save_file(dict(tensors), path, metadata=metadata)
        _sort_metadata(path)
    except SafetensorError as error:
        raise OutputError(
            f"cannot write {path} ({error}); free disk space and run the same command again: nothing computed is lost"
        ) from error
    umask = os.umask(0o077)  # there is no other way to ask, and files of other threads are only too strict meanwhile
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read


def _sort_metadata(path: Path) -> None:
    """Order what a file says about itself: safetensors writes the entries in any order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, (len(text), length)
        file.seek(8)
        file.write(text)


def load_tensors(
    path: Path, device: str = "cpu", *, way_out: str, about: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Args:
        path: The file.
        device: The device that the tensors go to.
        way_out: What a user should do about a damaged or missing file.
        about: What the tensors have to be, as `save_tensors` was told; None checks nothing.
    Raises:
        OutputError: If the file is damaged or missing, or holds something else.
    """
    try:
        with _interrupts_wait():
            tensors = load_file(path, device=device)
            if about is not None:
                _check_content(path, tensors, about, way_out)
            return tensors
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path} is damaged or missing ({error}); {way_out}") from error


def _check_content(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str], way_out: str) -> None:
    """Check that a file holds what its name promises, unchanged since it was written."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    expected = {**about, _CHECKSUM: _checksum(tensors)}
    if different := differing(expected, {name: found.get(name) for name in expected}):
        name = different[0]
        raise OutputError(
            f"{path} is not what was written there ({name}: {found.get(name)!r} in the file, {expected[name]!r} "
            f"expected); {way_out}"
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, dtypes, shapes and values."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            total = zlib.crc32(cast(Any, data), total)
    return f"{total:08x}"


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
