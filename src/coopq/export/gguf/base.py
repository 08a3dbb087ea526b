"""GGUF files that users give: a file may be damaged, odd or split, and every fault is an error of one line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import ExportError
from coopq.model.sources.gguf import gguf_shards
from coopq.model.sources.gguf_header import Setting, TensorPlace, read_header

_WAY_OUT = "name a GGUF file of the model in full precision with --base"


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
            ExportError: If there is no such file, or its tensors cannot be read.
            ModelError: If its header cannot be read, or a part of a split is missing.
        """
        if not path.is_file():
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise ExportError(
                f"base {path} {kind}; {_WAY_OUT}, or run the command in the folder where the model was quantized"
            )
        parts = []
        for shard in gguf_shards(path):
            header = read_header(shard, _WAY_OUT)
            data = np.memmap(shard, np.uint8, mode="r")
            try:
                parts.append((header, {name: _tensor(data, place) for name, place in header.tensors.items()}))
            except (ValueError, KeyError) as error:
                raise ExportError(f"cannot read GGUF file {shard} ({error}); {_WAY_OUT}") from error
        settings, alignment = parts[0][0].settings, parts[0][0].alignment
        tensors: dict[str, BaseTensor] = {}
        for _, found in parts:
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


def _tensor(data: npt.NDArray[np.uint8], place: TensorPlace) -> BaseTensor:
    """A tensor of a file with these bytes.

    Raises:
        ValueError: If the shape is impossible, or the file ends before the tensor.
    """
    import gguf

    kind = gguf.GGMLQuantizationType(place.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if not place.shape or min(place.shape) < 1 or place.shape[0] % block:
        raise ValueError(f"tensor {place.name} has shape {place.shape}")
    row_bytes, n_rows = place.shape[0] // block * size, math.prod(place.shape[1:])
    if place.start + n_rows * row_bytes > len(data):
        raise ValueError(f"it ends before tensor {place.name} ends")
    rows = data[place.start : place.start + n_rows * row_bytes]
    return BaseTensor(place.name, place.shape, kind, rows.reshape(*reversed(place.shape[1:]), row_bytes))
