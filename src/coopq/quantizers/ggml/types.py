"""The block types of GGUF files, quantized by ggml itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.core.errors import BackendError
from coopq.core.files import expanded
from coopq.core.types import UNTOUCHED, LinearLayer, ProgressCallback, Width, next_width, silent
from coopq.model.matrices import matrix_of
from coopq.quantizers.backend import Packed, WeightQuantizer, require_library
from coopq.quantizers.ggml.imatrix import ImportanceMatrix
from coopq.quantizers.ggml.library import from_blocks, to_blocks
from coopq.quantizers.input_statistics import column_importance
from coopq.quantizers.packed_modules import PackedLinear

_STATISTICS = 1
"""Version of the statistics of inputs; raise it when the same tokens would give a column another importance."""


@dataclass(frozen=True)
class GGMLFormat:
    """Which ggml type stores a weight of which width. Blocks lie row by row, as in a GGUF file.

    Attributes:
        backend: Name of the backend, for messages.
        long_rows: Types by width for rows whose length is a multiple of 256: K-quants have super-blocks of 256 weights.
        short_rows: Types by width for other multiples of 32. ggml has no such type of 2 or 3 bits.
    """

    backend: str
    long_rows: Mapping[Width, str]
    short_rows: Mapping[Width, str]

    def types(self, columns: int) -> Mapping[Width, str]:
        """Types by width, ascending, for rows of a length.

        Raises:
            BackendError: If ggml has no types for the rows.
        """
        if columns % 32:
            raise BackendError(
                f"backend {self.backend!r} has no types for rows of {columns} weights: blocks have 32 or 256 weights; "
                "choose another backend for this model"
            )
        return self.short_rows if columns % 256 else self.long_rows

    def tensor_type(self, columns: int, bits: Width) -> Any:
        """The `gguf.GGMLQuantizationType` of a weight with rows of a length, at a width of its player.

        If the rows have no type of the width, the weight has the type of their next wider width, much as in llama.cpp.

        Raises:
            BackendError: If ggml has no types for the rows.
        """
        from gguf import GGMLQuantizationType

        if bits == UNTOUCHED:
            return GGMLQuantizationType.F16
        types = self.types(columns)
        return GGMLQuantizationType[types[next_width(tuple(types), bits)]]

    def row_bytes(self, columns: int, bits: Width) -> int:
        """Bytes of a row of this many weights."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.tensor_type(columns, bits)]
        return int(columns // block * size)


class GGMLBackend(WeightQuantizer):
    """ggml's quantizers, with an importance matrix of tokens, or of an imatrix file.

    The importance of a column of a weight is the mean square of that input over the tokens that weights are fitted to,
    in the full-precision model, as in llama.cpp's imatrix. An embedding that is tied to the head has the importance of
    the head's inputs. In coopq, weights are dequantized to compute; in llama.cpp, packed weights compute
    (`coopq export`).

    Attributes:
        long_rows: See `GGMLFormat`.
        short_rows: See `GGMLFormat`.

    Args:
        imatrix: llama.cpp's imatrix file.
    """

    name: ClassVar[str] = "ggml"
    long_rows: ClassVar[Mapping[Width, str]] = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
    short_rows: ClassVar[Mapping[Width, str]] = {4: "IQ4_NL", 4.5: "Q4_1", 5: "Q5_0", 5.5: "Q5_1", 8: "Q8_0"}
    bits: ClassVar[tuple[Width, ...]] = tuple(sorted({*long_rows, *short_rows}))
    calibrated = True
    format: GGMLFormat

    def __init__(self, imatrix: str | None = None) -> None:
        for package in ("libggml", "gguf"):
            require_library(self.name, package, "llama-cpp")
        self.format = GGMLFormat(self.name, self.long_rows, self.short_rows)
        self._file = None if imatrix is None else expanded(imatrix)
        self.calibrated = imatrix is None

    @cached_property
    def _imatrix(self) -> ImportanceMatrix | None:
        """The imatrix, if one is named. It is read late, since saved models are loaded without the file."""
        return None if self._file is None else ImportanceMatrix.read(self._file)

    def check_layers(self, layers: Sequence[LinearLayer]) -> None:
        """See `Backend.check_layers`: an imatrix needs an entry for each layer."""
        if self._imatrix is not None:
            for layer in layers:
                self._imatrix.importance(layer)

    @property
    def version(self) -> str:
        """Version of libggml-python, which is the version of ggml."""
        return version("libggml-python")

    @property
    def settings(self) -> dict[str, Any]:
        """Types by width, the layers whose columns have an importance, and the version of its statistics."""
        return {
            "statistics": _STATISTICS,
            "long_rows": _with_text_keys(self.long_rows),
            "short_rows": _with_text_keys(self.short_rows),
            "importance": (
                "linear layers, experts, head" if self._imatrix is None else f"imatrix {self._imatrix.digest}"
            ),
        }

    def quantize(self, weight: Tensor, bits: Width, importance: Tensor | None = None) -> Packed:
        """Quantize a weight of shape (out, in).

        Args:
            weight: Weight of a linear layer, or the rows of all experts one after the other.
            bits: Width of the weight.
            importance: Importance of the columns, shape (in,), or (n_experts, in); None weighs all columns alike.
        """
        kind = self.format.tensor_type(weight.shape[1], bits)
        return {"blocks": to_blocks(kind, weight, importance).to(weight.device)}

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`."""
        for _, name, packed in self._quantize_layers(model, {name: [width] for name, width in bits.items()}, tokens):
            yield name, packed

    def quantize_widths(
        self,
        model: Any,
        tokenizer: Any,
        layers: Mapping[Width, Sequence[str]],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `Backend.quantize_widths`."""
        names = dict.fromkeys(chain.from_iterable(layers.values()))
        widths = {name: [width for width, chosen in layers.items() if name in chosen] for name in names}
        return self._quantize_layers(model, widths, tokens, progress)

    def column_weights(
        self,
        model: Any,
        names: Sequence[str],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Mapping[str, Tensor | None]:
        """The importance of the columns of layers, by name: of the imatrix file if there is one, or else of tokens.

        Args:
            model: A model of transformers.
            names: Names as for `coopq.quantizers.input_statistics.column_importance`.
            tokens: Tokens that weights are fitted to, shape (n_sequences, length); None weighs all columns alike.
            progress: Told of every batch of tokens.
        """
        if self._imatrix is not None:
            matrices = {name: matrix_of(model, name) for name in names}
            layers = [LinearLayer(name, own.shape, n_experts=own.n_experts) for name, own in matrices.items()]
            return {layer.name: self._imatrix.importance(layer) for layer in layers}
        return {} if tokens is None else dict(column_importance(model, names, tokens, progress))

    def _quantize_layers(
        self,
        model: Any,
        widths: Mapping[str, Sequence[Width]],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Iterator[tuple[Width, str, Packed]]:
        """Width, name and packed tensors of layers at their widths, layer by layer."""
        importance = self.column_weights(model, list(widths), tokens, progress)
        for name, layer_widths in widths.items():
            weight = matrix_of(model, name).rows()
            for width in layer_widths:
                yield width, name, self.quantize(weight, width, importance.get(name))

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        blocks = packed["blocks"]
        on_host = blocks.cpu().contiguous()
        return from_blocks(self.format.tensor_type(shape[1], bits), on_host).to(blocks.device, dtype)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def widths_of(self, shape: tuple[int, int]) -> tuple[Width, ...]:
        """See `Backend.widths_of`."""
        return tuple(self.format.types(shape[1]))

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        return shape[0] * self.format.row_bytes(shape[1], bits)


class IQuants(GGMLBackend):
    """I-quants for the narrow widths: a lower loss in fewer bytes than K-quants, but slower on CPUs.

    If two types have the same number of bits, the smaller type has the whole width and the larger type the width plus a
    half. Types that are missing here do not beat a mixture of the neighbouring types.
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
    bits: ClassVar[tuple[Width, ...]] = tuple(sorted({*long_rows, *GGMLBackend.short_rows}))


def _with_text_keys(types: Mapping[Width, str]) -> dict[str, str]:
    """Types by width, with keys as JSON has them."""
    return {str(width): name for width, name in types.items()}
