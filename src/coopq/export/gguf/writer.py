"""Writes GGUF files: the settings of a base as they are, and tensors one at a time."""

import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from coopq.export.gguf.base import BaseFile

_TYPE_KEY, _VERSION_KEY = "general.file_type", "general.quantization_version"
"""Settings that are written anew; the base's values are not copied."""


class PlannedType(NamedTuple):
    """Type and bytes of a tensor that will be written."""

    kind: Any
    n_bytes: int


def padded(n_bytes: int, alignment: int) -> int:
    """Bytes up to the next place that a tensor can start at."""
    return -(-n_bytes // alignment) * alignment


def head_bytes(base: BaseFile) -> int:
    """Bytes before the first tensor, with padding."""
    return padded(len(_head(base, dict.fromkeys(base.tensors, (0, 0)))), base.alignment)


def bytes_beside(base: BaseFile, players: Collection[str]) -> int:
    """Bytes of the head of the file and of all tensors but the players', whose names are given."""
    copied = (tensor for tensor in base.tensors.values() if tensor.name not in players)
    return head_bytes(base) + sum(padded(tensor.n_bytes, base.alignment) for tensor in copied)


def write_file(
    path: Path, base: BaseFile, types: Mapping[str, PlannedType], data: Iterable[npt.NDArray[np.uint8]]
) -> None:
    """Write a GGUF file with a base's settings.

    Args:
        path: The file.
        base: The base.
        types: Type and bytes of every tensor of the base, in its order.
        data: Bytes of every tensor, in the same order.
    """
    places: dict[str, tuple[int, int]] = {}
    place = 0
    for name, (kind, n_bytes) in types.items():
        places[name] = (int(kind), place)
        place += padded(n_bytes, base.alignment)
    with path.open("wb") as file:
        head = _head(base, places)
        file.write(head + bytes(-len(head) % base.alignment))
        for (name, (_, n_bytes)), values in zip(types.items(), data, strict=True):
            content = np.ascontiguousarray(values)
            assert content.nbytes == n_bytes, (name, content.nbytes, n_bytes)
            file.write(content.data)
            file.write(bytes(-n_bytes % base.alignment))


def _head(base: BaseFile, places: Mapping[str, tuple[int, int]]) -> bytes:
    """Everything before the tensors. Source: gguf.md of ggml, version 3."""
    import gguf

    settings = [setting.raw for name, setting in base.settings.items() if name not in (_TYPE_KEY, _VERSION_KEY)]
    for key, number in ((_TYPE_KEY, gguf.LlamaFileType.GUESSED), (_VERSION_KEY, gguf.GGML_QUANT_VERSION)):
        settings.append(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, int(number)))
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(base.tensors), len(settings)), *settings]
    for name, tensor in base.tensors.items():
        text, (kind, place) = name.encode(), places[name]
        parts.append(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(tensor.shape)))
        parts.append(struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, kind, place))
    return b"".join(parts)
