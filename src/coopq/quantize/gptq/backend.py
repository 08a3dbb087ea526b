"""GPTQ (Frantar et al., 2023) by the library GPTQModel, which runs in a process of its own."""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from coopq.quantize.backend import Affine, AffineForm, Backend, Packed, PackedLinear, check_group_size
from coopq.quantize.gptq.subprocess_job import DONE, working
from coopq.core.errors import BackendError
from coopq.model.players import find_players
from coopq.model.safetensors_io import load_tensors
from coopq.core.types import UNTOUCHED, Width

_DEFAULT_GROUP_SIZE = 128
_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_WORD = 32
"""Bits of the words that codes are packed into."""
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORKER = "coopq.quantize.gptq.worker"


class GPTQBackend(Backend):
    """Second-order rounding with Hessians of the calibration tokens.

    A layer's result depends on the layers before it, which are quantized when its inputs are taken. The bank's
    weights at a width are those of the model with every player at that width; a saved mixed model is quantized anew,
    with its own mixed inputs, so its loss differs from the bank's.

    Args:
        group_size: Weights along a row that share a scale.
        act_order: Quantize columns by decreasing Hessian diagonal (the library's `desc_act`).
        symmetric: Zero points in the middle of the range (the library's `sym`).
    """

    name: ClassVar[str] = "gptq"
    bits: ClassVar[tuple[Width, ...]] = (2, 4, 8)
    whole_model: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    only_plain: ClassVar[bool] = True
    weights_file: ClassVar[str] = "model.safetensors"
    package: ClassVar[str] = "gptqmodel"
    extra: ClassVar[str] = "gptq"

    def __init__(self, group_size: int | None = None, *, act_order: bool = False, symmetric: bool = True) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise BackendError(
                f"backend {self.name!r} needs the package {self.package}; run: pip install 'coopq[{self.extra}]'"
            )
        self.group_size = check_group_size(group_size, _DEFAULT_GROUP_SIZE)
        if self.group_size not in _GROUP_SIZES:
            raise BackendError(
                f"GPTQModel's layers take no group size {group_size}; choose from {', '.join(map(str, _GROUP_SIZES))}"
            )
        self.act_order = act_order
        self.is_affine = not act_order  # which puts groups out of order
        self.symmetric = symmetric

    @property
    def version(self) -> str:
        """Version of GPTQModel."""
        return version("gptqmodel")

    @property
    def settings(self) -> dict[str, Any]:
        """Group size, act-order and symmetry."""
        return {"group_size": self.group_size, "act_order": self.act_order, "symmetric": self.symmetric}

    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """Not to be had: see `quantize_model`."""
        raise BackendError(f"backend {self.name!r} quantizes whole models, not single weights")

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`.

        Raises:
            BackendError: If the library fails, with its last words.
        """
        every = [linear.name for player in find_players(model) for linear in player.linears]
        settings = self._quantize_config({name: bits.get(name, UNTOUCHED) for name in every})
        tensors: dict[str, Tensor] = {}
        with working("GPTQModel", _WORKER, model, tokenizer, tokens, {"settings": settings}) as made:
            for file in sorted(made(DONE).parent.glob("*.safetensors")):
                tensors |= load_tensors(file, model.device.type, way_out="run the same command again")
        for name in bits:
            if f"{name}.qweight" not in tensors:
                raise BackendError(f"GPTQModel left {name} unquantized; choose another backend for this model")
            yield name, {part: tensors[f"{name}.{part}"] for part in _PARTS}

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        codes, zeros = self.codes(packed, shape, bits)
        group = packed["g_idx"].long()
        weight = packed["scales"].float()[group] * (codes - zeros[group]).float()
        return weight.T.to(dtype).contiguous()

    def codes(self, packed: Packed, shape: tuple[int, int], bits: Width) -> tuple[Tensor, Tensor]:
        """Integers of a weight of shape (out, in): its codes, shape (in, out), and zero points, shape (groups, out)."""
        codes = _unpack(packed["qweight"].T, bits).T[: shape[1]]
        # The format stores zero points less one.
        return codes, (_unpack(packed["qzeros"], bits)[:, : shape[0]] + 1) & (2**bits - 1)

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`."""
        codes, zeros = self.codes(packed, shape, bits)
        groups = codes.T.reshape(shape[0], -1, self.group_size)
        return Affine(groups.to(torch.uint8), zeros.T.unsqueeze(-1).to(torch.uint8), packed["scales"].T.unsqueeze(-1))

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """See `Backend.affine_form`."""
        return AffineForm(self.group_size, torch.uint8, self.symmetric)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

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
        return {**form, **self._quantize_config(bits)}

    def _quantize_config(self, bits: Mapping[str, Width]) -> dict[str, Any]:
        """The library's configuration: the commonest width, and a rule for each module of another one, or of none."""
        (common, _), *_ = Counter(width for width in bits.values() if width != UNTOUCHED).most_common()
        rules: dict[str, dict[str, Width]] = {}
        for name, width in bits.items():
            if width != common:
                whether, settings = ("-", {}) if width == UNTOUCHED else ("+", {"bits": width})
                rules[f"{whether}:^{re.escape(name)}$"] = settings
        return {
            "bits": common,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            **({"dynamic": rules} if rules else {}),
        }


