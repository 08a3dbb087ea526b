"""Min-max quantization by the library optimum-quanto, which the paper walks with."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor, nn

from coopq.core.errors import BackendError, one_line
from coopq.core.types import Width
from coopq.core.versions import check_version
from coopq.quantizers.backend import Affine, AffineForm, Packed, WeightQuantizer

_TRIED = "0.2.7"
"""Version of optimum-quanto whose private parts are in use: the names of saved tensors ("_data", "_scale", "_shift"),
`unpack`, `weight_group_size`, and the folder in which torch builds the library's CPU kernels."""


class QuantoBackend(WeightQuantizer):
    """quanto's weights: affine in groups for 2 and 4 bits, symmetric by rows for 8 bits.

    The library chooses the group size of each layer: 128, or the next smaller multiple of 32 that divides the row, or
    the whole row. It keeps scales in the dtype of the weights. For float32 weights this backend rounds scales to
    float16 before it rounds codes, so scales take half the bytes.
    """

    name: ClassVar[str] = "quanto"
    bits: ClassVar[tuple[Width, ...]] = (2, 4, 8)
    is_affine = True

    def __init__(self) -> None:
        try:
            from optimum import quanto
        except ImportError as error:
            raise BackendError(
                f"backend 'quanto' needs the package optimum-quanto ({error}); run: pip install 'coopq[quanto]'"
            ) from error
        check_version("optimum-quanto", _TRIED, "backend 'quanto'")
        self._quanto = quanto
        _build_extension()

    @property
    def version(self) -> str:
        """Version of optimum-quanto."""
        return version("optimum-quanto")

    @property
    def settings(self) -> dict[str, Any]:
        """The library's rule for the group size."""
        return {"group_size": "auto"}

    def quantize(self, weight: Tensor, bits: Width) -> Packed:
        """See `WeightQuantizer.quantize`."""
        qtype, group_size = self._qtype(bits), self._group_size((weight.shape[0], weight.shape[1]), bits)
        stored = weight.dtype if weight.dtype.itemsize == 2 else torch.float16
        shift = None
        if bits == 8:
            scale = self._quanto.AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
        else:
            scale, shift = self._quanto.MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=group_size)
            shift = shift.to(stored).to(weight.dtype)
        quantized = self._quanto.quantize_weight(
            weight,
            qtype=qtype,
            axis=0,
            scale=scale.to(stored).to(weight.dtype),
            shift=shift,
            group_size=group_size,
            optimized=False,
        )
        tensors: dict[str, Tensor] = {}
        quantized.save_to_state_dict(tensors, "weight.", keep_vars=False)
        return {name: t.to(stored) if t.is_floating_point() else t for name, t in tensors.items()}

    def dequantize(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Tensor:
        """See `Backend.dequantize`."""
        return self._weight(packed, shape, bits, dtype).dequantize()

    def affine(self, packed: Packed, shape: tuple[int, int], bits: Width) -> Affine:
        """See `Backend.affine`."""
        by_row = (shape[0], -1, 1)
        scales = packed["weight._scale"].view(by_row)
        if bits == 8:  # signed codes, and a row is a group
            codes = packed["weight._data"].short() + 128
            return Affine(codes.to(torch.uint8).unsqueeze(1), torch.full_like(scales, 128, dtype=torch.uint8), scales)
        codes = self._weight(packed, shape, bits, torch.float32)._data.unpack().reshape(*scales.shape[:2], -1)
        # The library stores zero points times scales.
        return Affine(codes, packed["weight._shift"].view(by_row).float() / scales.float(), scales)

    def affine_form(self, shape: tuple[int, int], bits: Width) -> AffineForm:
        """See `Backend.affine_form`."""
        if bits == 8:
            return AffineForm(shape[1], torch.uint8, symmetric=True)
        return AffineForm(self._group_size(shape, bits) or shape[1], torch.float32, symmetric=False)

    def linear(
        self, packed: Packed, shape: tuple[int, int], bits: Width, bias: Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """See `Backend.linear`."""
        layer = self._layer(shape, bits, dtype, bias is not None)
        layer.input_scale = torch.ones((), dtype=dtype, device=packed["weight._scale"].device)
        layer.output_scale = torch.ones_like(layer.input_scale)
        layer.weight = nn.Parameter(self._weight(packed, shape, bits, dtype), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    def storage_bytes(self, shape: tuple[int, int], bits: Width) -> int:
        """See `Backend.storage_bytes`."""
        rows, columns = shape
        if bits == 8:
            return rows * columns + 2 * rows
        group_size = self._group_size(shape, bits) or columns
        groups = rows * columns // group_size
        per_byte = 8 // int(bits)
        # The library packs along the first axis: whole bytes of `per_byte` groups each.
        return -(-groups // per_byte) * group_size + 4 * groups

    def _weight(self, packed: Packed, shape: tuple[int, int], bits: Width, dtype: torch.dtype) -> Any:
        """The library's tensor. Its class depends on no kernel, so every device computes with the same weights."""
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in packed.items()}
        common = {"qtype": self._qtype(bits), "axis": 0, "size": torch.Size(shape), "stride": (shape[1], 1)}
        if bits == 8:
            return self._quanto.WeightQBytesTensor.load_from_state_dict(
                tensors, "weight.", **common, activation_qtype=None, missing_keys=[]
            )
        return self._quanto.WeightQBitsTensor.load_from_state_dict(
            tensors, "weight.", **common, group_size=self._group_size(shape, bits), missing_keys=[]
        )

    def _layer(self, shape: tuple[int, int], bits: Width, dtype: torch.dtype, bias: bool) -> Any:
        """The library's linear layer, without storage."""
        return self._quanto.QLinear(
            shape[1], shape[0], bias=bias, dtype=dtype, device="meta", weights=self._qtype(bits)
        )

    def _group_size(self, shape: tuple[int, int], bits: Width) -> int | None:
        """The group size that the library's linear layer chooses for this shape; None for whole rows."""
        group_size: int | None = self._layer(shape, bits, torch.float32, False).weight_group_size
        return group_size

    def _qtype(self, bits: Width) -> Any:
        return self._quanto.qtypes[f"qint{int(bits)}"]


def _build_extension() -> None:
    """Let the library compile its CPU kernels now, once per installation, and not in the first forward pass."""
    from optimum.quanto.library.extensions.cpp import ext

    folder = Path(ext.build_directory)
    with _ninja_on_path():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".coopq.lock")):
                # A process that was killed while compiling leaves torch's lock behind, and torch waits for it forever.
                (folder / "lock").unlink(missing_ok=True)
                _ = ext.lib
        except (OSError, RuntimeError, ImportError) as error:
            raise BackendError(
                f"backend 'quanto' could not compile its CPU kernels ({one_line(error)}); "
                "install a C++ compiler (g++) and the package ninja, or choose another backend"
            ) from error


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Put ninja on PATH, where torch looks for it: pip installs ninja beside Python, which may not be on PATH."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
