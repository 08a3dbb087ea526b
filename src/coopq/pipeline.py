"""The main job, from a request to a saved model, as a page that reads top to bottom.

quantize = prepare -> open a session -> plans of the budget -> measure the plan -> save the model. Each stage keeps what
the stage computes in the run folder, so that an interrupted job goes on from there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coopq.core.errors import EstimationError, InfeasibleBudget, Mismatch, OutputError, differing
from coopq.core.files import as_plain, require_new_folder, require_no_input
from coopq.core.goal import Goal
from coopq.core.sizes import Budget, Sizes
from coopq.core.spec import spec_options
from coopq.core.specs import DEFAULT_SOLVER, QuantizerSpec, Request, SolverSpec
from coopq.core.types import UNTOUCHED, ProgressCallback, Width, silent
from coopq.export.checkpoint import SavedModel, Source, save_model
from coopq.export.formats import TargetFile
from coopq.game.run_folder import RunFolder
from coopq.game.session import open_session, prepare
from coopq.game.weights_fingerprint import weights_fingerprint
from coopq.model.load import fingerprint_weights, max_positions
from coopq.model.memory import weights_fit
from coopq.model.texts import calibration_set, fitting_set
from coopq.plan.allocate import allocate_run, measure_plan
from coopq.plan.by_search import smallest_plan
from coopq.plan.by_walks import estimate_walks
from coopq.plan.estimation import Estimation
from coopq.plan.methods import METHODS, check_methods, get_method, make_plans
from coopq.plan.plan import Plan
from coopq.quantizers.packed_modules import PackedWeights

if TYPE_CHECKING:  # Ray is optional
    from coopq.game.ray_cluster import RayConfig

__all__ = ["allocate", "apply", "default_run", "estimate", "quantize"]

allocate = allocate_run
_PLACES = ("model", "calibration", "base")
"""Options that name a place. The same content has several names."""


def quantize(
    request: Request,
    goal: Goal,
    out: Path,
    *,
    solver: SolverSpec = DEFAULT_SOLVER,
    run: Path | None = None,
    progress: ProgressCallback = silent,
    ray: "RayConfig | None" = None,
) -> Plan:
    """The main job: search the assignment of a budget, measure it, save the quantized model.

    Args:
        request: The model and how to measure it.
        goal: The budget, or a limit on the loss, and the method.
        out: Folder of the quantized model; the folder appears whole, at the end.
        solver: How programs are solved.
        run: Folder of the work, "<out>-run" by default; an interrupted job goes on from there.
        progress: Told of every step.
        ray: Where the workers are that measure; None measures in this process.
    Returns:
        The plan, which is also saved in `out`. A finished job is not repeated.
    """
    out = out.expanduser().resolve()
    run = default_run(out) if run is None else run.expanduser().resolve()
    limit = goal.limit()
    _check_goal(request, goal)
    _check_places(request, out, run)
    if SavedModel(out).exists:
        return _finished(request, goal, solver, out)
    require_new_folder(out)
    budgets = [] if goal.budget is None else [Budget.parse(goal.budget)]
    prepared = prepare(request, target=TargetFile())
    check_methods([goal.method], prepared.players, len(request.widths.bits))
    prepared.check_budgets(budgets)
    with open_session(prepared, run, progress, ray=ray) as session:
        if goal.max_loss is None:
            (plan,) = make_plans(session, goal.method, budgets, solver, limit)
        else:
            plan = smallest_plan(session, goal.max_loss, limit)
        return save_model(Source.from_session(session), measure_plan(session, plan), out, progress)


def estimate(
    request: Request, run: Path, progress: ProgressCallback = silent, *, ray: "RayConfig | None" = None
) -> Estimation:
    """Measure the permutation walks of SPQE, and estimate Shapley values; an interrupted run goes on.

    Args:
        request: What to measure.
        run: The run folder.
        progress: Told of every loss.
        ray: Where the workers are that measure; None measures in this process.
    """
    _check_places(request, None, run)
    prepared = prepare(request, target=TargetFile())
    check_methods(["coopq"], prepared.players, len(request.widths.bits))
    with open_session(prepared, run, progress, ray=ray) as session:
        return estimate_walks(session)


def apply(
    plan: Plan,
    out: Path,
    *,
    model: str | None = None,
    deployment: QuantizerSpec | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Quantize the model of a plan and save it.

    Args:
        plan: The plan.
        out: Folder of the quantized model.
        model: Where the model is now; None takes the plan's word.
        deployment: Deploy with this quantizer instead of the one that was measured; the saved plan says so.
        progress: Told of every step.
    Returns:
        The plan as it was saved.
    Raises:
        Mismatch: If the model is not the plan's.
        InfeasibleBudget: If the deployed weights do not keep the plan's budget.
    """
    out = out.expanduser().resolve()
    require_new_folder(out)
    place = model or plan.request.model.source
    request = plan.request.replace(model=place, dtype=plan.fingerprint["dtype"])
    _check_places(request, out, None)
    if deployment is not None and deployment != plan.quantizer:
        plan = plan.replace(deployment=deployment, measured_loss=None, confidence=None, predicted_loss=None)
    if plan.deployment is not None:
        request = _deployed(request, plan.deployment, plan.assignment)
    prepared = prepare(request, target=TargetFile())
    spec = request.model
    loaded = prepared.load(progress, on_host=not weights_fit(spec.source, dtype=spec.dtype, device=spec.device))
    backend, text = prepared.backend, request.text
    fitting = calibration = None
    positions = max_positions(loaded.model)
    if backend.calibrated:
        fitting = fitting_set(text, loaded.tokenizer, positions)
    if backend.calibrated or not text.source.startswith("hub:"):  # a text of the hub is not fetched for the check alone
        calibration = calibration_set(text, loaded.tokenizer, positions)
    found = as_plain(weights_fingerprint(prepared, loaded, fitting))
    compared = ("weights",) if plan.deployment is not None else ("weights", "backend", "fitted to")
    ours, theirs = ({key: record.get(key) for key in compared} for record in (found, as_plain(plan.fingerprint)))
    if differing(ours, theirs):
        raise Mismatch(
            f"the plan was made for another model than {place!r}, or by another backend",
            ours,
            theirs,
            "name the plan's model, install what it was measured with, or allocate a new plan",
        )
    if plan.deployment is not None:
        plan = _resized(plan, prepared.sizes)
    source = Source(
        loaded=loaded,
        players=prepared.players,
        backend=backend,
        fitting=fitting,
        calibration=calibration,
        reused=False,
    )
    return save_model(source, plan, out, progress)


