"""GPTQ's tensor format: integers in groups along the rows, packed into int32 words."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from coopq.core.errors import BackendError
from coopq.core.types import UNTOUCHED, Width
from coopq.quantizers.backend import Affine, AffineForm, Packed, check_group_size

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of the tensors of a weight."""
_DEFAULT_GROUP_SIZE = 128
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
"""Group sizes that GPTQModel's layers take."""
_WORD = 32
"""Bits of the words that codes are packed into."""
PACKING = 1
"""Version of `pack_weight`; raise it when it would make other tensors of the same weight."""


@dataclass(frozen=True)
class GPTQFormat:
    """How GPTQ's tensors store a weight; see `PARTS`.

    Attributes:
        group_size: Weights along a row that share a scale.
        act_order: Whether columns were quantized by decreasing Hessian diagonal, which puts groups out of order.
        symmetric: Whether zero points are in the middle of the range.
    """

    group_size: int
    act_order: bool
    symmetric: bool

    @classmethod
    def make(cls, group_size: int | None, act_order: bool, symmetric: bool) -> "GPTQFormat":
        """The format with a group size that GPTQModel takes; None is the default, 128.

        Raises:
            BackendError: If GPTQModel does not take the group size.
        """
        chosen = check_group_size(group_size, _DEFAULT_GROUP_SIZE)
        if chosen not in _GROUP_SIZES:
            raise BackendError(
                f"GPTQModel's layers take no group size {group_size}; choose from {', '.join(map(str, _GROUP_SIZES))}"
            )
        return cls(chosen, act_order, symmetric)

    @property
    def is_affine(self) -> bool:
        """Whether `affine` gives the integers: groups have to be in order."""
        return not self.act_order

    def codes(self, packed: Packed, shape: tuple[int, int], bits: Width) -> tuple[Tensor, Tensor]:
        """Integers of a weight of shape (out, in), uint8: codes, shape (out, in), and zero points, (out, groups)."""
        codes = _unpack(packed["qweight"].T, bits)[:, : shape[1]]
        # The format stores zero points less one.
        return codes, (_unpack(packed["qzeros"], bits)[:, : shape[0]] + 1 & (2 ** int(bits) - 1)).T

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        codes, zeros = self.codes(packed, shape, bits)
        group, scales = packed["g_idx"].long(), packed["scales"].T.float()
        weight = codes.float().sub_(zeros.float().index_select(1, group)).mul_(scales.index_select(1, group))
        return weight.to(dtype).contiguous()

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`."""
        codes, zeros = self.codes(packed, shape, bits)
        groups = codes.reshape(shape[0], -1, self.group_size)
        return Affine(groups, zeros.unsqueeze(-1), packed["scales"].T.unsqueeze(-1))

    def affine_form(self) -> AffineForm:
        """See `Backend.affine_form`; all weights have the same form."""
        return AffineForm(self.group_size, torch.uint8, self.symmetric)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        rows, columns = shape
        groups = -(-columns // self.group_size)
        words = -(-columns * int(bits) // _WORD) * rows + groups * -(-rows * int(bits) // _WORD)
        return 4 * words + 2 * groups * rows + 4 * columns

    def native_config(self, bits: Mapping[str, Width]) -> dict[str, Any] | None:
        """See `Backend.native_config`."""
        if set(bits.values()) == {UNTOUCHED}:
            return None
        form = {"quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False}
        return {**form, **self.quantize_config(bits)}

    def quantize_config(self, bits: Mapping[str, Width]) -> dict[str, Any]:
        """GPTQModel's configuration: the most common width, and a rule for each layer of another width or of none.

        Args:
            bits: Width of each linear layer by name; one layer at least is quantized.
        """
        (common, _), *_ = Counter(width for width in bits.values() if width != UNTOUCHED).most_common()
        rules: dict[str, dict[str, Width]] = {}
        for name, width in bits.items():
            if width == UNTOUCHED:
                rules[f"-:^{re.escape(name)}$"] = {}
            elif width != common:
                rules[f"+:^{re.escape(name)}$"] = {"bits": width}
        return {"bits": common, **self.common_config(), **({"dynamic": rules} if rules else {})}

    def common_config(self) -> dict[str, Any]:
        """What GPTQModel's configuration says about all layers, in GPTQModel's words."""
        return {"group_size": self.group_size, "desc_act": self.act_order, "sym": self.symmetric}


def pack_weight(solved: Mapping[str, Tensor], bits: Width) -> Packed:
    """GPTQ's tensors of a weight that a library has quantized.

    Args:
        solved: "weight", the dequantized weight, shape (out, in); "scales" and "zeros", shape (out, groups); "g_idx",
            the group of each column, shape (in,).
        bits: Width of the weight.
    """
    group, scales = solved["g_idx"].long(), solved["scales"].float()
    zeros = solved["zeros"].round().int()
    codes = (solved["weight"].float() / scales[:, group] + zeros[:, group]).round().int().clamp(0, 2**bits - 1)
    return {
        "qweight": pack_codes(codes, int(bits)).T.contiguous(),
        "qzeros": pack_codes((zeros.T - 1) & (2 ** int(bits) - 1), int(bits)),
        "scales": scales.T.half().contiguous(),
        "g_idx": solved["g_idx"].int(),
    }


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int32 words of codes along the last axis, the first code lowest; shape (..., ceil(n * bits / 32))."""
    per_word = _WORD // bits
    padded = functional.pad(codes, (0, -codes.shape[-1] % per_word)).long().unflatten(-1, (-1, per_word))
    words = (padded << torch.arange(0, _WORD, bits, device=codes.device)).sum(dim=-1)
    return words.to(torch.int32)  # the highest bit becomes the sign


def _unpack(words: Tensor, bits: Width) -> Tensor:
    """Codes of int32 words along the last axis, the first code lowest; uint8, shape (..., n_words * 32 / bits)."""
    octets = words.contiguous().view(torch.uint8)  # the lowest byte is the first: coopq runs on no other machines
    codes = [octets >> shift & (2 ** int(bits) - 1) for shift in range(0, 8, int(bits))]
    return torch.stack(codes, dim=-1).flatten(-2)
