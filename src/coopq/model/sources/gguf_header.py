"""What stands before the tensors of a GGUF file: settings, and the place of each tensor.

Every length is checked against the file before it is used. The reader of the package gguf does not check lengths, and
takes seconds for a vocabulary.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coopq.core.errors import ModelError

_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""Types of numbers in settings by their code. Source: `gguf_type` in ggml/include/gguf.h."""
_MAGIC = b"GGUF"
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
class TensorPlace:
    """Where a tensor lies in a GGUF file.

    Attributes:
        name: Its name.
        shape: Its shape as ggml has it: the length of a row first.
        kind: Code of its type, a `gguf.GGMLQuantizationType`.
        start: Its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """What stands before the tensors.

    Attributes:
        settings: All settings by name.
        tensors: The place of each tensor by name, in the order of the file.
        alignment: What the places of tensors are multiples of, in bytes.
    """

    settings: Mapping[str, Setting]
    tensors: Mapping[str, TensorPlace]
    alignment: int


def read_header(path: Path, way_out: str = "download or convert it again") -> Header:
    """The header of one file.

    Args:
        path: The file.
        way_out: What a user can do about a file that cannot be read.
    Raises:
        ModelError: If the file cannot be read: it is no GGUF file, is damaged, or ends early.
    """
    try:
        if path.stat().st_size < 24:
            raise ValueError("it is too short")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).parse()
    except (OSError, ValueError, OverflowError) as error:
        raise ModelError(f"cannot read GGUF file {path} ({' '.join(str(error).split())}); {way_out}") from error


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class _Parser:
    """One GGUF file, read from its start."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._place, self._length = data, 0, len(data)

    def parse(self) -> Header:
        """The header."""
        if self._take(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no GGUF file")
        if (version := self._number("<I")) not in (2, 3):
            raise ValueError(f"version {version} is unknown, or its byte order is another")
        n_tensors, n_settings = self._number("<Q"), self._number("<Q")
        settings: dict[str, Setting] = {}
        for _ in range(n_settings):
            start = self._place
            name = self._text()
            value, length = self._value(self._number("<I"), 0)
            settings[name] = Setting(self._data[start : self._place], value, length)
        abouts = []
        for _ in range(n_tensors):
            name = self._text()
            shape = tuple(self._number("<Q") for _ in range(self._number_below(5, "dimensions")))
            abouts.append((name, shape, self._number("<I"), self._number("<Q")))
        aligned = settings.get("general.alignment")
        alignment = 32 if aligned is None else aligned.value
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise ValueError(f"general.alignment = {alignment!r}")
        start = -(-self._place // alignment) * alignment
        tensors = {name: TensorPlace(name, shape, kind, start + offset) for name, shape, kind, offset in abouts}
        if len(tensors) != len(abouts):
            raise ValueError("two tensors have one name")
        return Header(settings, tensors, alignment)

    def _skip(self, count: int) -> int:
        """Pass some bytes; where they start."""
        start = self._place
        if start + count > self._length:
            raise ValueError("it is truncated")
        self._place = start + count
        return start

    def _take(self, count: int) -> bytes:
        return self._data[self._skip(count) : self._place]

    def _number(self, kind: str) -> Any:
        return struct.unpack_from(kind, self._data, self._skip(struct.calcsize(kind)))[0]

    def _number_below(self, limit: int, what: str) -> int:
        if (number := int(self._number("<I"))) >= limit:
            raise ValueError(f"{number} {what}")
        return number

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode()

    def _value(self, kind: int, depth: int) -> tuple[Any, int]:
        """A value, and its length if it is an array."""
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind]), 0
        if kind == _TEXT:
            return self._take(self._number("<Q")).decode(errors="replace"), 0
        if kind != _ARRAY or depth > _DEEPEST:
            raise ValueError(f"a setting has type {kind}")
        inner, length = self._number("<I"), self._number("<Q")
        if inner in _NUMBERS:
            form = _NUMBERS[inner]
            return tuple(np.frombuffer(self._take(struct.calcsize(form) * length), np.dtype(form)).tolist()), length
        for _ in range(length):  # every entry takes bytes, so that a damaged length ends at the end of the file
            if inner == _TEXT:
                self._skip(self._number("<Q"))
            else:
                self._value(inner, depth + 1)
        return None, length