def default_run(out: Path) -> Path:
    """The run folder of an output folder: beside the output, which holds nothing but the model."""
    out = out.expanduser().resolve()
    return out.with_name(f"{out.name}-run")


def plans_so_far(out: Path, run: Path | None) -> list[Path]:
    """Files of the plans that a job has found in its run folder; an interrupted search leaves its best plan there."""
    return list(RunFolder(default_run(out) if run is None else run.expanduser()).plans.glob("*.json"))


def _check_places(request: Request, out: Path | None, run: Path | None) -> None:
    """Check that a job writes over none of its inputs, and that its two folders do not hold each other's files.

    Raises:
        OutputError: If not.
    """
    named = (request.model.source, request.target.base, request.text.source)
    inputs = [path for name in named if name and (path := Path(name).expanduser()).exists()]
    if out is not None:
        require_no_input(out, inputs)
    if run is not None:
        require_no_input(run.expanduser() / "run.json", [path for path in inputs if path.is_dir()])
    if out is not None and run is not None and run.is_relative_to(out):
        raise OutputError(
            f"run folder {run} is, or lies in, the output folder {out}, which holds nothing but the model; name "
            "another --run, or leave it out"
        )


def _check_goal(request: Request, goal: Goal) -> None:
    """Check that a goal can be reached by its method, before any work.

    Raises:
        EstimationError: If not.
    """
    method, screens = get_method(goal.method), request.text.screen_tokens is not None
    if screens and (goal.max_loss is not None or method.kind != "search"):
        what = f"method {method.name!r}" if goal.max_loss is None else "a limit on the loss"
        raise EstimationError(f"screening is for searches of a budget, not for {what}; leave --screen-tokens out")
    if not method.is_anytime and not (goal.max_loss is None and goal.limit() is None):
        what = "answer before its end" if goal.max_loss is None else "search for a loss"
        raise EstimationError(f"method {method.name!r} cannot {what}; leave --method out, the active search can")


def _deployed(request: Request, deployment: QuantizerSpec, assignment: Sequence[Width]) -> Request:
    """The request of a plan that another quantizer deploys, with the widths that the plan and its budget need."""
    widths = {*assignment, request.widths.low, request.widths.high}
    if not PackedWeights(deployment).backend.calibrated:
        request = request.replace(fit_tokens=None)
    return request.replace(**spec_options(deployment), bits=tuple(widths))


def _resized(plan: Plan, sizes: Sizes) -> Plan:
    """The plan with the sizes of the backend that deploys it.

    Raises:
        InfeasibleBudget: If they do not keep the plan's budget.
    """
    widths = plan.request.widths
    limit, n_bytes = sizes.limit(Budget.parse(plan.budget), widths.low, widths.high), sizes.total_bytes(plan.assignment)
    if n_bytes > limit:
        raise InfeasibleBudget(
            f"by backend {plan.quantizer.backend!r} the plan takes {n_bytes} bytes, and its budget {plan.budget} is "
            f"{limit}; allocate a smaller budget, or estimate with that backend"
        )
    return plan.replace(
        bytes=n_bytes,
        file_bytes=sizes.file_bytes(plan.assignment),
        untouched_bytes=sizes.untouched_bytes(plan.assignment) if UNTOUCHED in plan.assignment else 0,
        budget_bytes=limit,
        bits_per_weight=sizes.bits_per_weight(plan.assignment),
    )


def _finished(request: Request, goal: Goal, solver: SolverSpec, out: Path) -> Plan:
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
    """Check that the model and the text of a request are those that a finished output was made from.

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
    changed = differing(found, {name: plan.fingerprint.get(name) for name in found})
    if not changed:
        return
    what = f"the model {request.model.source!r}" if changed[0] == "weights" else f"the text {request.text.source!r}"
    raise OutputError(
        f"output folder {out} is not empty: {what} is not what its model was made from ({', '.join(changed)} differ); "
        "name another folder, or empty it first"
    )
