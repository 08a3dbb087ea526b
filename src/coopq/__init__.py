"""CoopQ: mixed-precision quantization of language models, decided by a cooperative game between layers.

>>> import coopq
>>> request = coopq.request_for("coopq", model="demo", bits=(3, 4), tokens=1024, sequence_length=128)
>>> plan = coopq.quantize(request, coopq.Goal(budget="3.5avg", forwards=30), Path("smollm2-3.5"))
>>> model = coopq.load("smollm2-3.5")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; at run time a name is imported when it is used
    from coopq.core.errors import CoopQError as CoopQError
    from coopq.core.goal import Goal as Goal
    from coopq.core.specs import QuantizerSpec as QuantizerSpec
    from coopq.core.specs import Request as Request
    from coopq.core.specs import SolverSpec as SolverSpec
    from coopq.export.checkpoint import dequantized as dequantized
    from coopq.export.checkpoint import load as load
    from coopq.export.formats import export_model as export_model
    from coopq.export.request import request_for as request_for
    from coopq.judge.comparison import compare as compare
    from coopq.judge.evaluation import evaluate_model as evaluate_model
    from coopq.judge.evaluation import evaluate_saved as evaluate_saved
    from coopq.model.load import load_model as load_model
    from coopq.model.texts import HeldOut as HeldOut
    from coopq.pipeline import allocate as allocate
    from coopq.pipeline import apply as apply
    from coopq.pipeline import deliver as deliver
    from coopq.pipeline import estimate as estimate
    from coopq.pipeline import quantize as quantize
    from coopq.plan.plan import Plan as Plan

_PUBLIC = {
    "CoopQError": "coopq.core.errors",
    "Goal": "coopq.core.goal",
    "HeldOut": "coopq.model.texts",
    "Plan": "coopq.plan.plan",
    "QuantizerSpec": "coopq.core.specs",
    "Request": "coopq.core.specs",
    "SolverSpec": "coopq.core.specs",
    "allocate": "coopq.pipeline",
    "apply": "coopq.pipeline",
    "compare": "coopq.judge.comparison",
    "deliver": "coopq.pipeline",
    "dequantized": "coopq.export.checkpoint",
    "estimate": "coopq.pipeline",
    "evaluate_model": "coopq.judge.evaluation",
    "evaluate_saved": "coopq.judge.evaluation",
    "export_model": "coopq.export.formats",
    "load": "coopq.export.checkpoint",
    "load_model": "coopq.model.load",
    "quantize": "coopq.pipeline",
    "request_for": "coopq.export.request",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when used: `coopq show` and `coopq allocate` need no torch, and start in a blink.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coopq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
