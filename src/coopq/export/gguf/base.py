"""Reads GGUF files that users give: a file may be damaged, odd or split, and every fault is an error of one line.

Every length is checked against the file before it is used. The reader of the package gguf does not check lengths.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import ExportError
from coopq.model.sources.gguf import gguf_shards

_WAY_OUT = "name a GGUF file of the model in full precision with --base"
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Types of numbers in settings by their code. Source: `gguf_type` in ggml/include/gguf.h."""
_TEXT, _ARRAY = 8, 9
_DEEPEST = 8
"""Arrays in arrays that are read; a damaged file can claim any depth."""


@dataclass(frozen=True)
class Setting:
    """A setting of a GGUF file.

    Attributes:
        raw: The setting as it lies in the file, with its name.
        value: A number or a text, the numbers of an array, or None for arrays of texts and of arrays.
        length: Number of entries of an array; 0 for others.
    """

    raw: bytes
    value: Any
    length: int = 0


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name.
        shape: Its shape as ggml has it: the length of a row first.
        tensor_type: A `gguf.GGMLQuantizationType`.
        data: Its bytes, shape (..., rows, bytes of a row).
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data: npt.NDArray[np.uint8]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return int(self.data.nbytes)

    @property
    def n_rows(self) -> int:
        """Number of rows of all its matrices."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers of the tensor, shape (rows, columns).

        Raises:
            ExportError: If the type cannot be read, or a number is not finite.
        """
        found = self._dequantized()
        if not np.isfinite(found).all():
            raise ExportError(f"{self.name} of the GGUF file holds numbers that are not finite; {_WAY_OUT}")
        return found.reshape(self.n_rows, self.shape[0])

    def is_finite(self) -> bool:
        """Whether all numbers of the tensor are finite."""
        return bool(np.isfinite(self._dequantized()).all())

    def _dequantized(self) -> npt.NDArray[np.float32]:
        import gguf

        try:
            return np.asarray(gguf.quants.dequantize(self.data, self.tensor_type), np.float32)
        except NotImplementedError as error:
            raise ExportError(f"{self.name} of the GGUF file has type {self.tensor_type.name}; {_WAY_OUT}") from error


