"""The contract of a quantization backend.

A backend turns weights into packed tensors and back. The packed tensors are the single source of truth: the bank and
a saved model hold them as they are, what is measured is their dequantized form, and a loaded model computes with them.

There are two kinds of backends:

* A `WeightQuantizer` quantizes one weight at a time.
* A `ModelQuantizer` hands a whole model to a library, which quantizes all its layers.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.core.errors import BackendError
from coopq.core.specs import TextSpec
from coopq.core.types import LinearLayer, ProgressCallback, Width, silent
from coopq.model.matrices import matrix_of

Packed: TypeAlias = Mapping[str, Tensor]
"""The tensors that store one quantized weight, by their names in a saved model."""


@dataclass(frozen=True)
class Affine:
    """A weight as integers in groups along its rows: (codes - zeros) * scales.

    Attributes:
        codes: uint8, shape (out, groups, group_size).
        zeros: Zero points: uint8, or floats if they are not whole, shape (out, groups, 1).
        scales: 16-bit floats, shape (out, groups, 1).
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor


class AffineForm(NamedTuple):
    """What the shape of a weight alone tells about its `Affine`.

    Attributes:
        group_size: Weights in a group.
        zeros: Dtype of the zero points.
        symmetric: Whether all zero points are in the middle of the range.
    """

    group_size: int
    zeros: torch.dtype
    symmetric: bool


class Backend(ABC):
    """Quantizes weights of linear layers, and reads and runs what it made.

    A backend is constructed with its options as keywords; `coopq.quantizers.BACKENDS` names the options.

    Raises:
        BackendError: If the library is missing, or an option has a value that the library does not take.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[Width, ...]]
    """Widths that the backend quantizes to. `UNTOUCHED` is not among them: it needs no backend."""
    whole_model: ClassVar[bool] = False
    """Whether the packed weights of a layer depend on the widths of other layers, so that a mixed model has to be
    quantized as a whole."""
    calibrated: bool = False
    """Whether weights are fitted to tokens."""
    shortest_sequence: ClassVar[int] = 2
    """Tokens of the shortest sequence that weights can be fitted to."""
    only_plain: ClassVar[bool] = False
    """Whether the backend quantizes nn.Linear layers only: no embeddings, no Conv1D, no experts in one tensor."""
    weights_file: ClassVar[str] = "quantized.safetensors"
    """File of a saved model's weights. transformers does not look for this name, so it cannot load packed weights by
    mistake."""
    is_affine: bool = False
    """Whether `affine` gives the integers of packed weights."""
    format: object = None
    """The tensor format, if several backends share one: a `GPTQFormat` or a `GGMLFormat`. Exporters test its type."""

    def check_text(self, text: TextSpec) -> None:
        """Check that weights can be fitted to a text of these lengths, before any work.

        Raises:
            BackendError: If the backend fits weights to no text, or not to sequences as short as these.
        """
        if text.fit_tokens is not None and not self.calibrated:
            raise BackendError(f"backend {self.name!r} fits its weights to no text; leave --fit-tokens out")
        if text.sequence_length < self.shortest_sequence:
            raise BackendError(
                f"backend {self.name!r} fits weights to sequences of at least {self.shortest_sequence} tokens, and "
                f"sequence-length = {text.sequence_length}; use longer sequences, 64 tokens for example, and multiples "
                "of that length for --tokens and --fit-tokens"
            )

    def check_layers(self, layers: Sequence[LinearLayer]) -> None:  # noqa: B027  # most backends need nothing
        """Check that a backend has what it needs for layers, before any work: nothing, unless a backend says otherwise.

        Raises:
            BackendError: If something is missing for a layer.
        """

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the library that quantizes."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else that the packed tensors depend on, as plain data."""

    @abstractmethod
    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """Quantize linear layers of a model.

        Args:
            model: The model in full precision.
            tokenizer: The model's tokenizer.
            bits: Width of each linear layer to quantize, by name. All other layers stay as they are.
            tokens: Tokens that weights are fitted to, shape (n_sequences, length); None for backends that fit none.
        Yields:
            Name and packed tensors of each layer, in the order of `bits`.
        """

    def quantize_widths(
        self,
        model: Any,
        tokenizer: Any,
        layers: Mapping[Width, Sequence[str]],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Iterator[tuple[Width, str, Packed]]:
        """Quantize linear layers of a model at several widths. Backends that share work between widths override this.

        Args:
            model: The model in full precision.
            tokenizer: The model's tokenizer.
            layers: Names of the layers to quantize, for each width.
            tokens: As for `quantize_model`.
            progress: Told of what comes before the first layer and takes long.
        Yields:
            Width, name and packed tensors of each layer, in any order.
        """
        for width, names in layers.items():
            for name, packed in self.quantize_model(model, tokenizer, dict.fromkeys(names, width), tokens):
                yield width, name, packed

    @abstractmethod
    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """The weight of shape (out, in) that packed tensors stand for; `linear` computes with exactly this weight."""

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """The integers of a packed weight of shape (out, in). Rows must be whole groups.

        Raises:
            BackendError: If `is_affine` is false.
        """
        raise BackendError(f"weights of backend {self.name!r} are not integers in groups along rows")

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """The form of what `affine` gives for a weight of shape (out, in).

        Raises:
            BackendError: As `affine`.
        """
        raise BackendError(f"weights of backend {self.name!r} are not integers in groups along rows")

    @abstractmethod
    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A linear layer that keeps its weight packed and computes in `dtype`.

        Its attribute `weight` is the weight, as some models look at the weight of a layer.
        """

    def widths_of(self, shape: tuple[int, int]) -> tuple[Width, ...]:
        """Widths of a weight of shape (out, in): all of `bits`, unless a backend has fewer for some shapes.

        A weight may share its player with a weight that has other widths. So all other functions take any width of
        `bits`. If a weight lacks the width, they use its next wider width.

        Raises:
            BackendError: If a weight of this shape cannot be quantized.
        """
        return self.bits

    @abstractmethod
    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """Bytes of the packed tensors of a weight of shape (out, in), from the shape alone.

        Raises:
            BackendError: If a weight of this shape cannot be quantized.
        """

    def native_config(self, bits: Mapping[str, Width]) -> dict[str, Any] | None:
        """Configuration that the library's own loader needs beside the weights; None if the library has no loader.

        Args:
            bits: Width of each linear layer by name; `UNTOUCHED` layers are included.
        """
        return None

    def fingerprint(self) -> dict[str, Any]:
        """Name, version and settings."""
        return {"name": self.name, "version": self.version, "settings": self.settings}


class WeightQuantizer(Backend):
    """A backend that quantizes one weight at a time."""

    @abstractmethod
    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """Quantize a weight of shape (out, in)."""

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`."""
        for name, width in bits.items():
            yield name, self.quantize(matrix_of(model, name).rows(), width)


class ModelQuantizer(Backend):
    """A backend whose library quantizes the layers of a whole model, fitted to tokens."""

    calibrated = True
    only_plain: ClassVar[bool] = True


def check_group_size(group_size: int | None, default: int) -> int:
    """The group size to use: the default if None is given.

    Raises:
        BackendError: If the group size is not positive.
    """
    if group_size is not None and group_size < 1:
        raise BackendError(f"group size {group_size} is not positive; the default is {default}")
    return default if group_size is None else group_size


def require_library(backend: str, module: str, extra: str) -> None:
    """Check that a backend's library is installed, without importing the library.

    Raises:
        BackendError: If not, with the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise BackendError(f"backend {backend!r} needs the package {module}; run: pip install 'coopq[{extra}]'")
