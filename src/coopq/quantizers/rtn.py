"""Round to nearest in groups, asymmetric min-max: the reference backend, in plain torch."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from coopq.core.types import Width
from coopq.quantizers.backend import Affine, AffineForm, Packed, WeightQuantizer, check_group_size
from coopq.quantizers.packed_modules import PackedLinear

_DEFAULT_GROUP_SIZE = 64
_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16. As the smallest scale it prevents a division by zero in groups of tiny weights."""


class RTNBackend(WeightQuantizer):
    """Groups along a row share a float16 scale and a zero point of the weight's own width.

    The range of a group includes 0, so that 0 is exact. If the row length is not a multiple of the group size, the row
    is padded with zeros, which do not change any range.

    Args:
        group_size: Weights that share a scale; None is 64.
    """

    name: ClassVar[str] = "rtn"
    bits: ClassVar[tuple[Width, ...]] = (2, 3, 4, 8)
    is_affine = True

    def __init__(self, group_size: int | None = None) -> None:
        self.group_size = check_group_size(group_size, _DEFAULT_GROUP_SIZE)

    @property
    def version(self) -> str:
        """Version of this implementation; it changes when the same weight would give other codes."""
        return "1"

    @property
    def settings(self) -> dict[str, Any]:
        """The group size."""
        return {"group_size": self.group_size}

    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """See `WeightQuantizer.quantize`."""
        rows, columns = weight.shape
        padding = -columns % self.group_size
        groups = functional.pad(weight.float(), (0, padding)).reshape(rows, -1, self.group_size)
        levels = 2**bits - 1
        low = groups.amin(-1, keepdim=True).clamp(max=0)
        high = groups.amax(-1, keepdim=True).clamp(min=0)
        # Codes are computed with the scale in its stored precision.
        scale = ((high - low) / levels).half().clamp(min=_SMALLEST_SCALE)
        zero = (-low / scale.float()).round().clamp(0, levels)
        codes = ((groups / scale.float()).round() + zero).clamp(0, levels)
        return {
            "weight_codes": pack_bits(codes.to(torch.uint8), int(bits)),
            "weight_scale": scale.squeeze(-1),
            "weight_zero": pack_bits(zero.to(torch.uint8), int(bits)),
        }

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        affine = self.affine(packed, shape, bits)
        groups = affine.codes.float().sub_(affine.zeros.float()).mul_(affine.scales.float())
        return groups.reshape(shape[0], -1)[:, : shape[1]].to(dtype).contiguous()

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`; padded rows are allowed."""
        scales = packed["weight_scale"].unsqueeze(-1)
        zeros = unpack_bits(packed["weight_zero"], int(bits), scales.numel()).reshape(scales.shape)
        codes = unpack_bits(packed["weight_codes"], int(bits), scales.numel() * self.group_size)
        return Affine(codes.reshape(*scales.shape[:2], self.group_size), zeros, scales)

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """See `Backend.affine_form`."""
        return AffineForm(self.group_size, torch.uint8, symmetric=False)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        n_groups = shape[0] * -(-shape[1] // self.group_size)
        return _packed_bytes(n_groups * self.group_size, int(bits)) + 2 * n_groups + _packed_bytes(n_groups, int(bits))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits without gaps: 8 codes into `bits` bytes, the first code lowest.

    Args:
        codes: uint8, any shape, each below 2**bits.
        bits: 1 to 8.
    Returns:
        uint8, shape (ceil(n / 8) * bits,).
    """
    flat = codes.flatten()
    octets = functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    words = torch.zeros(len(octets), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= octets[:, i].long() << (bits * i)
    return torch.stack([(words >> (8 * j) & 255).to(torch.uint8) for j in range(bits)], dim=1).flatten()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of the bytes that `pack_bits` returned, uint8, shape (n,)."""
    n_bytes = bits // math.gcd(bits, 8)  # the fewest bytes that hold whole codes
    dtype = torch.uint8 if n_bytes == 1 else torch.int32 if n_bytes < 4 else torch.int64
    columns = packed.reshape(-1, n_bytes)
    words = columns[:, 0].to(dtype)
    for j in range(1, n_bytes):
        words = words | columns[:, j].to(dtype) << (8 * j)
    codes = [(words >> i & (2**bits - 1)).to(torch.uint8) for i in range(0, 8 * n_bytes, bits)]
    return torch.stack(codes, dim=1).flatten()[:n]


def _packed_bytes(n: int, bits: int) -> int:
    return -(-n // 8) * bits
