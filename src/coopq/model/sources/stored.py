"""The tensors that a folder stores: their names, dtypes and shapes from the headers, and their values one by one."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coopq.core.errors import ModelError, first_names, one_line

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WIDE = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Stored dtypes of weights that are not quantized."""


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its file, the safetensors name of its dtype, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_packed(self) -> bool:
        """Whether the dtype is one of quantized weights: 8-bit floats and whole numbers, or narrower."""
        return self.dtype.startswith(("F8", "F6", "F4")) or self.dtype in ("I8", "U8")


def stored_entries(folder: Path) -> dict[str, Entry]:
    """The tensors of a model's folder by name, from the headers of the files.

    Raises:
        ModelError: If a file is missing or damaged, or there are none.
    """
    return {
        name: Entry(path, *_dtype_and_shape(about, path, name))
        for path in weight_files(folder)
        for name, about in _header(path).items()
        if name != "__metadata__"
    }


def usual_dtype(entries: Mapping[str, Entry]) -> torch.dtype | None:
    """The dtype of most weights among the dtypes that are not quantized; None if there is none."""
    counts: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype in _WIDE:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + torch.Size(entry.shape).numel()
    return _WIDE[max(counts, key=lambda name: counts[name])] if counts else None


def read_tensor(entry: Entry, name: str) -> Tensor:
    """A stored tensor."""
    with safe_open(entry.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


@dataclass
class ReadLog:
    """What happened while tensors were read, for checks after loading.

    Attributes:
        read: Names of the tensors that were read.
        not_finite: Names of the tensors with values that are not finite.
    """

    read: set[str] = field(default_factory=set)
    not_finite: set[str] = field(default_factory=set)


@dataclass
class LazyTensor:
    """A tensor that is read when it is indexed, as transformers expects the slices of safetensors files.

    Attributes:
        name: The stored name.
        shape: The shape.
        read: Reads the tensor.
        log: Where reading is recorded.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    log: ReadLog

    def __getitem__(self, index: Any) -> Tensor:
        """The values at an index."""
        tensor = self.read()
        self.log.read.add(self.name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            self.log.not_finite.add(self.name)
        return tensor[index]

    def get_shape(self) -> list[int]:
        """The shape, as slices of safetensors files answer."""
        return list(self.shape)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; one sum answers for nearly all tensors."""
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def has_weights(folder: Path) -> bool:
    """Whether a folder has the file of weights, or the index of several files, that models are read from."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def weight_files(folder: Path) -> Iterator[Path]:
    """The files that the weights are in; other safetensors files of a folder are not read.

    Raises:
        ModelError: If there are none, or one is missing.
    """
    if (folder / _SINGLE).is_file():
        yield folder / _SINGLE
        return
    if not (folder / _INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*.bin")) or sorted(
            path.name for path in folder.glob("*.pt*")
        )
        if others:
            raise ModelError(
                f"folder {folder} holds its weights as {others[0]}, a pickle, which can run code when it is read; "
                "convert the weights to safetensors with save_pretrained of transformers"
            )
        raise ModelError(
            f"folder {folder} holds no {_SINGLE} and no {_INDEX}; download the model again, or convert its .bin files "
            "to safetensors with save_pretrained of transformers"
        )
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
        paths = [folder / re.sub(r"^.*[/\\]", "", name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder / _INDEX} is damaged ({one_line(error)}); download the model again") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise ModelError(
            f"folder {folder} lacks {len(missing)} of the {len(paths)} files of weights that {_INDEX} names "
            f"({first_names(missing) or 'it names none'}); download the model again"
        )
    yield from paths


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file.

    Raises:
        ModelError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt"):  # checks that the header and the length fit
            pass
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({one_line(error)}); download the model again") from error
    return header


def _dtype_and_shape(about: Any, path: Path, name: str) -> tuple[str, tuple[int, ...]]:
    """What a header says about one tensor."""
    try:
        return str(about["dtype"]), tuple(int(size) for size in about["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged (tensor {name}); download the model again") from error
