"""llama.cpp's own mixes of types: what `llama-quantize FILE OUT Q4_K_M` would give each tensor of a file.

Only the mixes of K-quants, and only models of plain attention and feed-forward layers: llama.cpp has rules of its own
for experts, for 80 layers, and for other tensors. A mix is what a user would otherwise take, so plans are judged beside
the mix of their size.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, August 2026.
"""

from collections.abc import Mapping
from typing import Any

from coopq.export.gguf.base import BaseFile, BaseTensor
from coopq.export.gguf.writer import bytes_beside, padded

MIXES = {
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}
"""The mixes from small to large, and the type of most of their tensors."""
_SHORT_ROWS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Types in place of K-quants where rows are no multiple of 256."""
_EVERY_LAYER = {
    "Q2_K": {"attn_output": "Q3_K", "ffn_down": "Q3_K"},
    "Q3_K_M": {"attn_output": "Q4_K", "attn_qkv": "Q4_K"},
    "Q3_K_L": {"attn_output": "Q5_K", "attn_qkv": "Q4_K", "attn_v": "Q5_K", "ffn_down": "Q5_K"},
    "Q4_K_M": {"attn_qkv": "Q5_K"},
    "Q5_K_M": {"attn_qkv": "Q6_K"},
}
"""Types of some roles, in all layers, that differ from the mix's own."""
_ROLES = {
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_gate", "ffn_up", "ffn_down"),
}
"""Roles whose rules are here. A model with other matrices has no known mix."""
_UNSUPPORTED, _LARGE = ("falcon",), 80
"""An architecture, and a number of layers, with rules of their own."""


def mix_types(base: BaseFile, mix: str) -> dict[str, Any]:
    """The type of each tensor that a mix quantizes.

    Args:
        base: The model in full precision.
        mix: A name of `MIXES`.
    Returns:
        `gguf.GGMLQuantizationType` by name of the tensor; empty if the mixes of the model are not known.
    """
    has_experts = base.value(f"{base.architecture}.expert_count")
    if base.architecture in _UNSUPPORTED or base.n_blocks == _LARGE or has_experts:
        return {}
    quantized = [tensor for tensor in base.tensors.values() if _is_matrix(tensor)]
    if any(
        len(tensor.shape) > 2 or tensor.shape[0] % 32 or _role(tensor.name)[0] not in _ROLES for tensor in quantized
    ):
        return {}
    roles: dict[str, list[int]] = {}
    for tensor in quantized:
        role, layer = _role(tensor.name)
        roles.setdefault(role, []).append(layer)
    found = {}
    for tensor in quantized:
        role, layer = _role(tensor.name)
        layers = sorted(roles[role])
        kind = _kind(base, mix, role, layers.index(layer), len(layers))
        found[tensor.name] = _fitting(kind, tensor.shape[0])
    return found


def mix_bytes(base: BaseFile, types: Mapping[str, Any]) -> int:
    """Bytes of the file of a mix, as `coopq.export.gguf.writer` would write it."""
    from gguf import GGML_QUANT_SIZES

    n_bytes = bytes_beside(base, types)
    for name, kind in types.items():
        tensor, (block, size) = base.tensors[name], GGML_QUANT_SIZES[kind]
        n_bytes += padded(tensor.n_rows * (tensor.shape[0] // block) * size, base.alignment)
    return n_bytes


def nearest_mix(base: BaseFile, n_bytes: int) -> str | None:
    """The mix whose file is nearest to a size in bytes; None if the mixes of the model are not known."""
    sizes = {mix: mix_bytes(base, types) for mix in reversed(MIXES) if (types := mix_types(base, mix))}
    return min(sizes, key=lambda mix: abs(sizes[mix] - n_bytes), default=None)


def _is_matrix(tensor: BaseTensor) -> bool:
    """Whether a tensor has rows and columns and is no norm."""
    return len(tensor.shape) > 1 and tensor.name.endswith("weight") and not tensor.name.endswith("_norm.weight")


def _role(name: str) -> tuple[str, int]:
    """The role of a tensor and its layer: ("ffn_down", 3) for "blk.3.ffn_down.weight"."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("blk."):
        return stem, 0
    _, layer, role = stem.split(".", 2)
    return role, int(layer)


def _kind(base: BaseFile, mix: str, role: str, place: int, n_layers: int) -> str:
    """The type that a mix has for a tensor, were all rows long.

    Args:
        base: The model.
        mix: The mix.
        role: The tensor's role.
        place: Number of the tensor among those of its role.
        n_layers: Number of tensors of the role.
    """
    is_tied = "output.weight" not in base.tensors
    if role == "output" or (role == "token_embd" and is_tied):
        return "Q6_K"
    is_early, is_raised = place < n_layers // 8, _has_more_bits(place, n_layers)
    if role == "attn_v":
        many_share = _queries_of_a_key(base) >= 4
        by_depth = {
            "Q2_K": "Q4_K" if many_share else "Q3_K",
            "Q3_K_M": "Q5_K" if place < 2 else "Q4_K",
            "Q4_K_S": "Q5_K" if place < 4 else None,
            "Q4_K_M": "Q6_K" if is_raised else None,
            "Q5_K_M": "Q6_K" if is_raised else None,
        }
    elif role == "ffn_down":
        by_depth = {
            "Q3_K_M": "Q5_K" if place < n_layers // 16 else "Q4_K",
            "Q4_K_S": "Q5_K" if is_early else None,
            "Q4_K_M": "Q6_K" if is_raised else None,
            "Q5_K_M": "Q6_K" if is_raised else None,
        }
    else:
        by_depth = {}
    return by_depth.get(mix) or _EVERY_LAYER.get(mix, {}).get(role) or MIXES[mix]


def _has_more_bits(place: int, n_layers: int) -> bool:
    """Whether a layer is among the first and the last eighth, or is every third between."""
    first = n_layers // 8
    return place < first or place >= 7 * n_layers // 8 or (place - first) % 3 == 2


def _queries_of_a_key(base: BaseFile) -> int:
    """Heads of queries for each head of keys."""
    heads, keys = (base.value(f"{base.architecture}.attention.head_count{end}") for end in ("", "_kv"))
    if not isinstance(heads, int) or not isinstance(keys, int) or not keys:
        return 1
    return heads // keys


def _fitting(kind: str, columns: int) -> Any:
    """The type, or the type in its place for rows of this many weights."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[_SHORT_ROWS[kind] if columns % 256 else kind]
