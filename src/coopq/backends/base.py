"""The contract of a quantization backend.

A backend turns one weight matrix into packed tensors and back. The packed tensors are the single source of
truth: the bank holds their dequantised form, a saved model holds them as they are, and a loaded model runs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from coopq.errors import BackendError

Packed: TypeAlias = Mapping[str, Tensor]
"""The tensors that store one quantized weight, by their names in a saved model."""


class Backend(ABC):
    """Quantizes weight matrices of linear layers.

    Args:
        group_size: Weights that share a scale; None takes the backend's default.

    Raises:
        BackendError: If the library is missing, or does not take this group size.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]

    @abstractmethod
    def __init__(self, group_size: int | None = None) -> None: ...

    @property
    @abstractmethod
    def version(self) -> str:
        """Version of the library that does the work."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything else that the packed tensors depend on, as plain data."""

    @abstractmethod
    def quantize(self, weight: Tensor, bits: int) -> Packed:
        """Quantize a weight of shape (out, in)."""

    @abstractmethod
    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: int, dtype: torch.dtype) -> Tensor:
        """The weight of shape (out, in) that `packed` stands for; `linear` computes with exactly this."""

    @abstractmethod
    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: int, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A module that keeps the weight packed and computes in `dtype`."""

    @abstractmethod
    def storage_bytes(self, shape: tuple[int, int], bits: int) -> int:
        """Bytes of the tensors that `quantize` will return, from the shape alone.

        Raises:
            BackendError: If a weight of this shape cannot be quantized.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Name, version and settings."""
        return {"name": self.name, "version": self.version, "settings": self.settings}


def check_group_size(group_size: int | None, default: int) -> int:
    """The group size to use.

    Raises:
        BackendError: If it is not positive.
    """
    if group_size is not None and group_size < 1:
        raise BackendError(f"group size {group_size} is not positive; {default} is the default")
    return default if group_size is None else group_size
