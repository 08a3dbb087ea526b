"""CoopQ: mixed-precision quantization of language models, decided by a cooperative game between layers.

>>> import coopq
>>> config = coopq.RunConfig("demo", low=3, high=4, permutations=10)
>>> plan = coopq.quantize(config, "3.5avg", Path("smollm2-3.5"))
>>> model = coopq.load("smollm2-3.5")
"""

import importlib
from typing import Any

_PUBLIC = {
    "Budget": "coopq.storage",
    "CalibrationConfig": "coopq.run",
    "CoopQError": "coopq.errors",
    "Plan": "coopq.plan",
    "RunConfig": "coopq.run",
    "RunFolder": "coopq.run",
    "apply": "coopq.pipeline",
    "compare": "coopq.evaluate",
    "estimate": "coopq.pipeline",
    "compare_plan": "coopq.evaluate",
    "evaluate_model": "coopq.evaluate",
    "evaluate_saved": "coopq.evaluate",
    "find_players": "coopq.players",
    "load": "coopq.checkpoint",
    "load_model": "coopq.models",
    "plan_budget": "coopq.plan",
    "quantize": "coopq.pipeline",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when used: `coopq show` and `coopq allocate` need no torch, and start in a blink.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coopq' has no attribute {name!r}")
