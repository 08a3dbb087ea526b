"""The block types of GGUF files, quantized by ggml itself through the library that libggml-python ships."""

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.quantize.backend import Backend, Packed, PackedLinear
from coopq.quantize.input_statistics import column_importance
from coopq.core.errors import BackendError
from coopq.model.players import weight_of
from coopq.core.types import UNTOUCHED, Width

_NEEDS_IMPORTANCE = ("IQ2_XXS",)
"""Types that ggml ends the process for where no importance is given, as of an embedding that is no head."""


class GGMLBackend(Backend):
    """ggml's quantizers, with an importance matrix where there are calibration tokens.

    Importance of a column of a weight is the mean square of that input over the calibration tokens in the
    full-precision model, as llama.cpp's imatrix has it; an embedding that is the head too has that of its inputs.
    Quantized weights lie in ggml's blocks, row by row, as in a GGUF file. Here they compute dequantized; packed, they
    run in llama.cpp (`coopq export`).

    Attributes:
        long_rows: Types by width for rows that are multiples of 256: K-quants, whose super-blocks are that long.
        short_rows: For other multiples of 32, as llama.cpp itself falls back on them; it has none of 2 and 3 bits.
    """

    name: ClassVar[str] = "ggml"
    long_rows: ClassVar[Mapping[Width, str]] = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
    short_rows: ClassVar[Mapping[Width, str]] = {4: "IQ4_NL", 5: "Q5_1", 8: "Q8_0"}
    bits: ClassVar[tuple[Width, ...]] = tuple(long_rows)
    calibrated: ClassVar[bool] = True

    def __init__(self, group_size: int | None = None) -> None:
        for package in ("libggml", "gguf"):
            if importlib.util.find_spec(package) is None:
                raise BackendError(f"backend {self.name!r} needs the package {package}; run: pip install 'coopq[gguf]'")
        if group_size is not None:
            raise BackendError(f"backend {self.name!r} has the groups of its types; leave group size {group_size} out")

    @property
    def version(self) -> str:
        """Version of libggml-python, which is ggml's."""
        return version("libggml-python")

    @property
    def settings(self) -> dict[str, Any]:
        """Types by width, for rows that are multiples of 256 and for others; whose columns have an importance."""
        return {
            "long_rows": _by_name(self.long_rows),
            "short_rows": _by_name(self.short_rows),
            "importance": "linear layers, experts, head",
        }

    def quantize(self, weight: Tensor, bits: Width, importance: Tensor | None = None) -> Packed:
        """Quantize a weight of shape (out, in), with the importance of its columns if given.

        Args:
            weight: Of a linear layer, or of experts, one after the other.
            bits: The width.
            importance: Shape (in,), or (n_experts, in).
        """
        return {"blocks": to_blocks(self.tensor_type(weight.shape[1], bits), weight, importance).to(weight.device)}

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`."""
        for _, name, packed in self._each(model, {name: [width] for name, width in bits.items()}, tokens):
            yield name, packed

    def quantize_widths(
        self, model: Any, tokenizer: Any, layers: Mapping[Width, Sequence[str]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `Backend.quantize_widths`."""
        names = dict.fromkeys(chain.from_iterable(layers.values()))
        widths = {name: [width for width, of in layers.items() if name in of] for name in names}
        return self._each(model, widths, tokens)

    def _each(
        self, model: Any, widths: Mapping[str, Sequence[Width]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """Width, name and packed tensors of layers at each of their widths, layer by layer."""
        importance = {} if tokens is None else column_importance(model, list(widths), tokens)
        for name, of_layer in widths.items():
            weight = weight_of(model, name).data.flatten(0, -2)
            for width in of_layer:
                yield width, name, self.quantize(weight, width, importance.get(name))

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        blocks = packed["blocks"]
        on_host = blocks.cpu().contiguous()
        return from_blocks(self.tensor_type(shape[1], bits), on_host).to(blocks.device, dtype)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        return shape[0] * self._row_bytes(shape[1], bits)

    def tensor_type(self, columns: int, bits: Width) -> Any:
        """The `gguf.GGMLQuantizationType` of a weight with rows of this length.

        Raises:
            BackendError: If ggml has no type of this width for them.
        """
        from gguf import GGMLQuantizationType

        if bits == UNTOUCHED:
            return GGMLQuantizationType.F16
        if columns % 32:
            raise BackendError(
                f"backend {self.name!r} has no types for rows of {columns} weights: they come in blocks of 32 or 256"
            )
        types = self.short_rows if columns % 256 else self.long_rows
        if bits not in types:
            raise BackendError(
                f"backend {self.name!r} has no type of {bits} bits for rows of {columns} weights; it has "
                f"{', '.join(map(str, types))} for these (others want multiples of 256)"
            )
        return GGMLQuantizationType[types[bits]]

    def _row_bytes(self, columns: int, bits: Width) -> int:
        """Bytes of a row of this many weights."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.tensor_type(columns, bits)]
        return int(columns // block * size)


class IQuants(GGMLBackend):
    """I-quants for the narrow widths: lower loss in fewer bytes than K-quants, slower to compute with on CPUs.

    Of two types that have as many bits the smaller one has the whole width, the larger one half a bit more. Types that
    are not here lose about what a mixture of those around them does, or more.
    """

    name: ClassVar[str] = "ggml-iq"
    long_rows: ClassVar[Mapping[Width, str]] = {
        2: "IQ2_XXS",
        2.5: "IQ2_S",
        3: "IQ3_XXS",
        3.5: "IQ3_S",
        4: "IQ4_XS",
        4.5: "Q4_K",
        5: "Q5_K",
        6: "Q6_K",
        8: "Q8_0",
    }
    bits: ClassVar[tuple[Width, ...]] = tuple(long_rows)


def to_blocks(kind: Any, weight: Tensor, importance: Tensor | None) -> Tensor:
    """What ggml makes of a weight, uint8 in the host's memory, shape (out, bytes of a row).

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        weight: Shape (out, in); of experts, one after the other.
        importance: Of its columns, shape (in,), or (n_experts, in).
    """
    from gguf import GGML_QUANT_SIZES

    source = weight.detach().float().cpu().contiguous()
    if importance is None and kind.name in _NEEDS_IMPORTANCE:
        importance = torch.ones(weight.shape[1])
    columns = [None] if importance is None else importance.float().cpu().reshape(-1, weight.shape[1]).contiguous()
    block, size = GGML_QUANT_SIZES[kind]
    blocks = torch.empty(weight.shape[0], weight.shape[1] // block * size, dtype=torch.uint8)
    n_threads = torch.get_num_threads()
    rows = -(-len(source) // n_threads)

    def quantize_rows(part: Tensor, into: Tensor, of_columns: Tensor | None) -> int:
        pointer = None if of_columns is None else of_columns.data_ptr()
        given = int(kind), part.data_ptr(), into.data_ptr(), 0, *part.shape, pointer
        return int(_library().ggml_quantize_chunk(*given))

    parts = [
        (part, into, of_columns)
        for expert, into_expert, of_columns in zip(
            source.chunk(len(columns)), blocks.chunk(len(columns)), columns, strict=True
        )
        for part, into in zip(expert.split(rows), into_expert.split(rows), strict=True)
    ]
    with ThreadPoolExecutor(n_threads) as threads:  # each row by itself, outside of Python
        written = sum(threads.map(quantize_rows, *zip(*parts, strict=True)))
    assert written == blocks.nbytes, (written, blocks.nbytes)
    return blocks


def from_blocks(kind: Any, blocks: Tensor) -> Tensor:
    """The weights that blocks of a type stand for.

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        blocks: uint8 in the host's memory, without gaps, shape (rows, bytes of a row).
    Returns:
        float32, shape (rows, columns).
    """
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    weight = torch.empty(len(blocks), blocks.shape[1] // size * block)
    _to_float(int(kind))(blocks.data_ptr(), weight.data_ptr(), weight.numel())
    return weight


def _by_name(types: Mapping[Width, str]) -> dict[str, str]:
    """With keys as JSON has them."""
    return {str(width): name for width, name in types.items()}


class _Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL:
    """libggml-base.

    Raises:
        BackendError: If it cannot be loaded.
    """
    spec = importlib.util.find_spec("libggml")
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("lib*/*ggml-base.*"))
    try:
        library = ctypes.CDLL(str(files[0]))
    except (IndexError, OSError) as error:
        raise BackendError(f"libggml-python has no library that loads here ({error}); install it again") from error
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


@cache
def _to_float(kind: int) -> Any:
    """ggml's function that dequantizes blocks of a type."""
    return _library().ggml_get_type_traits(kind).contents.to_float
