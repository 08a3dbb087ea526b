"""One step, from a model to the file that an engine runs: the main job, the export, a check in the engine, a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coopq import pipeline
from coopq.core.errors import OutputError
from coopq.core.files import as_plain, read_json, write_json
from coopq.core.goal import Goal
from coopq.core.recipes import RECIPES
from coopq.core.specs import DEFAULT_SOLVER, Request, SolverSpec
from coopq.core.types import ProgressCallback, silent
from coopq.export.formats import export_model, predicted_bytes
from coopq.judge.engine_check import EngineCheck, check_in_llama_cpp
from coopq.plan.plan import Plan

if TYPE_CHECKING:  # Ray is optional
    from coopq.game.ray_cluster import RayConfig


@dataclass(frozen=True)
class Delivery:
    """What was made for an engine.

    Attributes:
        plan: The plan.
        out: The file or the folder.
        n_bytes: Bytes of the file that holds the weights.
        check: What the engine computes of it; None where the engine is not installed.
        run: How to run it.
    """

    plan: Plan
    out: Path
    n_bytes: int
    check: EngineCheck | None
    run: str


def deliver(
    request: Request,
    goal: Goal,
    engine: str,
    out: Path,
    *,
    solver: SolverSpec = DEFAULT_SOLVER,
    run: Path | None = None,
    progress: ProgressCallback = silent,
    ray: "RayConfig | None" = None,
) -> Delivery:
    """Do the main job, and write the result as an engine loads it.

    Args:
        request: The model and how to measure it; `request.target.form` is the engine's form.
        goal: The size, or a limit on the loss, and the method.
        engine: A name of `coopq.core.recipes.ENGINES`.
        out: The file or the folder to write.
        solver: How programs are solved.
        run: Folder of the work, "<out>-run" by default; an interrupted job goes on from there.
        progress: Told of every step.
        ray: Where the workers are that measure; None measures in this process.
    Raises:
        OutputError: If `out` holds something else.
    """
    out = out.expanduser().resolve()
    run = pipeline.default_run(out) if run is None else run.expanduser().resolve()
    form, saved, record = request.target.form, run / "saved", run / "delivered.json"
    assert form is not None
    made = read_json(record) if record.exists() else None
    if out.exists() and made is None:
        raise OutputError(f"{out} exists, and this command did not make it; name another --out, or remove it")
    plan = pipeline.quantize(request, goal, saved, solver=solver, run=run, progress=progress, ray=ray)
    if not out.exists() or made is None:
        write_json(record, {"form": form, "bits": plan.assignment})  # before the output: an interrupted job goes on
        export_model(saved, form, out, model=request.model.source, progress=progress)
    elif made != as_plain({"form": form, "bits": plan.assignment}):
        raise OutputError(f"{out} was made of another plan; name another --out, or remove it")
    check = check_in_llama_cpp(out, saved, progress) if form == "gguf" else None
    n_bytes = predicted_bytes(plan, form, model=request.model.source)
    return Delivery(plan, out, n_bytes, check, RECIPES[engine].run.format(out=out))