class GPTQStatic(GPTQBackend):
    """The same with inputs as the full-precision model has them, so that a layer's weights depend on nothing else.

    What is measured is then what is saved, and Hessians are collected once for all widths.
    """

    name: ClassVar[str] = "gptq-static"
    whole_model: ClassVar[bool] = False

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`."""
        layers = {width: [name for name in bits if bits[name] == width] for width in set(bits.values())}
        packed = {name: of for _, name, of in self.quantize_widths(model, tokenizer, layers, tokens)}
        for name in bits:
            yield name, packed[name]

    def quantize_widths(
        self, model: Any, tokenizer: Any, layers: Mapping[Width, Sequence[str]], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `Backend.quantize_widths`.

        Raises:
            BackendError: If the library fails, with its last words.
        """
        order = dict.fromkeys(chain.from_iterable(layers.values()))
        settings = {"group_size": self.group_size, "desc_act": self.act_order, "sym": self.symmetric}
        job = {"layers": {str(width): list(names) for width, names in layers.items()}, "settings": settings}
        with working("GPTQModel", _WORKER, model, tokenizer, tokens, job) as made:
            for name in order:  # as they are made: whoever keeps them loses nothing
                for width in (width for width, names in layers.items() if name in names):
                    file = made(f"{name}-{width}.safetensors")
                    solved = load_tensors(file, model.device.type, way_out="run the same command again")
                    file.unlink()
                    yield width, name, packed_form(solved, width)


def packed_form(solved: Packed, bits: Width) -> Packed:
    """GPTQ's tensors of a weight that is solved: "weight", (out, in), with "scales" and "zeros", (out, groups)."""
    group, scales = solved["g_idx"].long(), solved["scales"].float()
    zeros = solved["zeros"].round().int()
    codes = (solved["weight"].float() / scales[:, group] + zeros[:, group]).round().int().clamp(0, 2**bits - 1)
    return {
        "qweight": _pack(codes, int(bits)).T.contiguous(),
        "qzeros": _pack((zeros.T - 1) & (2 ** int(bits) - 1), int(bits)),
        "scales": scales.T.half().contiguous(),
        "g_idx": solved["g_idx"].int(),
    }


def _pack(codes: Tensor, bits: int) -> Tensor:
    """int32 words of codes along the last axis, the first code lowest; shape (..., ceil(n * bits / 32))."""
    per_word = _WORD // bits
    padded = functional.pad(codes, (0, -codes.shape[-1] % per_word)).long().unflatten(-1, (-1, per_word))
    words = (padded << torch.arange(0, _WORD, bits, device=codes.device)).sum(dim=-1)
    return words.to(torch.int32)  # the highest bit becomes the sign


def _unpack(words: Tensor, bits: Width) -> Tensor:
    """Codes of int32 words along the last axis, the first code lowest; int64, shape (..., n_words * 32 / bits)."""
    shifts = torch.arange(0, _WORD, bits, device=words.device)
    return ((words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
