"""Half-quadratic quantization by the library hqq (Badri and Shaji, 2023)."""

from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coopq.core.errors import BackendError
from coopq.core.types import Width
from coopq.core.versions import check_version
from coopq.quantizers.backend import Affine, AffineForm, Packed, WeightQuantizer, check_group_size
from coopq.quantizers.packed_modules import PackedLinear

_TRIED = "0.2.8"
"""Version of hqq whose private parts are in use: its quantizer and the quantizer's tables of packings."""
_DEFAULT_GROUP_SIZE = 64
_AXIS = 1
"""Groups lie along a row, which the library's fast kernels need."""
_PER_BYTE = {2: 4, 4: 2, 8: 1}
"""Codes in a byte, by width."""
_PER_INT32 = 10
"""3-bit codes in an int32."""


class HQQBackend(WeightQuantizer):
    """hqq's quantizer, fitted to no tokens.

    The library quantizes in float32. Scales and zeros are stored in float16: at 8 bits, zeros near 127 would lose
    precision in bfloat16.

    Args:
        group_size: Weights that share a scale, a multiple of 8; None is 64.
    """

    name: ClassVar[str] = "hqq"
    bits: ClassVar[tuple[Width, ...]] = (2, 3, 4, 8)
    is_affine = True

    def __init__(self, group_size: int | None = None) -> None:
        try:
            from hqq.core.quantize import Quantizer
        except ImportError as error:
            raise BackendError(
                f"backend 'hqq' needs the package hqq ({error}); run: pip install 'coopq[hqq]'"
            ) from error
        check_version("hqq", _TRIED, "backend 'hqq'")
        self._quantizer = Quantizer
        self.group_size = check_group_size(group_size, _DEFAULT_GROUP_SIZE)
        if self.group_size % 8:
            raise BackendError(f"backend 'hqq' needs a group size that is a multiple of 8, and {group_size} is not")

    @property
    def version(self) -> str:
        """Version of hqq."""
        return version("hqq")

    @property
    def settings(self) -> dict[str, Any]:
        """Group size and axis."""
        return {"group_size": self.group_size, "axis": _AXIS}

    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """See `WeightQuantizer.quantize`."""
        codes, meta = self._quantizer.quantize(
            weight.float(), nbits=bits, group_size=self.group_size, axis=_AXIS, device=str(weight.device)
        )
        return {"W_q": codes, "scale": meta["scale"].half(), "zero": meta["zero"].half()}

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        weight = self._codes(packed, shape, bits).float().sub_(packed["zero"].float()).mul_(packed["scale"].float())
        return weight.reshape(shape).to(dtype)

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`."""
        by_row = (shape[0], -1, 1)
        codes = self._codes(packed, shape, bits).reshape(shape[0], -1, self.group_size)
        return Affine(codes, packed["zero"].view(by_row), packed["scale"].view(by_row))

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """See `Backend.affine_form`."""
        return AffineForm(self.group_size, torch.float16, symmetric=False)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        groups, rest = divmod(shape[0] * shape[1], self.group_size)
        if rest or (bits != 3 and groups % _PER_BYTE[int(bits)]):
            raise BackendError(
                f"backend 'hqq' cannot pack a weight of shape {shape} in groups of {self.group_size} at {bits} bits; "
                "choose a group size that divides it"
            )
        if bits == 3:
            codes = -(-groups // _PER_INT32) * self.group_size * 4
        else:
            codes = groups // _PER_BYTE[int(bits)] * self.group_size
        return codes + 4 * groups

    def _codes(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Tensor:
        """The codes of a packed weight, uint8, shape (n_groups, group_size); a group may go on in the next row."""
        unpack = self._quantizer.unpack[self._quantizer.bit_to_packing[bits]]
        codes: Tensor = unpack(packed["W_q"], dtype=torch.uint8)
        return codes[: shape[0] * shape[1] // self.group_size]  # codes of 3 bits are padded
