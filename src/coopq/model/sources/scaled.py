"""Quantized checkpoints that can be read without loss: FP8 weights with scales, and MXFP4 experts, become bfloat16.

All other quantized checkpoints are refused: the user should give the checkpoint that they were made from.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coopq.core.errors import ModelError, first_names
from coopq.model.sources.stored import Entry, LazyTensor, ReadLog, read_tensor

_SCALES = ("_scale_inv", "_scale")
"""What follows the name of an FP8 weight in the name of the weight's scale."""
_HELPERS = re.compile(r"(_scale|_scale_inv|input_scale|activation_scale|\.k_scale|\.v_scale|\.scale)$")
"""Tensors that belong to quantized weights and are no weights."""
_QUANTIZED_NAMES = re.compile(
    r"(weight_scale(_inv|_2)?|input_scale|activation_scale|_scales|\.scales|qweight|qzeros|g_idx|absmax|nested_absmax"
    r"|quant_map|quant_state\S*|SCB|weight_format|weight_packed|weight_shape|weight_zero_point|_blocks|\.k_scale"
    r"|\.v_scale|zeros_and_scales|_qdata)$"
)
"""Names of tensors that only quantized checkpoints have."""
_MASKS = re.compile(r"(^|\.)(attn|attention|self_attn)\.(masked_)?bias$")
"""Causal masks, which old checkpoints store as bytes."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of four bits. Source: OCP Microscaling Formats 1.0, section 5.3.3."""
_DEFAULT_BLOCK = (128, 128)
"""Source: `FineGrainedFP8Config` of transformers."""


@dataclass(frozen=True)
class Packing:
    """How the weights of a checkpoint are stored.

    Attributes:
        kind: "FP8" or "MXFP4"; None for a checkpoint that is not quantized.
        block: Rows and columns that share a scale, where scales are a grid.
    """

    kind: str | None = None
    block: tuple[int, int] = _DEFAULT_BLOCK

    @property
    def note(self) -> str:
        """What is done to the weights."""
        return f"{self.kind} weights dequantized to bfloat16"


def find_packing(source: str, settings: dict[str, Any] | None, folder: Path) -> Packing:
    """How weights are stored, according to a model's `quantization_config`.

    Args:
        source: The model's name, for errors.
        settings: The `quantization_config` of the model's config.json; None if there is none.
        folder: The model's folder.
    Raises:
        ModelError: If the model is quantized in another way.
    """
    if not settings:
        return Packing()
    method = str(settings.get("quant_method", "")).lower()
    block = settings.get("weight_block_size")
    if method == "compressed-tensors":
        groups = settings.get("config_groups")
        weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
        if weights and all(each.get("type") == "float" and each.get("num_bits") == 8 for each in weights):
            return Packing("FP8", _block(weights[0].get("block_structure")))
    elif (method == "fp8" and settings.get("expert_dtype", "fp8") == "fp8") or method == "fbgemm_fp8":
        return Packing("FP8", _block(block))
    elif method == "modelopt" and settings.get("quant_algo") == "FP8":
        return Packing("FP8")
    elif method == "mxfp4":
        return Packing("MXFP4")
    base = _base_model(folder)
    raise ModelError(
        f"model {source!r} is quantized already (by {method or 'an unnamed method'}); give the checkpoint in 16 or 32 "
        f"bits that it was made from{f', {base}' if base else ''}"
    )


def check_unpacked(source: str, entries: Mapping[str, Entry]) -> None:
    """Refuse quantized weights that no `quantization_config` describes.

    Raises:
        ModelError: Naming the tensors.
    """
    odd = [
        name
        for name, entry in entries.items()
        if _QUANTIZED_NAMES.search(name)
        or (entry.is_packed and len(entry.shape) > 1 and not _MASKS.search(name))
        or (entry.is_packed and entry.dtype.startswith("F"))
    ]
    if odd:
        raise ModelError(
            f"model {source!r} holds {len(odd)} tensors of quantized weights ({first_names(odd)}), and its config.json "
            "has no quantization_config that says how to read them; give the checkpoint in 16 or 32 bits"
        )


def lazy_tensors(source: str, entries: Mapping[str, Entry], packing: Packing, log: ReadLog) -> dict[str, LazyTensor]:
    """The weights of a checkpoint by name, dequantized when they are read.

    Args:
        source: The model's name, for errors.
        entries: What is stored.
        packing: How weights are stored.
        log: Where reading is recorded.
    Raises:
        ModelError: If quantized weights have no scales.
    """
    if packing.kind is None:
        check_unpacked(source, entries)
    found: dict[str, LazyTensor] = {}
    for name in entries:
        if packing.kind == "FP8" and _HELPERS.search(name) and _is_helper(name, entries):
            continue
        if packing.kind == "MXFP4" and name.endswith("_scales") and f"{name[:-7]}_blocks" in entries:
            continue
        found_as, shape, read = _reader(source, name, entries, packing)
        found[found_as] = LazyTensor(found_as, shape, read, log)
    return found


