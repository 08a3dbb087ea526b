"""GPTQ (Frantar et al., 2023) by the library GPTQModel, which runs in a process of its own."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from coopq.core.errors import BackendError
from coopq.core.types import UNTOUCHED, ProgressCallback, Width, silent
from coopq.core.versions import check_version
from coopq.model.players import linear_layers
from coopq.model.safetensors_io import load_tensors
from coopq.quantizers.backend import Affine, AffineForm, ModelQuantizer, Packed, require_library
from coopq.quantizers.gptq.format import PACKING, PARTS, GPTQFormat, pack_weight
from coopq.quantizers.gptq.subprocess_job import DONE, running_job
from coopq.quantizers.packed_modules import PackedLinear

_TRIED = "7.6"
"""Version of GPTQModel whose private parts `coopq.quantizers.gptq.worker` uses."""
_WORKER = "coopq.quantizers.gptq.worker"


class GPTQTensors(ModelQuantizer):
    """What the backends that make GPTQ's tensors share: a `GPTQFormat` answers everything about packed tensors."""

    bits: ClassVar[tuple[Width, ...]] = (2, 4, 8)
    weights_file: ClassVar[str] = "model.safetensors"
    format: GPTQFormat

    def __init__(self, tensor_format: GPTQFormat) -> None:
        self.format = tensor_format
        self.is_affine = tensor_format.is_affine

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        return self.format.dequantize(packed, shape, bits, dtype)

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`."""
        return self.format.affine(packed, shape, bits)

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """See `Backend.affine_form`."""
        return self.format.affine_form()

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        return PackedLinear(self, packed, shape, bits, bias, dtype)

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        return self.format.storage_bytes(shape, bits)

    def native_config(self, bits: Mapping[str, Width]) -> dict[str, Any] | None:
        """See `Backend.native_config`."""
        return self.format.native_config(bits)


class _ByGPTQModel(GPTQTensors):
    """GPTQ by GPTQModel: second-order rounding with Hessians of the tokens that weights are fitted to.

    Args:
        group_size: Weights along a row that share a scale; None is 128.
        act_order: Quantize columns by decreasing Hessian diagonal (GPTQModel's `desc_act`).
        symmetric: Zero points in the middle of the range (GPTQModel's `sym`).
    """

    def __init__(self, group_size: int | None = None, *, act_order: bool = False, symmetric: bool = True) -> None:
        require_library(self.name, "gptqmodel", "gptq")
        super().__init__(GPTQFormat.make(group_size, act_order, symmetric))

    @property
    def version(self) -> str:
        """Version of GPTQModel."""
        return version("gptqmodel")

    @property
    def settings(self) -> dict[str, Any]:
        """Group size, act-order and symmetry."""
        form = self.format
        return {"group_size": form.group_size, "act_order": form.act_order, "symmetric": form.symmetric}


class GPTQBackend(_ByGPTQModel):
    """GPTQ in which each layer is fitted to inputs that the quantized layers before it make.

    So a layer's weights depend on the widths of the layers before it. The bank's weights at a width come from the model
    with every player at that width. A saved mixed model is quantized anew, with mixed inputs, and the loss of the saved
    model differs from the loss of the bank's weights.

    Args: as for `_ByGPTQModel`.
    """

    name: ClassVar[str] = "gptq"
    shortest_sequence: ClassVar[int] = 11  # GPTQModel drops sequences of up to 10 tokens
    whole_model: ClassVar[bool] = True

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`.

        Raises:
            BackendError: If GPTQModel fails, with the last line that it printed.
        """
        widths = {layer.name: bits.get(layer.name, UNTOUCHED) for layer in linear_layers(model, routers=True)}
        job = {"settings": self.format.quantize_config(widths)}
        tensors: dict[str, Tensor] = {}
        with running_job("GPTQModel", _WORKER, model, tokenizer, tokens, job) as wait_for:
            for file in sorted(wait_for(DONE).parent.glob("*.safetensors")):
                tensors |= load_tensors(file, str(model.device), way_out="run the same command again")
        for name in bits:
            if f"{name}.qweight" not in tensors:
                raise BackendError(f"GPTQModel left {name} unquantized; choose another backend for this model")
            yield name, {part: tensors[f"{name}.{part}"] for part in PARTS}


class GPTQStatic(_ByGPTQModel):
    """GPTQ in which each layer is fitted to inputs that the full-precision model makes.

    So a layer's weights depend on no other layer: the weights that are measured are the weights that are saved, and
    Hessians are collected once for all widths.

    Args: as for `_ByGPTQModel`.
    """

    name: ClassVar[str] = "gptq-static"

    @property
    def settings(self) -> dict[str, Any]:
        """See `GPTQBackend.settings`; and the version of the packing, which is coopq's own here."""
        return {**super().settings, "packing": PACKING}

    def quantize_model(
        self, model: Any, tokenizer: Any, bits: Mapping[str, Width], tokens: npt.NDArray[np.int64] | None
    ) -> Iterator[tuple[str, Packed]]:
        """See `Backend.quantize_model`."""
        layers = {width: [name for name in bits if bits[name] == width] for width in set(bits.values())}
        made = {name: packed for _, name, packed in self.quantize_widths(model, tokenizer, layers, tokens)}
        for name in bits:
            yield name, made[name]

    def quantize_widths(
        self,
        model: Any,
        tokenizer: Any,
        layers: Mapping[Width, Sequence[str]],
        tokens: npt.NDArray[np.int64] | None,
        progress: ProgressCallback = silent,
    ) -> Iterator[tuple[Width, str, Packed]]:
        """See `Backend.quantize_widths`.

        Raises:
            BackendError: If GPTQModel fails, with the last line that it printed.
        """
        check_version("gptqmodel", _TRIED, f"backend {self.name!r}")
        order = dict.fromkeys(chain.from_iterable(layers.values()))
        job = {
            "layers": {str(width): list(names) for width, names in layers.items()},
            "settings": self.format.common_config(),
        }
        with running_job("GPTQModel", _WORKER, model, tokenizer, tokens, job) as wait_for:
            for name in order:  # in the worker's order, so that an interrupted run keeps every layer that was made
                for width in (width for width, names in layers.items() if name in names):
                    file = wait_for(f"{name}-{width}.safetensors")
                    solved = load_tensors(file, str(model.device), way_out="run the same command again")
                    file.unlink()
                    yield width, name, pack_weight(solved, width)
