"""Folders for mlx-lm: integers in groups along the rows, each weight code * scale + bias.

The codes are the backend's. Scales and biases have the checkpoint's dtype, because mlx computes in the widest dtype
that a layer holds. In float32 the weights are exactly the backend's. In 16 bits a bias is rounded to the dtype, and in
bfloat16 a scale is too.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coopq.core.errors import ExportError
from coopq.core.files import read_json, write_json
from coopq.core.sizes import Sizes
from coopq.core.specs import Request
from coopq.core.types import UNTOUCHED, Losses, Player, Width
from coopq.export.folders.hf_folder import WEIGHTS, HFFolder, commonest_width
from coopq.export.folders.mlx_process import is_installed, mlx_losses
from coopq.export.folders.stored_tensors import saved_config
from coopq.model.load import checkpoint_dtype
from coopq.model.matrices import matrix_of
from coopq.model.safetensors_io import save_zeros
from coopq.quantizers.backend import Affine, Backend, Packed
from coopq.quantizers.rtn import pack_bits

_GROUP_SIZES = (128, 64, 32)
"""Group sizes that mlx has kernels for."""


class MLX(HFFolder):
    """The form "mlx"."""

    name: ClassVar[str] = "mlx"
    engine: ClassVar[str] = "mlx"

    def check(self, backend: Backend) -> None:
        """See `Form.check`."""
        group_size = backend.settings.get("group_size")
        if not backend.is_affine or not isinstance(group_size, int) or group_size % _GROUP_SIZES[-1]:
            raise ExportError(
                f"{self.name} holds integers in groups of 32, 64 or 128 along the rows, and not what backend "
                f"{backend.name!r} makes with {backend.settings}; search with --backend rtn, hqq, autoround, or gptq "
                "--no-act-order, and a --group-size that is a multiple of 32"
            )

    def require_engine(self) -> None:
        """See `Form.require_engine`: mlx-lm writes its models down anew, so only what mlx-lm loads is written."""
        if not is_installed():
            raise ExportError(f"{self.name} needs the package mlx-lm; run: pip install 'coopq[mlx]'")

    def check_layers(self, model: Any, widths: Mapping[str, Width]) -> None:
        """See `HFFolder.check_layers`: the matrix of a layer has to be the layer's own, with a row for each output."""
        for name in widths:
            matrix = matrix_of(model, name)
            if matrix.n_experts or matrix.transposed:
                raise ExportError(
                    f"{name} of {type(model).__name__} holds its experts in one tensor, or its inputs before its "
                    f"outputs, and {self.name} holds neither; choose another engine (--for), or another form (--to)"
                )

    def layout(self, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `HFFolder.layout`."""
        rows, columns = shape
        by_group = torch.empty(rows, columns // _group_size(backend), dtype=dtype, device="meta")
        weight = torch.empty(rows, columns * bits // 32, dtype=torch.uint32, device="meta")
        return {"weight": weight, "scales": by_group, "biases": by_group}

    def pack(
        self, packed: Packed, shape: tuple[int, int], bits: int, backend: Backend, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `HFFolder.pack`."""
        return pack_affine(backend.affine(packed, shape, bits), bits, _group_size(backend), dtype)

    def config_entries(
        self, config: Mapping[str, Any], widths: Mapping[str, Width], backend: Backend
    ) -> Mapping[str, Any]:
        """See `HFFolder.config_entries`: the width of each module, twice, as mlx-lm itself writes it."""
        group_size = _group_size(backend)
        quantization = {
            "group_size": group_size,
            "bits": commonest_width(widths),
            **{
                name: bits != UNTOUCHED and {"group_size": group_size, "bits": bits}  # false leaves a module as it is
                for name, bits in widths.items()
            },
        }
        return {**_rotary_entries(config), "quantization": quantization, "quantization_config": quantization}

    def player_sizes(
        self, packed: Sizes, request: Request, skeleton: Any, players: Sequence[Player], backend: Backend
    ) -> Sizes:
        """See `HFFolder.player_sizes`; mlx-lm, if it is here, loads the folder with zeros for weights.

        Raises:
            ExportError: If mlx-lm has no such architecture, or other tensors in it.
        """
        sizes = super().player_sizes(packed, request, skeleton, players, backend)
        if is_installed():
            widest = request.widths.quantized[-1]
            widths = {linear.name: widest for player in players for linear in player.linears}
            dtype = checkpoint_dtype(request.model.source)
            with tempfile.TemporaryDirectory(prefix="coopq-") as place:
                folder = Path(place)
                saved_config(skeleton, dtype).save_pretrained(folder)
                config = read_json(folder / "config.json")
                write_json(folder / "config.json", {**config, **self.config_entries(config, widths, backend)})
                save_zeros(self.expected(skeleton, dtype, widths, backend), folder / WEIGHTS)
                mlx_losses(folder, None)
        return sizes

    def rounds_to(self, measured: torch.dtype, checkpoint: torch.dtype) -> torch.dtype:
        """See `HFFolder.rounds_to`: scales and biases have the checkpoint's dtype."""
        return checkpoint

    def losses(self, folder: Path, tokens: npt.NDArray[np.int64], dtype: torch.dtype) -> Losses:
        """See `HFFolder.losses`; mlx-lm computes in float32."""
        return mlx_losses(folder, tokens)


def pack_affine(weight: Affine, bits: int, group_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight as mlx holds it.

    Args:
        weight: The weight.
        bits: Its width, 1 to 8.
        group_size: Weights in a group of mlx; divides the groups of the weight.
        dtype: Dtype of scales and biases.
    Returns:
        "weight": uint32, shape (out, in * bits / 32), codes without gaps, the first code lowest; "scales" and
        "biases", shape (out, in / group_size).
    Source: `affine_quantize` and `affine_dequantize` in mlx/backend/cpu/quantized.cpp.
    """
    rows, _, held = weight.codes.shape
    scales, zeros = (
        tensor.flatten(1).repeat_interleave(held // group_size, dim=1) for tensor in (weight.scales, weight.zeros)
    )
    scales = scales.to(dtype)
    return {
        "weight": pack_bits(weight.codes, bits).view(torch.uint32).reshape(rows, -1),
        "scales": scales,
        "biases": (-zeros.float() * scales.float()).to(dtype),  # of the rounded scale, so that 0 stays near 0
    }


def _group_size(backend: Backend) -> int:
    """The largest group size of mlx that divides a backend's groups."""
    return next(size for size in _GROUP_SIZES if backend.settings["group_size"] % size == 0)


def _rotary_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the rotary embedding where mlx-lm looks for them: transformers 5 has moved them."""
    rotary = config.get("rope_parameters") or {}
    entries = {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
    if rotary.get("rope_type", "default") != "default":
        entries["rope_scaling"] = {name: value for name, value in rotary.items() if name not in entries}
    return entries