def _reader(
    source: str, name: str, entries: Mapping[str, Entry], packing: Packing
) -> tuple[str, tuple[int, ...], Callable[[], Tensor]]:
    """The name, the shape and the reading of one weight."""
    entry = entries[name]
    if packing.kind == "MXFP4" and name.endswith("_blocks"):
        scales = f"{name[:-7]}_scales"
        if scales not in entries:
            raise ModelError(f"model {source!r}: tensor {name} has no scales; download the model again")
        *experts, rows, groups, half = entry.shape
        return (
            name[:-7],
            (*experts, groups * half * 2, rows),
            lambda: dequantize_mxfp4(read_tensor(entry, name), read_tensor(entries[scales], scales)),
        )
    if packing.kind == "FP8" and entry.dtype.startswith("F8"):
        scale = _scale_name(name, entries)
        if scale is None:
            raise ModelError(f"model {source!r}: tensor {name} is stored in FP8 without a scale; download it again")
        return (
            name,
            entry.shape,
            lambda: dequantize_fp8(read_tensor(entry, name), read_tensor(entries[scale], scale), packing.block),
        )
    if entry.is_packed and len(entry.shape) > 1 and not _MASKS.search(name):
        raise ModelError(f"model {source!r}: tensor {name} is stored as {entry.dtype}, which cannot be read; give the "
                         "checkpoint in 16 or 32 bits")  # fmt: skip
    return name, entry.shape, lambda: read_tensor(entry, name)


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] = _DEFAULT_BLOCK) -> Tensor:
    """FP8 weights times their scales.

    Args:
        weight: Shape (..., rows, columns).
        scale: One scale (of each expert, if there are several), one for each row, or a grid with one for each block.
        block: Rows and columns of a block.
    Returns:
        The weights in bfloat16, in the shape of `weight`.
    Raises:
        RuntimeError: If the scales do not fit the weights.
    """
    factors = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    if factors.numel() == 1:
        factors = factors.reshape(())
    elif factors.ndim == 1 and weight.ndim == 2:
        factors = factors[:, None]
    elif tuple(factors.shape[-2:]) not in ((weight.shape[-2], 1), (1, 1)):  # a grid may be one block wide
        rows, columns = weight.shape[-2:]
        if (-(-rows // block[0]), -(-columns // block[1])) != tuple(factors.shape[-2:]):
            raise RuntimeError(
                f"scales of shape {tuple(scale.shape)} do not fit blocks of {block[0]} x {block[1]} of weights of "
                f"shape {tuple(weight.shape)}"
            )
        factors = factors.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return (weight.float() * factors).bfloat16()


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 weights of experts as GPT-OSS stores them.

    Args:
        blocks: Two codes a byte, the low four bits first, shape (..., outputs, groups, bytes).
        scales: Exponents of two plus 127, shape (..., outputs, groups).
    Returns:
        The weights in bfloat16, shape (..., inputs, outputs): GPT-OSS multiplies from the left.
    """
    values = torch.tensor(_FP4)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    weights = torch.ldexp(values[codes], (scales.int() - 127)[..., None])
    return weights.flatten(-2).transpose(-1, -2).contiguous().bfloat16()


def _scale_name(name: str, entries: Mapping[str, Entry]) -> str | None:
    """The name of the scale of an FP8 weight."""
    stem = name.removesuffix("weight")
    names = [*(name + suffix for suffix in _SCALES), f"{stem}scale", f"{stem}qscale_weight"]
    return next((scale for scale in names if scale in entries), None)


def _is_helper(name: str, entries: Mapping[str, Entry]) -> bool:
    """Whether a scale belongs to an FP8 weight of the same module; other scales are weights of the model."""
    module = name.rpartition(".")[0]
    if re.search(r"\.(k|v|q)_scale$", name):
        return True
    siblings = [_HELPERS.sub("", name), f"{module}.weight"]
    return any(other in entries and entries[other].dtype.startswith("F8") for other in siblings)


def _block(given: Any) -> tuple[int, int]:
    """Rows and columns of a block, from a config.json."""
    if (
        isinstance(given, (list, tuple))
        and len(given) == 2
        and all(isinstance(size, int) and size > 0 for size in given)
    ):
        return int(given[0]), int(given[1])
    return _DEFAULT_BLOCK


def _base_model(folder: Path) -> str | None:
    """The base model that a model card names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = re.search(
        r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?([\w./-]+)", card.read_text("utf-8", errors="replace"), re.M
    )
    return found[1] if found else None
