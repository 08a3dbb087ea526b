"""An output that is complete already: it answers a request only if the request and all contents are the same."""

from pathlib import Path
from typing import Any

from coopq.core.errors import OutputError, differing
from coopq.core.files import as_plain
from coopq.core.goal import Goal
from coopq.core.sizes import Budget
from coopq.core.specs import Request, SolverSpec
from coopq.game.prepared import prepare
from coopq.model.load import fingerprint_weights, max_positions
from coopq.model.texts import calibration_set, fitting_set
from coopq.plan.methods import METHODS
from coopq.plan.plan import Plan

_PLACES = ("model", "calibration", "base")
"""Options that name a place. The same content has several names."""


def finished_plan(request: Request, goal: Goal, solver: SolverSpec, out: Path) -> Plan:
    """The plan of an output that is complete, if the output answers this very request.

    Raises:
        OutputError: If the output was made for another request, with the options that differ.
    """
    plan = Plan.load(out / "plan.json")
    method = METHODS[goal.method]
    ours: dict[str, Any] = {
        **request.options(),
        "method": goal.method,
        "alpha": solver.alpha if method.takes_alpha else None,
        "max_loss": goal.max_loss,
        "deployment": None,
    }
    theirs: dict[str, Any] = {
        **plan.request.options(),
        "method": plan.method,
        "alpha": plan.alpha,
        "max_loss": plan.max_loss,
        "deployment": plan.deployment,
    }
    if goal.budget is not None:
        ours["budget"], theirs["budget"] = Budget.parse(goal.budget).text, plan.budget
    if METHODS[plan.method].kind != "walks":
        ours["permutations"] = theirs["permutations"]
    if solver.time_limit is None and plan.solver is not None and METHODS[plan.method].proves:  # a proof is asked for
        ours["solver"], theirs["solver"] = "optimal", plan.solver.status
    if plan.stopped_after is not None:  # a search that ended by itself is the same with any limit
        limit = goal.limit()
        ours["limit"], theirs["limit"] = None if limit is None else limit.text, plan.stopped_after
    for name in _PLACES:  # contents decide, not names
        ours.pop(name), theirs.pop(name)
    if fields := differing(ours, theirs):
        raise OutputError(
            f"output folder {out} is not empty: it holds a model made with another {', '.join(fields)}; "
            "name another folder, or empty it first"
        )
    _check_contents(request, plan, out)
    return plan


def _check_contents(request: Request, plan: Plan, out: Path) -> None:
    """Check that the model, the text and the imatrix of a request are those that a finished output was made from.

    Raises:
        OutputError: If not, with what changed.
    """
    prepared = prepare(request.replace(dtype=plan.fingerprint["dtype"]))
    loaded = prepared.load(on_host=True)
    positions, backend = max_positions(loaded.model), prepared.backend
    tokens = calibration_set(request.text, loaded.tokenizer, positions)
    found: dict[str, Any] = {"weights": fingerprint_weights(loaded.model), "tokens": tokens.fingerprint}
    if backend.calibrated:
        found["fitted to"] = fitting_set(request.text, loaded.tokenizer, positions).fingerprint
    if request.quantizer.imatrix is not None:
        found["backend"] = as_plain(backend.fingerprint())
    changed = differing(found, {name: plan.fingerprint.get(name) for name in found})
    if not changed:
        return
    places = {"weights": f"the model {request.model.source!r}", "backend": f"the imatrix {request.quantizer.imatrix!r}"}
    what = places.get(changed[0], f"the text {request.text.source!r}")
    raise OutputError(
        f"output folder {out} is not empty: {what} is not what its model was made from ({', '.join(changed)} differ); "
        "name another folder, or empty it first"
    )
