"""The contract of a quantization backend.

A backend turns one weight matrix into packed tensors and back. The packed tensors are the single source of
truth: the bank holds their dequantised form, a saved model holds them as they are, and a loaded model runs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from coopq.core.errors import BackendError
from coopq.model.players import weight_of
from coopq.core.types import Width

Packed: TypeAlias = Mapping[str, Tensor]
"""The tensors that store one quantized weight, by their names in a saved model."""


@dataclass(frozen=True)
class Affine:
    """A weight as integers in groups along its rows: (codes - zeros) * scales.

    Attributes:
        codes: uint8, shape (out, groups, group_size).
        zeros: uint8, or floats where they are not whole, shape (out, groups, 1).
        scales: Of 16 bits, shape (out, groups, 1).
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor


class AffineForm(NamedTuple):
    """What is known of an `Affine` from the shape of its weight alone.

    Attributes:
        group_size: Weights in a group.
        zeros: Type of the zero points.
        symmetric: Whether they are all in the middle of the range.
    """

    group_size: int
    zeros: torch.dtype
    symmetric: bool


class Backend(ABC):
    """Quantizes weight matrices of linear layers.

    Args:
        group_size: Weights that share a scale; None takes the backend's default.

    Raises:
        BackendError: If the library is missing, or does not take this group size.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[Width, ...]]
    """Widths that it quantizes to; `UNTOUCHED` is none of them, and needs no backend."""
    whole_model: ClassVar[bool] = False
    """Whether a layer's result depends on the others, so that all are quantized together."""
    calibrated: ClassVar[bool] = False
    """Whether weights are fitted to tokens."""
    only_plain: ClassVar[bool] = False
    """Whether it quantizes linear layers alone, and neither embeddings nor experts that are kept in one tensor."""
    weights_file: ClassVar[str] = "quantized.safetensors"
    """File of a saved model's weights; not one that transformers would load by mistake."""
    is_affine: bool = False
    """Whether `affine` gives the integers of what it makes."""

    @abstractmethod
    def __init__(self, group_size: int | None = None, **options: Any) -> None: ...

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the library that does the work."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else that the packed tensors depend on, as plain data."""

    @abstractmethod
    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """Quantize a weight of shape (out, in)."""

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """Quantize linear layers of a model.

        Args:
            model: The model, in full precision.
            tokenizer: Its tokenizer.
            bits: Width of each linear layer that is quantized, by name; all others stay as they are.
            tokens: What weights are fitted to, shape (n_sequences, length); None where they are not.
        Yields:
            Name and packed tensors of each layer, in the order of `bits`.
        """
        for name, width in bits.items():
            yield name, self.quantize(weight_of(model, name).data.flatten(0, -2), width)

    def quantize_widths(
        self, model: Any, tokenizer: Any, layers: Mapping[Width, Sequence[str]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """Quantize linear layers of a model at several widths; backends that can share work between widths do.

        Args:
            model: The model, in full precision.
            tokenizer: Its tokenizer.
            layers: Names of the layers for each width.
            tokens: What weights are fitted to, shape (n_sequences, length); None where they are not.
        Yields:
            Width, name and packed tensors of each layer, in any order.
        """
        for width, names in layers.items():
            for name, packed in self.quantize_model(model, tokenizer, dict.fromkeys(names, width), tokens):
                yield width, name, packed

    def native_config(self, bits: Mapping[str, Width]) -> dict[str, Any] | None:
        """Configuration that the library's own loader wants beside the weights; None where it has no such format.

        Args:
            bits: Width of each linear layer by name, those that stay `UNTOUCHED` included.
        """
        return None

    @abstractmethod
    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """The weight of shape (out, in) that `packed` stands for; `linear` computes with exactly this."""

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """The integers of a packed weight of shape (out, in), whose rows are whole groups.

        Raises:
            BackendError: If the backend's weights are of another form.
        """
        raise BackendError(f"weights of backend {self.name!r} are no integers in groups along rows")

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """The form of what `affine` gives of a weight of shape (out, in), with the same errors."""
        raise BackendError(f"weights of backend {self.name!r} are no integers in groups along rows")

    @abstractmethod
    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A module that keeps the weight packed and computes in `dtype`."""

    @abstractmethod
    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """Bytes of the tensors that `quantize` will return, from the shape alone.

        Raises:
            BackendError: If a weight of this shape cannot be quantized.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Name, version and settings."""
        return {"name": self.name, "version": self.version, "settings": self.settings}


class _PackedModule(nn.Module):
    """A module that keeps a weight packed, as buffers."""

    def __init__(self, backend: Backend, packed: Packed, bits: Width, dtype: torch.dtype) -> None:
        super().__init__()
        self._backend, self._bits, self._dtype = backend, bits, dtype
        for name, tensor in packed.items():
            self.register_buffer(name.replace(".", "/"), tensor)  # names of buffers have no dots

    def _weight(self, shape: tuple[int, int]) -> Tensor:
        packed = {name.replace("/", "."): tensor for name, tensor in self.named_buffers(recurse=False)}
        return self._backend.dequantize(packed, shape, self._bits, self._dtype)


class PackedLinear(_PackedModule):
    """A linear layer that dequantises its weight in each forward, for backends without a module of their own."""

    def __init__(
        self,
        backend: Backend,
        packed: Packed,
        shape: tuple[int, int],
        bits: Width,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(backend, packed, bits, dtype)
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs W' + bias."""
        return functional.linear(inputs, self._weight((self.out_features, self.in_features)), self.bias)

    def extra_repr(self) -> str:
        """Shape and width, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self._bits}"


class PackedEmbedding(_PackedModule):
    """An embedding that dequantises its weight in each forward.

    Args:
        embedding: The model's own, whose forward is taken; its weight is let go.
        backend: What dequantises.
        packed: The packed weight.
        bits: Its width.
        dtype: What to compute in.
    """

    def __init__(
        self, embedding: nn.Embedding, backend: Backend, packed: Packed, bits: Width, dtype: torch.dtype
    ) -> None:
        super().__init__(backend, packed, bits, dtype)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        embedding.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self._own = embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight, as the model's own embedding makes them."""
        weight = self._weight((self.num_embeddings, self.embedding_dim))
        rows: Tensor = functional_call(self._own, {"weight": weight}, (ids,))
        return rows


class PackedExperts(_PackedModule):
    """Experts that are kept in one tensor, dequantised while their module computes.

    Args:
        backend: What dequantises.
        packed: The packed weight, of the rows of all experts one after the other.
        shape: Of the tensor: (n_experts, out, in).
        bits: Its width.
        dtype: What to compute in.
    """

    def __init__(self, backend: Backend, packed: Packed, shape: torch.Size, bits: Width, dtype: torch.dtype) -> None:
        super().__init__(backend, packed, bits, dtype)
        self._shape = shape

    def serve(self, module: nn.Module, attribute: str) -> None:
        """Let a module have its experts from here: its own tensor is let go."""
        parameter = getattr(module, attribute)
        matrix = (self._shape[0] * self._shape[1], self._shape[2])

        def arrive(*_: Any) -> None:
            parameter.data = self._weight(matrix).view(self._shape)

        def leave(*_: Any) -> None:
            parameter.data = torch.empty(0, dtype=self._dtype)

        leave()
        module.add_module(f"packed_{attribute}", self)
        module.register_forward_pre_hook(arrive)
        module.register_forward_hook(leave, always_call=True)


def check_group_size(group_size: int | None, default: int) -> int:
    """The group size to use.

    Raises:
        BackendError: If it is not positive.
    """
    if group_size is not None and group_size < 1:
        raise BackendError(f"group size {group_size} is not positive; {default} is the default")
    return default if group_size is None else group_size
