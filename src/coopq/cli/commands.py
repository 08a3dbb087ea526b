"""Commands that search, allocate, save, export and show; each imports its work when the command is used."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coopq.cli.options import (
    PLACE,
    SectionedCommand,
    as_json,
    converter,
    is_named,
    out_folder,
    ray_config,
    takes,
    takes_cluster,
)
from coopq.cli.terminal import note, print_result, progress_bars, quiet_libraries
from coopq.core.errors import BackendError, RunError
from coopq.core.goal import Goal
from coopq.core.recipes import OWN, RECIPES, reasons
from coopq.core.specs import QuantizerSpec, Request, SolverSpec

if TYPE_CHECKING:
    from coopq.plan.plan import Plan


@click.command(cls=SectionedCommand)
@takes(Request, Goal, SolverSpec, recipes=True)
@click.option("--out", type=PLACE, required=True, help="The file or the folder of the model, as its engine loads it.")
@click.option("--run", type=PLACE, help="Folder of the work. Default: OUT-run.")
@click.option(
    "--dry-run", is_flag=True, help="Only say what the search will take, within --forwards too; config.json is enough."
)
@converter
@takes_cluster
@as_json
def quantize(
    request: Request,
    goal: Goal,
    solver: SolverSpec,
    engine: str | None,
    recipe: str,
    out: Path,
    run: Path | None,
    dry_run: bool,
    ray_address: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Choose the widths for a size, and save the model for an engine.

    \b
      coopq quantize Qwen/Qwen3-4B --for llama.cpp --size 2.2GB --out qwen3.gguf

    These options are enough: the engine's recipe chooses the others. Run an interrupted command again, and it goes on.
    """
    from coopq import pipeline
    from coopq.export.request import fitted_to_model
    from coopq.game.run_folder import RunFolder, default_run
    from coopq.plan.methods import get_method
    from coopq.plan.plan import Plan, interrupted_plans
    from coopq.report.data import delivery_data
    from coopq.report.page.saved import write_report
    from coopq.report.tables import delivery_summary

    quiet_libraries()
    asked, request = request, fitted_to_model(request, keep_bits=is_named("bits"))
    options = {**request.options(), "method": goal.method, "alpha": solver.alpha}
    notes = reasons(recipe, {name: value for name, value in options.items() if not is_named(name)})
    if (size := request.quantizer.group_size) != asked.quantizer.group_size:
        notes.append(f"group size {size}: rows of the model are no whole groups of the backend's size")
    for line in [] if as_json else notes:
        note(line)
    if dry_run:
        _show_forecast(request, as_json, goal.forwards)
        return
    make = pipeline.quantize if engine in (None, OWN) else pipeline.deliver
    try:
        with progress_bars() as progress:
            cluster = ray_config(ray_address, workers)
            made = make(request, goal, out, solver=solver, run=run, progress=progress, ray=cluster)
    except KeyboardInterrupt:
        plans = RunFolder(default_run(out) if run is None else run).plans
        for found in interrupted_plans(plans) if get_method(goal.method).is_anytime else []:
            note(f"the best plan so far is {found}; the same command with --minutes 0 finishes with the best plan")
        raise
    if isinstance(made, Plan):
        plan, (data, text) = made, _saved(request, made, out)
    else:
        plan, data, text = made.plan, delivery_data(made), delivery_summary(request, made)
    report = write_report(plan, out, run)
    print_result(data | {"report": str(report)}, f"{text}\nreport: {report}", as_json)


def _saved(request: Request, plan: "Plan", out: Path) -> tuple[dict[str, Any], str]:
    """What is said of a saved model: for machines, and for people."""
    from coopq.report.data import plan_data
    from coopq.report.tables import how_to_judge, plan_summary, provenance

    data = plan_data(plan) | {"out": str(out)}
    text = f"{provenance(request, plan.fingerprint, plan.method)}\n{plan_summary(plan)}\nsaved in {out}"
    if request.target.form is not None:
        text += f"; {plan.file_bytes:,} bytes once exported to {request.target.form}"
        data["exported_bytes"] = plan.file_bytes
    else:
        text += f"\nrun it: {RECIPES[OWN].command(out)}"
    return data, f"{text}\n{how_to_judge(out)}"


