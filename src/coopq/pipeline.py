"""The main job, from a request to a saved model, as a page that reads top to bottom.

quantize = prepare -> open a session -> plans of the budget -> measure the plan -> save the model. deliver = quantize ->
export -> check in the engine. Each stage keeps what it computes in the run folder, so that an interrupted job goes on.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from coopq.core.errors import EstimationError, Mismatch, OutputError, differing
from coopq.core.files import as_plain, expanded, require_new_folder, require_no_input, require_writable
from coopq.core.goal import Goal
from coopq.core.recipes import RECIPES, engine_of
from coopq.core.sizes import Budget
from coopq.core.specs import DEFAULT_SOLVER, QuantizerSpec, Request, SolverSpec
from coopq.core.types import ProgressCallback, silent
from coopq.export.base_model import BaseModel
from coopq.export.checkpoint import SavedModel, Source, save_model
from coopq.export.deployment import deployed_request, resized
from coopq.export.finished import finished_plan
from coopq.export.fitting import fitting_budget
from coopq.export.formats import TargetFile, export_model, get_form, predicted_bytes
from coopq.game.prepared import prepare
from coopq.game.run_folder import Delivered, RunFolder, default_run
from coopq.game.session import open_session
from coopq.game.weights_fingerprint import fingerprint_and_round
from coopq.judge.engines.engine_check import Delivery, check_in_llama_cpp
from coopq.model.load import max_positions
from coopq.model.memory import weights_fit
from coopq.model.texts import PACKAGED, calibration_set, fitting_set, is_gone
from coopq.plan.allocate import allocate_run, measure_plan
from coopq.plan.by_walks import estimate_walks
from coopq.plan.estimation import Estimation
from coopq.plan.methods import check_methods, get_method, make_plans
from coopq.plan.plan import Plan
from coopq.plan.searches.by_search import smallest_plan
from coopq.plan.searches.front import FrontPoint, front_of
from coopq.quantizers.packed_modules import PackedWeights

if TYPE_CHECKING:  # Ray is optional
    from coopq.game.engines.ray_cluster import RayConfig

__all__ = ["allocate", "apply", "deliver", "estimate", "front", "quantize"]

allocate = allocate_run


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
    out = expanded(out).resolve()
    run = default_run(out) if run is None else expanded(run).resolve()
    limit = goal.limit()
    _check_goal(request, goal)
    _check_places(request, out, run)
    prepared = prepare(request, target=TargetFile(progress))
    if goal.fit is not None:
        goal = replace(goal, fit=None, budget=fitting_budget(goal.fit, prepared).text)
    if SavedModel(out).exists:
        return finished_plan(request, goal, solver, out)
    require_new_folder(out)
    budgets = [] if goal.budget is None else [Budget.parse(goal.budget)]
    check_methods([goal.method], prepared)
    prepared.check_budgets(budgets)
    with open_session(prepared, run, progress, ray=ray) as session:
        if goal.max_loss is None:
            (plan,) = make_plans(session, goal.method, budgets, solver, limit)
        else:
            plan = smallest_plan(session, goal.max_loss, limit)
        plan = _with_file_bytes(measure_plan(session, plan), request.model.source)
        return save_model(Source.from_session(session), plan, out, progress)


def deliver(
    request: Request,
    goal: Goal,
    out: Path,
    *,
    solver: SolverSpec = DEFAULT_SOLVER,
    run: Path | None = None,
    progress: ProgressCallback = silent,
    ray: "RayConfig | None" = None,
) -> Delivery:
    """Do the main job, and write the result as an engine loads it.

    Args:
        request: The model and how to measure it, as `coopq.request_for` makes it for an engine.
        goal: The size, or a limit on the loss, and the method.
        out: The file or the folder to write.
        solver: How programs are solved.
        run: Folder of the work, "<out>-run" by default; an interrupted job goes on from there.
        progress: Told of every step.
        ray: Where the workers are that measure; None measures in this process.
    Raises:
        OptionError: If no engine loads the request's target.
        ExportError: If a package is missing that the engine's form needs.
        OutputError: If `out` holds something else.
    """
    out = expanded(out).resolve()
    run = default_run(out) if run is None else expanded(run).resolve()
    recipe = RECIPES[engine_of(request.target.form)]
    form, name = str(recipe.form), out.name.removesuffix(".gguf")  # a run may serve several sizes
    get_form(form).require_engine()
    _check_places(request, out, run)
    saved, record = run / "saved" / name, run / "saved" / f"{name}.json"
    if out == saved:
        raise OutputError(f"{out} is where run folder {run} keeps the model before export; name another --out")
    made = Delivered.load(record) if record.exists() else None
    place = os.path.relpath(out, run)
    if made is not None and made.out != place:
        raise OutputError(f"run folder {run} made {name} as {run / made.out}; name another file, or another --run")
    if out.exists() and (made is None or not made.is_whole):
        raise OutputError(f"{out} exists, and this command did not make it; name another --out, or remove it")
    if not out.exists():
        require_writable(out.parent)
    plan = quantize(request, goal, saved, solver=solver, run=run, progress=progress, ray=ray)
    delivered = Delivered(place, form, plan.assignment)
    if not out.exists():
        delivered.save(record)
        export_model(saved, form, out, progress=progress)
        replace(delivered, is_whole=True).save(record)
    elif made != replace(delivered, is_whole=True):
        raise OutputError(f"{out} was made of another plan; name another --out, or remove it")
    check = None
    if form == "gguf":
        from coopq.export.gguf.form import open_base

        check = check_in_llama_cpp(out, saved, open_base(BaseModel.find(request), progress).path, progress)
    return Delivery(plan, out, saved, check, recipe.command(out))


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
    prepared = prepare(request, target=TargetFile(progress))
    check_methods(["coopq"], prepared)
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
        model: Where the model is now; None looks where the plan says.
        deployment: Deploy with this quantizer instead of the one that was measured; the saved plan says so.
        progress: Told of every step.
    Returns:
        The plan as it was saved.
    Raises:
        Mismatch: If the model is not the plan's.
        InfeasibleBudget: If the deployed weights do not keep the plan's budget.
    """
    out = expanded(out).resolve()
    require_new_folder(out)
    place = model or plan.request.model.source
    request = plan.request.replace(model=place, dtype=plan.fingerprint["dtype"])
    _check_places(request, out, None)
    if deployment is not None and deployment != plan.quantizer:
        plan = plan.replace(deployment=deployment, measured_loss=None, confidence=None, predicted_loss=None)
    if plan.deployment is not None:
        request = deployed_request(request, plan.deployment, plan.assignment)
    if not PackedWeights(request.quantizer).backend.calibrated and is_gone(request.text.source):
        request = request.replace(calibration=PACKAGED)  # the text alone checks the saved model
    prepared = prepare(request, target=TargetFile(progress))
    spec = request.model
    loaded = prepared.load(progress, on_host=not weights_fit(spec.source, dtype=spec.dtype, device=spec.device))
    backend, text = prepared.backend, request.text
    calibration, positions = None, max_positions(loaded.model)
    fitting = fitting_set(text, loaded.tokenizer, positions) if backend.calibrated else None
    if backend.calibrated or not text.source.startswith("hub:"):  # a text of the hub is not fetched for the check alone
        calibration = calibration_set(text, loaded.tokenizer, positions)
    found = as_plain(fingerprint_and_round(prepared, loaded, fitting))
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
        plan = resized(plan, prepared)
    source = Source(
        loaded=loaded,
        players=prepared.players,
        backend=backend,
        fitting=fitting,
        calibration=calibration,
        reused=False,
    )
    return save_model(source, _with_file_bytes(plan, place), out, progress)


