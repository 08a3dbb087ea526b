"""Quantization backends behind one contract, imported only when asked for."""

import importlib
from inspect import signature

from coopq.quantize.backend import Backend, Packed
from coopq.core.errors import BackendError, UnsupportedBits, hint
from coopq.core.types import UNTOUCHED, Width

__all__ = ["BACKENDS", "Backend", "Packed", "get_backend"]

BACKENDS = {
    "rtn": "coopq.quantize.rtn:RTNBackend",
    "quanto": "coopq.quantize.quanto:QuantoBackend",
    "hqq": "coopq.quantize.hqq:HQQBackend",
    "gptq": "coopq.quantize.gptq.backend:GPTQBackend",
    "gptq-static": "coopq.quantize.gptq.backend:GPTQStatic",
    "autoround": "coopq.quantize.gptq.autoround:AutoRoundBackend",
    "ggml": "coopq.quantize.ggml.types:GGMLBackend",
    "ggml-iq": "coopq.quantize.ggml.types:IQuants",
    "ggml-gptq": "coopq.quantize.ggml.gptq:GGMLGPTQ",
}

_OPTIONS = "gptq and gptq-static have act_order and symmetric, autoround has symmetric"


def get_backend(
    name: str,
    *,
    group_size: int | None = None,
    act_order: bool | None = None,
    symmetric: bool | None = None,
    bits: tuple[Width, ...] = (),
) -> Backend:
    """The backend called `name`.

    Args:
        name: A key of `BACKENDS`.
        group_size: Weights that share a scale; None takes the backend's default.
        act_order: For gptq and gptq-static; None takes their default.
        symmetric: For these and autoround; None takes their default.
        bits: Widths that it must have.
    Raises:
        BackendError: If the name is unknown, the backend lacks an option, or its library is not installed.
        UnsupportedBits: If it lacks a width.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is unknown; {hint(name, BACKENDS)}")
    module, _, attribute = BACKENDS[name].partition(":")
    backend_class: type[Backend] = getattr(importlib.import_module(module), attribute)
    for width in bits:
        if width not in (*backend_class.bits, UNTOUCHED):
            raise UnsupportedBits(
                f"backend {name!r} has no {width} bits; it has {', '.join(map(str, backend_class.bits))}, and "
                f"{UNTOUCHED} for what stays as it is"
            )
    given = {"act_order": act_order, "symmetric": symmetric}
    options = {option: value for option, value in given.items() if value is not None}
    unknown = [option for option in options if option not in signature(backend_class.__init__).parameters]
    if unknown:
        raise BackendError(f"backend {name!r} has no option {', '.join(unknown)}; {_OPTIONS}")
    return backend_class(group_size, **options)
