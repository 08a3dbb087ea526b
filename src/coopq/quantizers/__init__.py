"""Quantization backends behind one contract; a backend's module is imported when the backend is asked for."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from coopq.core.errors import BackendError, UnsupportedBits, hint
from coopq.core.spec_base import spec_options, spelled
from coopq.core.specs import QuantizerSpec
from coopq.core.types import UNTOUCHED, Width

if TYPE_CHECKING:  # the contract imports torch
    from coopq.quantizers.backend import Backend

__all__ = ["BACKENDS", "BackendEntry", "get_backend"]


class BackendEntry(NamedTuple):
    """A line of the table of backends.

    Attributes:
        path: Module and class, "module:class".
        summary: One line for help texts.
        options: Options that the class takes, by their names in `QuantizerSpec`.
    """

    path: str
    summary: str
    options: tuple[str, ...] = ()


_GPTQ_OPTIONS = ("group_size", "act_order", "symmetric")

BACKENDS = {
    "rtn": BackendEntry(
        "coopq.quantizers.rtn:RTNBackend",
        "round to nearest in groups, plain torch: the reference, needs no extra",
        ("group_size",),
    ),
    "quanto": BackendEntry("coopq.quantizers.quanto:QuantoBackend", "min-max of optimum-quanto, as in the paper"),
    "hqq": BackendEntry(
        "coopq.quantizers.hqq:HQQBackend", "half-quadratic quantization, fitted to no tokens", ("group_size",)
    ),
    "gptq": BackendEntry(
        "coopq.quantizers.gptq.backend:GPTQBackend",
        "GPTQ by GPTQModel: each layer is fitted to the outputs of the quantized layers before it",
        _GPTQ_OPTIONS,
    ),
    "gptq-static": BackendEntry(
        "coopq.quantizers.gptq.backend:GPTQStatic",
        "GPTQ with inputs of the full-precision model: what is measured is what is saved",
        _GPTQ_OPTIONS,
    ),
    "autoround": BackendEntry(
        "coopq.quantizers.gptq.autoround:AutoRoundBackend",
        "rounding learnt block by block: slow, and by far the lowest loss at 2 bits",
        ("group_size", "symmetric"),
    ),
    "ggml": BackendEntry(
        "coopq.quantizers.ggml.types:GGMLBackend", "K-quants of llama.cpp, with an importance matrix", ("imatrix",)
    ),
    "ggml-iq": BackendEntry(
        "coopq.quantizers.ggml.types:IQuants",
        "I-quants of llama.cpp below 4.5 bits: best for GGUF files below 3 bits",
        ("imatrix",),
    ),
    "ggml-gptq": BackendEntry(
        "coopq.quantizers.ggml.gptq:GGMLGPTQ", "GPTQ into the types of llama.cpp: best for GGUF files from 3 bits up"
    ),
}


def get_backend(spec: QuantizerSpec, widths: Sequence[Width] = ()) -> "Backend":
    """The backend of a spec.

    Args:
        spec: Name and options of the backend.
        widths: Widths that the backend must have; `UNTOUCHED` needs no backend.
    Raises:
        BackendError: If the name is unknown, the backend lacks an option, or its library is not installed.
        UnsupportedBits: If the backend lacks a width.
    """
    name = spec.backend
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r} is unknown; {hint(name, BACKENDS)}")
    module, _, attribute = BACKENDS[name].path.partition(":")
    kind: Any = getattr(importlib.import_module(module), attribute)
    for width in widths:
        if width not in (*kind.bits, UNTOUCHED):
            raise UnsupportedBits(
                f"backend {name!r} has no {width} bits; it has {', '.join(map(str, kind.bits))}, and {UNTOUCHED} for "
                "layers that stay as they are"
            )
    given = {option: value for option, value in spec_options(spec).items() if option != "backend"}
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in BACKENDS[name].options:
            takers = ", ".join(taker for taker, entry in BACKENDS.items() if option in entry.options)
            raise BackendError(
                f"backend {name!r} has no option {spelled(option)}; leave it out, or use a backend with it: {takers}"
            )
    backend: Backend = kind(**options)
    return backend