def _with_file_bytes(plan: Plan, place: str) -> Plan:
    """The plan with the bytes of its target's file, in place of the most that the file can take.

    A plan that another backend deploys may have no file in the target's form.
    """
    form = plan.request.target.form
    if form is None or plan.deployment is not None:
        return plan
    return plan.replace(file_bytes=predicted_bytes(plan, form, model=place))


def front(run: Path) -> list[FrontPoint]:
    """Sizes against losses, from the journal and the score in a run folder; nothing is measured.

    Args:
        run: The run folder of a search.
    Raises:
        RunError: If the folder is no run folder, or nothing is measured there.
    """
    run = expanded(run)
    return front_of(run, prepare(RunFolder(run).request(), target=TargetFile()))


def _check_places(request: Request, out: Path | None, run: Path | None) -> None:
    """Check that a job writes over none of its inputs, and that its two folders do not hold each other's files.

    Raises:
        OutputError: If not.
    """
    named = (request.model.source, request.target.base, request.text.source)
    inputs = [path for name in named if name and (path := expanded(name)).exists()]
    if out is not None:
        require_no_input(out, inputs)
    if run is not None:
        require_no_input(expanded(run) / "run.json", [path for path in inputs if path.is_dir()])
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
        raise EstimationError(f"method {method.name!r} cannot {what}; use --method active")
