"""Backends by name, for tests."""

from typing import Any

from coopq.core.specs import QuantizerSpec
from coopq.quantizers import get_backend
from coopq.quantizers.backend import Backend, WeightQuantizer

WEIGHT_ONLY = ("rtn", "quanto", "hqq")
"""Backends that quantize one weight at a time, fitted to no tokens."""


def backend(name: str, **options: Any) -> Backend:
    """A backend by name and options."""
    return get_backend(QuantizerSpec(name, **options))


def weight_quantizer(name: str, **options: Any) -> WeightQuantizer:
    """A backend that quantizes one weight at a time."""
    found = backend(name, **options)
    assert isinstance(found, WeightQuantizer)
    return found
