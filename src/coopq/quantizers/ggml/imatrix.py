"""llama.cpp's imatrix files: the mean square of each input column of layers, by names of tensors in GGUF files.

Source: `common_imatrix_load` in llama.cpp's common/imatrix-loader.cpp, and `load_imatrix` in tools/quantize.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.errors import BackendError
from coopq.core.types import LinearLayer
from coopq.quantizers.ggml.names import gguf_names

Numbers = npt.NDArray[np.float32]
_WAY_OUT = "make the file for this model by llama-imatrix, or leave --imatrix out"
_ENDS = ("token_embd.weight", "output.weight")
"""Tensors that llama-imatrix leaves out by default; llama.cpp quantizes them without importance too."""
_MOST_ENTRIES = 1_000_000


@dataclass(frozen=True)
class ImportanceMatrix:
    """An imatrix file.

    Attributes:
        path: The file.
        digest: A hash of the file's content.
        entries: Importance of the columns, all experts of a tensor one after the other, by name of the tensor.
    """

    path: Path
    digest: str
    entries: Mapping[str, Numbers]

    @classmethod
    def read(cls, path: Path) -> "ImportanceMatrix":
        """Read a file in the form GGUF, or in the older form, ".dat".

        Raises:
            BackendError: If the file cannot be read, or holds numbers that are negative or not finite.
        """
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
                entries = _read_gguf(path) if is_gguf else _read_legacy(path.read_bytes())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        except OSError as error:
            raise BackendError(f"cannot read imatrix {path} ({error.strerror}); {_WAY_OUT}") from error
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, struct.error) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BackendError(f"{path} is not an imatrix, or is damaged ({reason}); {_WAY_OUT}") from error
        for name, values in entries.items():
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise BackendError(f"imatrix {path} holds negative or non-finite numbers for {name}; {_WAY_OUT}")
        return cls(path, digest, entries)

    def importance(self, layer: LinearLayer) -> Tensor | None:
        """Importance of the columns of a layer.

        Returns:
            Shape (in,), or (n_experts, in) for experts; None for embeddings and heads that the file leaves out.
        Raises:
            BackendError: If the file lacks the layer, or has another number of columns.
        """
        names, (_, columns) = gguf_names(layer.name), layer.shape
        name = next((name for name in names if name in self.entries), None)
        if name is None:
            if any(end in names for end in _ENDS):
                return None
            expected = names[0] if names else "no name is known for it"
            raise BackendError(f"imatrix {self.path} lacks {layer.name} ({expected}); {_WAY_OUT}")
        values = torch.from_numpy(self.entries[name])
        if len(values) != max(1, layer.n_experts) * columns:
            experts = f" of {layer.n_experts} experts" if layer.n_experts else ""
            raise BackendError(
                f"{name} of imatrix {self.path} has {len(values)} numbers, and {layer.name} has {columns} columns"
                f"{experts}; {_WAY_OUT}"
            )
        return values.reshape(-1, columns) if layer.n_experts else values


def _read_gguf(path: Path) -> dict[str, Numbers]:
    """Entries of the form GGUF: sums of squares, and numbers of tokens for each expert."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}  # not yet read: it may be a model
    entries = dict[str, Numbers]()
    for key, data in tensors.items():
        if key.endswith(".in_sum2"):
            counts = np.array(tensors[f"{key.removesuffix('.in_sum2')}.counts"], np.float32).reshape(-1, 1)
            sums = np.array(data, np.float32).reshape(len(counts), -1)
            # As in llama.cpp, all columns of an expert that no token reached weigh alike.
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
            entries[key.removesuffix(".in_sum2")] = means.astype(np.float32).reshape(-1)
    if not entries:
        raise ValueError("it holds no sums of squares")
    return entries


def _read_legacy(content: bytes) -> dict[str, Numbers]:
    """Entries of the form ".dat": means, each multiplied by a number of calls."""
    place, entries = 0, dict[str, Numbers]()

    def number() -> int:
        nonlocal place
        place += 4
        return int(struct.unpack_from("<i", content, place - 4)[0])

    def take(n_bytes: int) -> bytes:
        nonlocal place
        if not 0 < n_bytes <= len(content) - place:
            raise ValueError("it is truncated")
        place += n_bytes
        return content[place - n_bytes : place]

    n_entries = number()
    if not 0 < n_entries < _MOST_ENTRIES:
        raise ValueError(f"{n_entries} entries")
    for _ in range(n_entries):
        name = take(number()).decode()
        n_calls = number()
        entries[name] = np.frombuffer(take(4 * number()), np.float32) / np.float32(max(1, n_calls))
    return entries
