"""The command line: one function for each command; the work is done elsewhere."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from coopq.core.errors import BudgetError, CoopQError, RunError
from coopq.game.journal import Journal
from coopq.cli.judge_commands import bench, compare, evaluate
from coopq.cli.options import (
    Alpha,
    Budget_,
    GroupSize,
    Json,
    Method,
    RayAddress,
    Run,
    TimeLimit,
    Workers,
    measures,
    ray_config,
)
from coopq.plan.plan import Plan, plan_budget
from coopq.report.tables import (
    forecast_data,
    plan_data,
    plan_summary,
    provenance,
    run_data,
    show_forecast,
    show_plan,
    show_run,
)
from coopq.core.config import RunConfig, RunFolder
from coopq.core.sizes import Budget
from coopq.cli.terminal import STDERR, fail, print_result, progress_bars, quiet_libraries, show_log

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which bits go where: mixed-precision quantization of language models by a cooperative game.",
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    show_log()


@app.command()
@measures()
def quantize(
    config: RunConfig,
    out: Annotated[Path, typer.Option(help="Folder of the quantized model; it appears whole, at the end.")],
    budget: Budget_ = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the smallest size whose calibration loss stays under this, in nats."),
    ] = None,
    run: Run = None,
    method: Method = "active",
    alpha: Alpha = 0.5,
    time_limit: TimeLimit = None,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The one-shot job: search, quantize, save. Run it again and it goes on where it was."""
    from coopq import pipeline
    from coopq.export.formats import predicted_bytes

    quiet_libraries()
    with progress_bars() as progress:
        plan = pipeline.quantize(
            config,
            budget,
            out,
            max_loss=max_loss,
            run=run,
            method=method,
            alpha=alpha,
            time_limit=time_limit,
            progress=progress,
            ray=ray_config(ray_address, workers),
        )
    text = f"{provenance(config, plan.fingerprint, method)}\n{plan_summary(plan)}\nsaved in {out}"
    data = plan_data(plan) | {"out": str(out)}
    if config.target is not None:
        exported = predicted_bytes(plan, config.target)
        text += f"; {exported:,} bytes once exported to {config.target}"
        data["exported_bytes"] = exported
    print_result(data, text, as_json)


