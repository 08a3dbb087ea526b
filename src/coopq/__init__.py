"""CoopQ: mixed-precision quantization of language models, decided by a cooperative game between layers.

>>> import coopq
>>> request = coopq.Request.from_options(model="demo", bits=(3, 4), tokens=1024, sequence_length=128)
>>> plan = coopq.quantize(request, coopq.Goal(budget="3.5avg"), Path("smollm2-3.5"))
>>> model = coopq.load("smollm2-3.5")
"""

import importlib
from typing import Any

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
    "find_players": "coopq.model.players",
    "load": "coopq.export.checkpoint",
    "load_model": "coopq.model.load",
    "quantize": "coopq.pipeline",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when used: `coopq show` and `coopq allocate` need no torch, and start in a blink.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coopq' has no attribute {name!r}")
