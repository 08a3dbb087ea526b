"""Modules that compute by another function for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

Forward: TypeAlias = Callable[..., Any]
"""A function with the arguments and the result of a module's `forward`."""


@contextmanager
def override_forward(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Let modules compute by other functions inside the `with` block.

    Overrides can be nested, also over the forwards that accelerate and `OffloadedBlocks` give to modules: each exit
    brings back what was there before. Functions go directly into the modules' dictionaries, because
    `nn.Module.__setattr__` is slow and the engine enters overrides for every block forward.

    Args:
        forwards: The function for each module.
    """
    attributes = [(vars(module), forward) for module, forward in forwards.items()]
    before = [own.get("forward") for own, _ in attributes]
    try:
        for own, forward in attributes:
            own["forward"] = forward
        yield
    finally:
        for (own, _), previous in zip(attributes, before, strict=True):
            if previous is None:
                own.pop("forward", None)
            else:
                own["forward"] = previous
