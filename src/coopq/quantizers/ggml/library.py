"""ggml's own functions, by ctypes from the library that libggml-python ships.

Parts of ggml in use: `ggml_quantize_chunk`, `ggml_get_type_traits` and the layout of `ggml_type_traits`, which changes
between versions. libggml-python has no binding for them.
"""

import ctypes
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopq.core.errors import BackendError
from coopq.core.versions import check_version

_TRIED = "0.20"
"""Version of libggml-python whose `ggml_type_traits` is as `_Traits` says."""
_NEEDS_IMPORTANCE = ("IQ2_XXS",)
"""Types for which ggml ends the process if no importance is given. An embedding without a tied head has none."""
_LEAST_IMPORTANCE = 1e-6
"""Least importance of a column, as a share of the mean importance."""


def to_blocks(kind: Any, weight: Tensor, importance: Tensor | None) -> Tensor:
    """Quantize a weight.

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        weight: Shape (out, in); of experts, the rows of all experts one after the other.
        importance: Importance of the columns, shape (in,), or (n_experts, in).
    Returns:
        Blocks, uint8 in host memory, shape (out, bytes of a row).
    """
    from gguf import GGML_QUANT_SIZES

    source = weight.detach().float().cpu().contiguous()
    if importance is None and kind.name in _NEEDS_IMPORTANCE:
        importance = torch.ones(weight.shape[1])
    columns = [None] if importance is None else _positive(importance.float().cpu().reshape(-1, weight.shape[1]))
    block, size = GGML_QUANT_SIZES[kind]
    blocks = torch.empty(weight.shape[0], weight.shape[1] // block * size, dtype=torch.uint8)
    n_threads = torch.get_num_threads()
    rows = -(-len(source) // n_threads)

    def quantize_rows(part: Tensor, target: Tensor, part_columns: Tensor | None) -> int:
        pointer = None if part_columns is None else part_columns.data_ptr()
        arguments = int(kind), part.data_ptr(), target.data_ptr(), 0, *part.shape, pointer
        return int(_library().ggml_quantize_chunk(*arguments))

    parts = [
        (part, target, expert_columns)
        for expert, expert_blocks, expert_columns in zip(
            source.chunk(len(columns)), blocks.chunk(len(columns)), columns, strict=True
        )
        for part, target in zip(expert.split(rows), expert_blocks.split(rows), strict=True)
    ]
    with ThreadPoolExecutor(n_threads) as threads:  # rows are independent, and ctypes releases Python's lock
        written = sum(threads.map(quantize_rows, *zip(*parts, strict=True)))
    assert written == blocks.nbytes, (written, blocks.nbytes)
    return blocks


def from_blocks(kind: Any, blocks: Tensor) -> Tensor:
    """Dequantize blocks.

    Args:
        kind: A `gguf.GGMLQuantizationType`.
        blocks: uint8 in host memory, contiguous, shape (rows, bytes of a row).
    Returns:
        float32, shape (rows, columns).
    """
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    weight = torch.empty(len(blocks), blocks.shape[1] // size * block)
    n_threads, dequantize = torch.get_num_threads(), _dequantizer(int(kind))

    def dequantize_rows(part: Tensor, target: Tensor) -> None:
        dequantize(part.data_ptr(), target.data_ptr(), target.numel())

    rows = -(-len(blocks) // n_threads)
    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(dequantize_rows, blocks.split(rows), weight.split(rows)))
    return weight


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
        BackendError: If the library cannot be loaded, or lacks a function.
    """
    check_version("libggml-python", _TRIED, "coopq's binding of ggml")
    spec = importlib.util.find_spec("libggml")
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("lib*/*ggml-base.*"))
    try:
        library = ctypes.CDLL(str(files[0]))
        quantize, traits = library.ggml_quantize_chunk, library.ggml_get_type_traits
    except (IndexError, OSError, AttributeError) as error:
        raise BackendError(
            f"libggml-python has no ggml library that loads here ({error}); run: pip install --force-reinstall "
            f"'libggml-python=={_TRIED}.*'"
        ) from error
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    traits.restype = ctypes.POINTER(_Traits)
    traits.argtypes = [ctypes.c_int]
    return library


@cache
def _dequantizer(kind: int) -> Any:
    """ggml's function that dequantizes blocks of a type.

    Raises:
        BackendError: If ggml describes the type otherwise than `_Traits` does.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    traits = _library().ggml_get_type_traits(kind).contents
    if (traits.blck_size, traits.type_size) != GGML_QUANT_SIZES[GGMLQuantizationType(kind)]:
        raise BackendError(
            f"the installed libggml-python lays out its types in another way than version {_TRIED}; run: pip install "
            f"'libggml-python=={_TRIED}.*'"
        )
    return traits.to_float


def _positive(importance: Tensor) -> Tensor:
    """Importance of columns without zeros: ggml sets live weights of a column without importance to zero.

    Args:
        importance: Shape (n_experts, in).
    """
    mean = importance.mean(dim=1, keepdim=True)
    floored = importance.maximum(_LEAST_IMPORTANCE * mean)
    return torch.where(mean > 0, floored, torch.ones_like(importance)).contiguous()
