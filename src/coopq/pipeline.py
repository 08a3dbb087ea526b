"""The stages in order over a run folder: estimate, allocate, quantize."""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from coopq.quantize import get_backend
from coopq.quantize.bank import round_untouched
from coopq.model.texts import calibration_set, fitting_set
from coopq.export.checkpoint import is_saved_model, save_model
from coopq.game.ray_cluster import RayConfig
from coopq.core.errors import BackendError, BudgetError, EstimationError, InfeasibleBudget, Mismatch, OutputError
from coopq.export.formats import storage_for
from coopq.core.files import require_new_folder
from coopq.model.memory import weights_fit
from coopq.plan.methods import (
    SEARCHES,
    SHRUNK,
    UNPROVEN,
    check_method,
    check_players,
    estimate_on,
    measure,
    plans_on,
    smallest_on,
)
from coopq.model.load import fingerprint_weights, load_model
from coopq.plan.plan import WALK_METHODS, Plan, check_solver
from coopq.model.players import find_players
from coopq.core.config import Estimation, RunConfig
from coopq.core.sizes import Budget, Storage
from coopq.core.types import ProgressCallback, silent
from coopq.game.session import open_workbench


def estimate(
    config: RunConfig, run: Path, progress: ProgressCallback = silent, *, ray: RayConfig | None = None
) -> Estimation:
    """Play the game on the permutation walks of SPQE; an interrupted run goes on where it was.

    Args:
        config: What to measure.
        run: The run folder.
        progress: Told of every loss.
        ray: Where workers are that measure; None measures here.
    """
    check = partial(check_players, ["coopq"], n_widths=len(config.widths))
    with open_workbench(config, run, progress, check=check, ray=ray) as bench:
        return estimate_on(bench)


def quantize(
    config: RunConfig,
    budget: str | None,
    out: Path,
    *,
    max_loss: float | None = None,
    run: Path | None = None,
    method: str = "active",
    alpha: float = 0.5,
    time_limit: float | None = None,
    progress: ProgressCallback = silent,
    ray: RayConfig | None = None,
) -> Plan:
    """The main job: search the assignment of a budget, measure it, save the quantized model.

    Args:
        config: The model and how to measure it.
        budget: "2.5avg", "2.8bpw" or "40MiB"; None with a limit on the loss instead.
        max_loss: Find the smallest size whose loss on the calibration set stays under this, nats per token.
        out: Folder of the quantized model; it appears whole, at the end.
        run: Folder of the work, "<out>-run" by default; an interrupted job goes on from it.
        method: One of `coopq.plan.methods.METHODS`: "active", "coopq" as in the paper, another search, or a baseline.
        alpha: Shrinkage of the covariance.
        time_limit: Seconds for the solver.
        progress: Told of every step.
        ray: Where workers are that measure; None measures here.
    Returns:
        The plan, which is also saved in `out`. A finished job is not repeated.
    """
    budgets = [] if budget is None else [Budget.parse(budget)]
    check_solver(alpha, time_limit)
    check_method(method)
    if (budget is None) == (max_loss is None):
        raise BudgetError("give a budget, or a limit on the loss, and not both")
    if max_loss is not None and not math.isfinite(max_loss):
        raise BudgetError(f"a loss of {max_loss} is no limit; give nats per token, 3.8 for example")
    if config.screening is not None and (max_loss is not None or method not in SEARCHES):
        goal = f"method {method!r}" if max_loss is None else "a limit on the loss"
        raise EstimationError(f"screening is for searches of a budget, not for {goal}; leave --screen-tokens out")
    if max_loss is not None and method != "active":
        raise EstimationError(f"method {method!r} cannot search for a loss; leave it out, the active search can")
    out = out.resolve()
    if is_saved_model(out):
        asked = {"method": method, "alpha": alpha if method in SHRUNK else None, "max_loss": max_loss}
        return _finished(config, asked | ({"budget": budgets[0].text} if budgets else {}), time_limit, out)
    require_new_folder(out)
    check = partial(check_players, [method], n_widths=len(config.widths))
    with open_workbench(config, run or default_run(out), progress, *budgets, check=check, ray=ray) as bench:
        if max_loss is None:
            (plan,) = plans_on(bench, method, budgets, alpha=alpha, time_limit=time_limit)
        else:
            plan = smallest_on(bench, max_loss, time_limit=time_limit)
        plan = measure(bench, plan)
        return bench.save(plan, out)


