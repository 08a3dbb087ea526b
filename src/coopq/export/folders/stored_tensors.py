"""Which of a model's own tensors a saved model stores, and in which dtype; and how the model gets them back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from coopq.core.types import UNTOUCHED, Player, Width
from coopq.model.load import empty_model
from coopq.model.matrices import matrix_of, sixteen_bit_dtype
from coopq.model.safetensors_io import saved_size

_MOST_PARTS, _ENTRY_BYTES, _ABOUT_BYTES = 4, 130, 256
"""The most tensors that a backend packs a weight into, bytes of a tensor's entry in the header without the module's
name, and bytes of what the file says of itself."""


def stored_tensors(model: Any, widths: Mapping[str, Width], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model that are stored beside the packed ones, each once: modules may share a tensor.

    The players' untouched weights are stored in 16 bits. All other tensors are stored in the checkpoint's dtype where
    that loses nothing.

    Args:
        model: The model. A model without storage gives tensors without storage, as if the checkpoint's dtype lost
            nothing.
        widths: Width of each of the players' modules by name.
        dtype: The checkpoint's dtype.
    Yields:
        Name and tensor, on the model's device.
    """
    # A tensor without storage has no address, so identity is that of the parameter.
    seen = {id(matrix_of(model, name).parameter) for name, bits in widths.items() if bits != UNTOUCHED}
    untouched = {id(matrix_of(model, name).parameter) for name, bits in widths.items() if bits == UNTOUCHED}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, _narrowed(tensor.detach(), dtype, in_16_bits=id(tensor) in untouched)


def _narrowed(tensor: Tensor, dtype: torch.dtype, *, in_16_bits: bool) -> Tensor:
    """A tensor as it is stored."""
    if not tensor.is_floating_point():
        return tensor
    if in_16_bits:
        return tensor.to(sixteen_bit_dtype(tensor, dtype))
    narrow = tensor.to(dtype)
    return narrow if tensor.is_meta or torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def bytes_beside(skeleton: Any, players: Sequence[Player], dtype: torch.dtype) -> int:
    """Most bytes that the file of a saved model takes beside the players' weights.

    The values of vectors decide whether they take the bytes of the checkpoint's dtype or of the model's, and backends
    name their tensors differently: here, everything counts with the most.

    Args:
        skeleton: The model without storage.
        players: The players.
        dtype: The checkpoint's dtype.
    """
    names = [linear.name for player in players for linear in player.linears]
    tensors = dict(stored_tensors(skeleton, dict.fromkeys(names, 0), dtype))
    widest = max(dtype.itemsize, skeleton.dtype.itemsize)
    vectors = [tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim() < 2]
    wider = sum(tensor.numel() * (widest - tensor.itemsize) for tensor in vectors)
    header = _ABOUT_BYTES + sum(_MOST_PARTS * (len(name) + _ENTRY_BYTES) for name in names)
    return saved_size(tensors) + wider + header


def load_stored(model: Any, tensors: Mapping[str, Tensor], packed: Iterable[str]) -> list[str]:
    """Load the tensors of a saved model that are not packed.

    Args:
        model: The model, without values.
        tensors: The tensors by name.
        packed: Names of the modules whose weights are packed.
    Returns:
        Names of the tensors that are missing or too many.
    """
    # Tied parameters are one before a value is loaded. The value may have the name of any of them.
    model.tie_weights()
    keys = model.load_state_dict(tensors, strict=False)
    state = model.state_dict(keep_vars=True)
    given = {id(state[name]) for name in tensors if name in state}
    given |= {id(matrix_of(model, name).parameter) for name in packed}
    return [name for name in keys.missing_keys if id(state[name]) not in given] + list(keys.unexpected_keys)


def skeleton_of(config: Any, dtype: torch.dtype) -> Any:
    """A model of a saved model's configuration, without storage."""
    with torch.device("meta"):
        return empty_model(config, dtype)


def saved_config(model: Any, dtype: torch.dtype) -> Any:
    """The configuration that a saved model is described by: the checkpoint's dtype, and whether weights are tied.

    A model that was loaded to compute in float32 says so in its own configuration, and an engine that trusts it would
    take twice the memory.

    Args:
        model: The model.
        dtype: The checkpoint's dtype.
    """
    config = deepcopy(model.config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        part.dtype = dtype
    if hasattr(embedding, "weight") and hasattr(head, "weight"):
        is_tied = head.weight is embedding.weight
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            if hasattr(part, "tie_word_embeddings"):
                part.tie_word_embeddings = is_tied
    return config
