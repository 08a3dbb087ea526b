"""CoopQ: mixed-precision quantization of language models, decided by a cooperative game between layers.

>>> import coopq
>>> config = coopq.RunConfig("demo", low=3, high=4, permutations=10)
>>> plan = coopq.quantize(config, "3.5avg", Path("smollm2-3.5"))
>>> model = coopq.load("smollm2-3.5")
"""

import importlib
from typing import Any

_PUBLIC = {
    "Budget": "coopq.core.sizes",
    "CalibrationConfig": "coopq.core.config",
    "CoopQError": "coopq.core.errors",
    "Plan": "coopq.plan.plan",
    "RunConfig": "coopq.core.config",
    "RunFolder": "coopq.core.config",
    "apply": "coopq.pipeline",
    "compare": "coopq.judge.comparison",
    "estimate": "coopq.pipeline",
    "compare_plan": "coopq.judge.comparison",
    "evaluate_model": "coopq.judge.comparison",
    "evaluate_saved": "coopq.judge.comparison",
    "find_players": "coopq.model.players",
    "load": "coopq.export.checkpoint",
    "load_model": "coopq.model.load",
    "plan_budget": "coopq.plan.plan",
    "quantize": "coopq.pipeline",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when used: `coopq show` and `coopq allocate` need no torch, and start in a blink.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'coopq' has no attribute {name!r}")