@click.command(cls=SectionedCommand)
@takes(Request, without=("target", "base", "context", "screen_tokens"))
@click.option("--run", type=PLACE, help="Folder of the work. Needed without --dry-run.")
@click.option("--dry-run", is_flag=True, help="Only say what the walks will take; config.json is enough.")
@takes_cluster
@as_json
def estimate(
    request: Request, run: Path | None, dry_run: bool, ray_address: str | None, workers: int | None, as_json: bool
) -> None:
    """Measure the walks and estimate Shapley values and their covariance."""
    if dry_run:
        quiet_libraries()
        _show_forecast(request, as_json)
        return
    if run is None:
        raise RunError("estimate keeps its work in a folder: name one with --run, or ask with --dry-run what it takes")
    from coopq import pipeline
    from coopq.game.journal import Journal
    from coopq.game.run_folder import RunFolder
    from coopq.report.data import run_data
    from coopq.report.tables import show_run

    quiet_libraries()
    with progress_bars() as progress:
        estimation = pipeline.estimate(request, run, progress, ray=ray_config(ray_address, workers))
    measured, forwards = Journal.peek(RunFolder(run).journal)
    spent = int(forwards.sum())
    print_result(run_data(estimation, [], spent, measured), show_run(estimation, [], spent, measured), as_json)


def _show_forecast(request: Request, as_json: bool, forwards: int | None = None) -> None:
    """Say what a search or the walks of a request will take."""
    from coopq.plan.forecast import forecast
    from coopq.report.data import forecast_data
    from coopq.report.tables import show_forecast

    expected = forecast(request, forwards)
    print_result(forecast_data(expected), show_forecast(expected), as_json)


@click.command(cls=SectionedCommand)
@click.argument("run", type=PLACE)
@click.option("--budget", multiple=True, help="As for quantize; may be given several times.")
@click.option(
    "--front",
    type=click.IntRange(min=0),
    default=0,
    help="Add this many budgets, evenly spaced between the lowest and the highest width.",
)
@takes(SolverSpec)
@as_json
def allocate(run: Path, budget: tuple[str, ...], front: int, solver: SolverSpec, as_json: bool) -> None:
    """Solve the paper's program for budgets of the estimation in RUN; a plan each, in RUN/plans."""
    from coopq.plan.allocate import allocate_run
    from coopq.report.data import plan_data
    from coopq.report.tables import plan_summary

    with progress_bars() as progress:
        plans = allocate_run(run, budget, front=front, solver=solver, progress=progress)
    text = "\n".join(f"{plan_summary(plan)}\nsaved in {path}" for path, plan in plans.items())
    print_result({"plans": [plan_data(plan) | {"path": str(path)} for path, plan in plans.items()]}, text, as_json)


@click.command(cls=SectionedCommand)
@click.argument("plan", type=PLACE)
@out_folder
@click.option("--model", help="Where the plan's model is now.")
@click.option("--backend", help="Deploy with another backend than was measured.")
@click.option("--group-size", type=int, help="Group size of that other backend.")
@as_json
def apply(plan: Path, out: Path, model: str | None, backend: str | None, group_size: int | None, as_json: bool) -> None:
    """Quantize the model of the file PLAN and save it."""
    from coopq.plan.plan import Plan
    from coopq.report.data import plan_data
    from coopq.report.tables import plan_summary

    loaded = Plan.load(plan)
    if backend is None and group_size is not None:
        raise BackendError(f"group size {group_size} goes with a backend to deploy by; name one, or leave it out")
    deployment = None if backend is None else QuantizerSpec(backend=backend, group_size=group_size)
    from coopq import pipeline

    quiet_libraries()
    with progress_bars() as progress:
        saved = pipeline.apply(loaded, out, model=model, deployment=deployment, progress=progress)
    print_result(plan_data(saved) | {"out": str(out)}, f"{plan_summary(saved)}\nsaved in {out}", as_json)