@app.command()
@measures("target", "base", "context", "screen_tokens")
def estimate(
    config: RunConfig,
    run: Annotated[Path | None, typer.Option(help="Folder of the work; not with --dry-run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what this and other methods would take, after two seconds.")
    ] = False,
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure the walks and estimate Shapley values and their covariance."""
    if dry_run:
        from coopq.plan.forecast import forecast

        quiet_libraries()
        expected = forecast(config)
        print_result(forecast_data(expected), show_forecast(expected), as_json)
        return
    if run is None:
        raise RunError("estimate keeps its work in a folder: name one with --run, or ask with --dry-run what it takes")
    from coopq import pipeline

    quiet_libraries()
    with progress_bars() as progress:
        estimation = pipeline.estimate(config, run, progress, ray=ray_config(ray_address, workers))
    measured, spent = Journal.peek(RunFolder(run).journal)
    print_result(run_data(estimation, [], spent, measured), show_run(estimation, [], spent, measured), as_json)


@app.command()
def allocate(
    run: Annotated[Path, typer.Argument(help="Run folder of a finished estimation.")],
    budget: Annotated[list[str] | None, typer.Option(help="As for quantize; may be given several times.")] = None,
    front: Annotated[int, typer.Option(help="As many budgets, evenly between the two widths, beside those named.")] = 0,
    alpha: Alpha = 0.5,
    time_limit: TimeLimit = None,
    as_json: Json = False,
) -> None:
    """Solve the CoopQ program for one or several budgets; a plan each, in RUN/plans."""
    budgets = [Budget.parse(text) for text in budget or []]
    folder = RunFolder(run)
    estimation = folder.load()
    low, high = estimation.config.low, estimation.config.high
    budgets += [Budget.parse(f"{low + (high - low) * k / (front + 1):.4g}avg") for k in range(1, front + 1)]
    if not budgets:
        raise BudgetError("no budget is given; name some with --budget, or take a whole front with --front 9")
    for parsed in budgets:  # all are checked before any is solved
        estimation.storage.limit(parsed, low, high)
    plans: list[Plan] = []
    with progress_bars() as progress:
        for parsed in budgets:
            progress("solving the program", len(plans), len(budgets))
            plans.append(plan_budget(estimation, parsed, alpha=alpha, time_limit=time_limit))
        progress("solving the program", len(plans), len(budgets))
    folder.plans.mkdir(exist_ok=True)
    paths = [folder.plans / plan.file_name for plan in plans]
    for plan, path in zip(plans, paths, strict=True):
        plan.save(path)
    text = "\n".join(f"{plan_summary(plan)}\nsaved in {path}" for plan, path in zip(plans, paths, strict=True))
    print_result({"plans": [plan_data(p) | {"path": str(q)} for p, q in zip(plans, paths, strict=True)]}, text, as_json)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    out: Annotated[Path, typer.Option(help="Folder of the quantized model; it appears whole, at the end.")],
    model: Annotated[str | None, typer.Option(help="Where the plan's model is now.")] = None,
    backend: Annotated[str | None, typer.Option(help="Deploy with another backend than was measured.")] = None,
    group_size: GroupSize = None,
    as_json: Json = False,
) -> None:
    """Quantize the model of a plan and save it."""
    loaded = Plan.load(plan)
    from coopq import pipeline

    quiet_libraries()
    with progress_bars() as progress:
        saved = pipeline.apply(loaded, out, model=model, backend=backend, group_size=group_size, progress=progress)
    print_result(plan_data(saved) | {"out": str(out)}, f"{plan_summary(saved)}\nsaved in {out}", as_json)


@app.command()
def export(
    saved: Annotated[Path, typer.Argument(help="A saved model.")],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (from ggml, ggml-iq, ggml-gptq), openvino (rtn, hqq, quanto, gptq, autoround), "
            "compressed-tensors, auto-round (both gptq, autoround)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The GGUF file to write, or the folder of another form.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="The model in full precision: for gguf, by llama.cpp's converter (default: the model, if it is a "
            ".gguf); for openvino, a folder of optimum-cli."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="gguf, openvino: where the plan's model is now.")] = None,
    as_json: Json = False,
) -> None:
    """Write a saved model in the form of an engine: llama.cpp, OpenVINO, vLLM or transformers."""
    from coopq.export.formats import export_model

    quiet_libraries()
    with progress_bars() as progress:
        n_bytes = export_model(saved, to, out, base=base, model=model, progress=progress)
    print_result(
        {"out": str(out), "to": to, "bytes": n_bytes}, f"{n_bytes:,} bytes of weights, saved in {out}", as_json
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A run folder, a plan file, or a saved model.")],
    as_json: Json = False,
) -> None:
    """Layers, bits, and Shapley values with standard errors."""
    if path.is_dir() and not (path / "plan.json").is_file():
        folder = RunFolder(path)
        config = folder.config()
        measured, spent = Journal.peek(folder.journal)
        saved = [Plan.load(file) for file in sorted(folder.plans.glob("*.json"))]
        plans = [plan for plan in saved if not plan.is_of_other_walks(config)]
        if len(plans) < len(saved):
            STDERR.print(f"{len(saved) - len(plans)} plans of other walks are left out; allocate them again")
        if not plans and not folder.is_estimated:
            n = len(measured[1]) + sum(len(Journal.peek(file)[0][1]) for file in path.glob("screening-*.jsonl"))
            STDERR.print(f"{path}: {n} losses measured so far; repeat the command to go on", markup=False)
        estimation = folder.load() if folder.is_estimated or not plans else None
        what = (estimation, plans, spent, measured)
        print_result(run_data(*what), show_run(*what), as_json)
    else:
        plan = Plan.load(path / "plan.json" if path.is_dir() else path)
        print_result(plan_data(plan), show_plan(plan), as_json)


for judging in compare, bench, evaluate:
    app.command()(judging)


def main() -> None:
    """Entry point: user errors become one line and exit code 2, tracebacks only with --debug."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug:  # accepted anywhere, and always before the command for typer
        arguments = ["--debug", *(a for a in arguments if a != "--debug")]
    try:
        app(arguments)
    except CoopQError as error:
        fail(str(error), debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        fail(
            f"{place}{error.strerror or error}; nothing computed is lost: solve it and run the same command again",
            debug,
        )


if __name__ == "__main__":
    main()
