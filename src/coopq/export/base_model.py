"""The model that a plan was made for, which forms that start from a full-precision base compare with it."""

from coopq.core.errors import Mismatch
from coopq.model.load import LoadedModel, fingerprint_weights, load_model
from coopq.plan.plan import Plan
from coopq.core.config import RunConfig
from coopq.core.types import ProgressCallback


def load_source(plan: Plan, model: str | None, progress: ProgressCallback) -> LoadedModel:
    """Load a plan's model on the CPU.

    Args:
        plan: The plan.
        model: Where the model is now; None takes the plan's word.
        progress: Told of the loading.
    Raises:
        Mismatch: If it is another model.
    """
    source = model or RunConfig.from_json(plan.config).model
    progress("loading the model", 0, 1)
    loaded = load_model(source, dtype=plan.fingerprint["dtype"], device="cpu")
    ours, theirs = fingerprint_weights(loaded.model), plan.fingerprint["weights"]
    if ours != theirs:
        way_out = "name the plan's model with --model"
        raise Mismatch(
            f"the plan was made for another model than {source!r}", {"weights": ours}, {"weights": theirs}, way_out
        )
    progress("loading the model", 1, 1)
    return loaded