@click.command(cls=SectionedCommand)
@click.argument("saved", type=PLACE)
@click.option("--to", required=True, help="Form of an engine; `coopq targets` lists them.")
@click.option("--out", type=PLACE, required=True, help="The GGUF file to write, or the folder of another form.")
@click.option(
    "--base",
    type=PLACE,
    help="The model in full precision: for gguf, a file of llama.cpp's converter (default: the model if it is a .gguf, "
    "or else made by the converter); for openvino, a folder of optimum-cli.",
)
@converter
@click.option("--model", help="gguf, openvino: where the plan's model is now.")
@as_json
def export(saved: Path, to: str, out: Path, base: Path | None, model: str | None, as_json: bool) -> None:
    """Write the saved model SAVED as the file of an engine: llama.cpp, OpenVINO, mlx-lm, vLLM or transformers."""
    from coopq.export.formats import export_model

    quiet_libraries()
    with progress_bars() as progress:
        n_bytes = export_model(saved, to, out, base=base, model=model, progress=progress)
    text = f"{n_bytes:,} bytes of weights, saved in {out}"
    print_result({"out": str(out), "to": to, "bytes": n_bytes}, text, as_json)


@click.command(cls=SectionedCommand)
@click.argument("run", type=PLACE)
@as_json
def front(run: Path, as_json: bool) -> None:
    """Show file sizes against losses, from the losses recorded in the run folder RUN. Measures nothing."""
    from rich.console import Group
    from rich.text import Text

    from coopq import pipeline
    from coopq.game.run_folder import RunFolder
    from coopq.report.page.saved import write_run_pages
    from coopq.report.tables import front_table

    quiet_libraries()
    points = pipeline.front(run)
    table = front_table(points, RunFolder(run).request().search.loss)
    pages = Text("\n".join(f"report: {page}" for page in write_run_pages(run)))
    print_result([asdict(point) for point in points], Group(table, pages), as_json)


@click.command(cls=SectionedCommand)
@click.argument("path", type=PLACE)
@click.option("--page", is_flag=True, help="Write a report instead, an HTML file; also of a comparison or a bench.")
@as_json
def show(path: Path, page: bool, as_json: bool) -> None:
    """Show the layers, widths and Shapley values of PATH: a run folder, a plan file or a saved model."""
    if page:
        from coopq.report.page.saved import write_pages

        files = [str(file) for file in write_pages(path)]
        print_result({"pages": files}, "\n".join(files), as_json)
        return
    from coopq.plan.plan import Plan
    from coopq.report.data import plan_data
    from coopq.report.tables import show_plan

    if path.is_dir() and not (path / "plan.json").is_file():
        _show_run(path, as_json)
    else:
        plan = Plan.load(path / "plan.json" if path.is_dir() else path)
        print_result(plan_data(plan), show_plan(plan), as_json)


def _show_run(path: Path, as_json: bool) -> None:
    """Show a run folder: its plans, and its estimation if there is one."""
    from coopq.game.journal import Journal
    from coopq.game.run_folder import RunFolder
    from coopq.plan.allocate import has_other_walks
    from coopq.plan.estimation import find_estimation, load_estimation
    from coopq.plan.plan import load_plans
    from coopq.report.data import run_data
    from coopq.report.tables import show_run

    folder = RunFolder(path)
    request = folder.request()
    measured, forwards = Journal.peek(folder.journal)
    spent = int(forwards.sum())
    saved = load_plans(sorted(folder.plans.glob("*.json")))
    plans = [plan for plan in saved if not has_other_walks(plan, request)]
    if len(plans) < len(saved):
        note(f"{len(saved) - len(plans)} plans of other walks are left out; allocate them again")
    estimation = find_estimation(path)
    if not plans and estimation is None:
        n = len(measured[1]) + sum(len(Journal.peek(file)[0][1]) for file in path.glob("screening-*.jsonl"))
        note(f"{path}: {n} losses measured so far; repeat the command to go on")
        load_estimation(path)  # says how to go on
    what = (estimation, plans, spent, measured)
    print_result(run_data(*what), show_run(*what), as_json)