def apply(
    plan: Plan,
    out: Path,
    *,
    model: str | None = None,
    backend: str | None = None,
    group_size: int | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Quantize the model of a plan and save it.

    Args:
        plan: The plan.
        out: Folder of the quantized model.
        model: Where the model is now; None takes the plan's word.
        backend: Deploy with this backend instead of the one that was measured; the saved plan says so.
        group_size: Group size of that other backend.
        progress: Told of every step.
    Returns:
        The plan as it was saved.
    Raises:
        Mismatch: If the model is not the plan's.
    """
    out = out.resolve()
    require_new_folder(out)
    config = RunConfig.from_json(plan.config)
    if backend is None and group_size is not None:
        raise BackendError(f"group size {group_size} goes with a backend to deploy by; name one, or leave it out")
    deployed = RunConfig(config.model, backend or "", group_size).quantizer
    if backend is not None and deployed != plan.quantizer:
        plan = dataclasses.replace(plan, deployment=deployed, measured_loss=None, evidence=None, predicted_loss=None)
    quantizer = get_backend(**plan.quantizer, bits=tuple(sorted(set(plan.assignment))))
    progress("loading the model", 0, 1)
    where: dict[str, Any] = {"dtype": plan.fingerprint["dtype"], "device": config.device}
    source = model or config.model
    loaded = load_model(source, **where, on_host=not weights_fit(source, **where))
    progress("loading the model", 1, 1)
    ours: dict[str, Any] = {"weights": fingerprint_weights(loaded.model)}
    if plan.deployment is None:
        ours["backend"] = json.loads(json.dumps(quantizer.fingerprint()))
    theirs = {name: plan.fingerprint[name] for name in ours}
    if ours != theirs:
        raise Mismatch(
            f"the plan was made for another model than {source!r}, or by another backend",
            ours,
            theirs,
            "name the plan's model, install what it was measured with, or allocate a new plan",
        )
    players = find_players(loaded.model, config.granularity, config.embeddings)
    round_untouched(loaded, players, config.widths)
    if plan.deployment is not None:
        options = {"backend" if key == "name" else key: value for key, value in plan.quantizer.items()}
        by_other = dataclasses.replace(config, model=source, **options)
        plan = _resized(plan, storage_for(by_other, loaded.model, players, quantizer))
    if not quantizer.calibrated:
        return save_model(loaded, plan, quantizer, None, out, progress)
    fitting, seen = (of(config.calibration, loaded.tokenizer).tokens for of in (fitting_set, calibration_set))
    return save_model(loaded, plan, quantizer, fitting, out, progress, calibration=seen)


def _resized(plan: Plan, storage: Storage) -> Plan:
    """The plan with the sizes of the backend that deploys it, if they still keep the budget."""
    config = RunConfig.from_json(plan.config)
    limit, n_bytes = (
        storage.limit(Budget.parse(plan.budget), config.low, config.high),
        storage.bytes_of(plan.assignment),
    )
    if n_bytes > limit:
        raise InfeasibleBudget(
            f"by backend {plan.quantizer['name']!r} the plan takes {n_bytes} bytes, and its budget {plan.budget} is "
            f"{limit}; allocate a smaller budget, or estimate with that backend"
        )
    return dataclasses.replace(
        plan,
        bytes=n_bytes,
        untouched_bytes=storage.untouched_bytes(plan.assignment),
        budget_bytes=limit,
        bits_per_weight=storage.bits_per_weight(plan.assignment),
    )


def default_run(out: Path) -> Path:
    """The run folder of an output folder: beside it, so that the output holds nothing but the model."""
    out = out.resolve()
    return out.with_name(f"{out.name}-run")


def _finished(config: RunConfig, asked: Mapping[str, Any], time_limit: float | None, out: Path) -> Plan:
    """The plan of an output that is complete, if it answers this very request."""
    plan = Plan.load(out / "plan.json")
    ours = {**config.to_json(), **asked, "deployment": None}
    theirs = {
        **RunConfig.from_json(plan.config).to_json(),
        **{name: getattr(plan, name) for name in asked},
        "deployment": plan.deployment,
    }
    if plan.method not in WALK_METHODS:
        ours["permutations"] = theirs["permutations"]
    if time_limit is None and plan.method not in UNPROVEN:  # a proof is asked for
        ours["solver"], theirs["solver"] = "optimal", plan.solver.status
    if ours != theirs:
        differing = Mismatch("", ours, theirs, "").fields
        raise OutputError(
            f"output folder {out} is not empty: it holds a model made with another {', '.join(differing)}; "
            "name another folder, or empty it first"
        )
    return plan
