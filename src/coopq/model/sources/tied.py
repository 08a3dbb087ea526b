"""Whether the head is the embedding: what the file holds decides, not what the configuration says."""

from collections.abc import Mapping
from typing import Any

import torch

from coopq.model.sources.stored import LazyTensor


def ties(config: Any) -> bool:
    """Whether a configuration makes the head share its weight with the embedding."""
    return bool(
        getattr(config, "tie_word_embeddings", False) or getattr(config.get_text_config(), "tie_word_embeddings", False)
    )


def untie(config: Any) -> None:
    """Make a configuration give the head a weight of its own."""
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False


def holds_another_head(skeleton: Any, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether a file holds a head and an embedding that differ, for a model that ties both.

    Args:
        skeleton: The model without storage.
        tensors: What is stored, by name.
    """
    head = skeleton.get_output_embeddings()
    if head is None:
        return False
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding = skeleton.get_input_embeddings()
    first = _stored_as(f"{names.get(id(embedding), '')}.weight", tensors)
    second = _stored_as(f"{names.get(id(head), '')}.weight", tensors)
    if first is None or second is None or first == second:
        return False
    one, other = tensors[first][...], tensors[second][...]
    return one.shape != other.shape or not torch.equal(one.float(), other.float())


def _stored_as(name: str, tensors: Mapping[str, Any]) -> str | None:
    """The stored name of a parameter: the same, or the only one with the same last two parts."""
    if name in tensors:
        return name
    ending = "." + ".".join(name.split(".")[-2:])
    found = [stored for stored in tensors if f".{stored}".endswith(ending)]
    return found[0] if len(found) == 1 else None
