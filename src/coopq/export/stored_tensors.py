"""Which of a model's own tensors a saved model stores, and in which dtype."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from coopq.core.types import UNTOUCHED, Width
from coopq.model.players import weight_of


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
    seen = {id(weight_of(model, name)) for name, bits in widths.items() if bits != UNTOUCHED}
    untouched = {id(weight_of(model, name)) for name, bits in widths.items() if bits == UNTOUCHED}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, _narrowed(tensor.detach(), dtype, in_16_bits=id(tensor) in untouched)


def _narrowed(tensor: Tensor, dtype: torch.dtype, *, in_16_bits: bool) -> Tensor:
    """A tensor as it is stored."""
    if not tensor.is_floating_point():
        return tensor
    if in_16_bits:
        return tensor.to(dtype if dtype.itemsize <= 2 else torch.float16)
    narrow = tensor.to(dtype)
    return narrow if tensor.is_meta or torch.equal(narrow.to(tensor.dtype), tensor) else tensor