@dataclass(frozen=True)
class BaseFile:
    """A GGUF file, all parts of a split one together.

    Attributes:
        path: The file, the first of a split.
        settings: All settings by name, without those of a split.
        tensors: All tensors by name, in the order of the file.
        alignment: What the places of tensors are multiples of, in bytes.
    """

    path: Path
    settings: Mapping[str, Setting]
    tensors: Mapping[str, BaseTensor]
    alignment: int

    @classmethod
    def open(cls, path: Path) -> "BaseFile":
        """Read the settings of a file and the places of its tensors.

        Raises:
            ExportError: If there is no such file, or the file cannot be read.
            ModelError: If a part of a split is missing.
        """
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise ExportError(f"base {path} {kind}; {_WAY_OUT}")
        parts = []
        for shard in gguf_shards(path):
            try:
                parts.append(_Parser(shard).parse())
            except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ExportError(f"cannot read GGUF file {shard} ({reason}); {_WAY_OUT}") from error
        settings, _, alignment = parts[0]
        tensors: dict[str, BaseTensor] = {}
        for _, found, _ in parts:
            tensors |= found
        first = gguf_shards(path)[0]
        count = settings.get("split.tensors.count")
        if count is not None and count.value != len(tensors):
            raise ExportError(
                f"GGUF file {first} is a part of a model of {count.value} tensors, and {len(tensors)} are found; give "
                "all parts the names that llama-gguf-split gives them"
            )
        kept = {name: setting for name, setting in settings.items() if not name.startswith("split.")}
        return cls(first, kept, tensors, alignment)

    @cached_property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp.

        Raises:
            ExportError: If it is missing, or the package gguf does not have it.
        """
        import gguf

        name = self.value("general.architecture")
        if name not in gguf.MODEL_ARCH_NAMES.values():
            raise ExportError(f"GGUF file {self.path} has architecture {name!r}, which is unknown; {_WAY_OUT}")
        return str(name)

    @cached_property
    def n_blocks(self) -> int:
        """Number of blocks.

        Raises:
            ExportError: If the number is missing.
        """
        count = self.value(f"{self.architecture}.block_count")
        if not isinstance(count, int) or not 0 < count < 100_000:
            raise ExportError(f"GGUF file {self.path} has {self.architecture}.block_count = {count!r}; {_WAY_OUT}")
        return count

    def value(self, name: str) -> Any:
        """The value of a setting; None if it is missing."""
        return self.settings[name].value if name in self.settings else None

    @property
    def is_quantized(self) -> bool:
        """Whether a matrix of the file has fewer than 16 bits."""
        return any(tensor.tensor_type.name not in ("F64", "F32", "F16", "BF16") and len(tensor.shape) > 1
                   for tensor in self.tensors.values())  # fmt: skip


class _Parser:
    """One GGUF file, read from its start."""

    def __init__(self, path: Path) -> None:
        if path.stat().st_size < 24:
            raise ValueError("it is too short")
        self._data = np.memmap(path, np.uint8, mode="r")
        self._place = 0

    def parse(self) -> tuple[dict[str, Setting], dict[str, BaseTensor], int]:
        """Settings, tensors and alignment of the file."""
        if self._take(4) != b"GGUF":
            raise ValueError("it is no GGUF file")
        if (version := self._number("<u4")) not in (2, 3):
            raise ValueError(f"version {version} is unknown, or its byte order is another")
        n_tensors, n_settings = self._number("<u8"), self._number("<u8")
        settings: dict[str, Setting] = {}
        for _ in range(n_settings):
            start = self._place
            name = self._text()
            value, length = self._value(self._number("<u4"), 0)
            settings[name] = Setting(bytes(self._data[start : self._place]), value, length)
        abouts = []
        for _ in range(n_tensors):
            name = self._text()
            shape = tuple(self._number("<u8") for _ in range(self._number_below(5, "dimensions")))
            abouts.append((name, shape, self._number("<u4"), self._number("<u8")))
        aligned = settings.get("general.alignment")
        alignment = 32 if aligned is None else aligned.value
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment = {alignment!r}")
        self._data_start = -(-self._place // alignment) * alignment
        tensors = {name: self._tensor(name, *rest) for name, *rest in abouts}
        if len(tensors) != len(abouts):
            raise ValueError("two tensors have one name")
        return settings, tensors, alignment

    def _tensor(self, name: str, shape: tuple[int, ...], code: int, offset: int) -> BaseTensor:
        import gguf

        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or min(shape) < 1 or shape[0] % block:
            raise ValueError(f"tensor {name} has shape {shape}")
        row_bytes, n_rows = shape[0] // block * size, 1
        for length in shape[1:]:
            n_rows *= length
        start, end = self._data_start + offset, self._data_start + offset + n_rows * row_bytes
        if end > len(self._data):
            raise ValueError(f"it ends before tensor {name} ends")
        return BaseTensor(name, shape, kind, self._data[start:end].reshape(*reversed(shape[1:]), row_bytes))

    def _take(self, count: int) -> bytes:
        if self._place + count > len(self._data):
            raise ValueError("it is truncated")
        self._place += count
        return bytes(self._data[self._place - count : self._place])

    def _number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _number_below(self, limit: int, what: str) -> int:
        if (number := int(self._number("<u4"))) >= limit:
            raise ValueError(f"{number} {what}")
        return number

    def _text(self) -> str:
        return self._take(self._number("<u8")).decode()

    def _value(self, kind: int, depth: int) -> tuple[Any, int]:
        """A value, and its length if it is an array."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind]), 0
        if kind == _TEXT:
            return self._take(self._number("<u8")).decode(errors="replace"), 0
        if kind != _ARRAY or depth > _DEEPEST:
            raise ValueError(f"a setting has type {kind}")
        inner, length = self._number("<u4"), self._number("<u8")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            return tuple(np.frombuffer(self._take(dtype.itemsize * length), dtype).tolist()), length
        for _ in range(length):  # every entry takes bytes, so that a damaged length ends at the end of the file
            self._value(inner, depth + 1)
        return None, length
