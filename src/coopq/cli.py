"""The command line: one function for each command; the work is done elsewhere."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from coopq.errors import BudgetError, CalibrationError, CoopQError, EstimationError, RunError
from coopq.files import write_json
from coopq.journal import Journal
from coopq.options import (
    METHOD_HELP,
    ActOrder,
    Alpha,
    Backend,
    Bits,
    Budget_,
    Calibration,
    CalibrationSeed,
    Device,
    Dtype,
    Granularity,
    GroupSize,
    Json,
    Length,
    Method,
    Model,
    Permutations,
    RayAddress,
    Run,
    ScreenTokens,
    Seed,
    Symmetric,
    TimeLimit,
    Tokens,
    Workers,
)
from coopq.plan import Plan, plan_budget
from coopq.report import (
    accuracy_table,
    comparison_table,
    evaluation_data,
    forecast_data,
    plan_data,
    plan_summary,
    provenance,
    run_data,
    show_forecast,
    show_plan,
    show_run,
)
from coopq.run import CalibrationConfig, RunConfig, RunFolder
from coopq.storage import Budget
from coopq.terminal import STDERR, fail, print_result, progress_bars, quiet_libraries, show_log

if TYPE_CHECKING:  # it imports torch
    from coopq.distributed import RayConfig

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
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the quantized model; it appears whole, at the end.")],
    budget: Budget_ = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the smallest size whose calibration loss stays under this, in nats."),
    ] = None,
    run: Run = None,
    method: Method = "active",
    granularity: Granularity = "block",
    backend: Backend = "rtn",
    group_size: GroupSize = None,
    act_order: ActOrder = None,
    symmetric: Symmetric = None,
    bits: Bits = "2,4",
    permutations: Permutations = 25,
    seed: Seed = 0,
    calibration: Calibration = "c4",
    calibration_seed: CalibrationSeed = 0,
    tokens: Tokens = 8192,
    sequence_length: Length = 512,
    screen_tokens: ScreenTokens = None,
    alpha: Alpha = 0.5,
    time_limit: TimeLimit = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """The one-shot job: search, quantize, save. Run it again and it goes on where it was."""
    texts = _calibration(calibration, tokens, sequence_length, calibration_seed)
    widths = _bits(bits)
    config = RunConfig(
        model, backend, group_size, *widths, permutations, seed, texts, dtype, device, act_order, symmetric, granularity
    )
    config = _screened(config, screen_tokens)
    from coopq import pipeline

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
            ray=_ray(ray_address, workers),
        )
    text = f"{provenance(config, plan.fingerprint, method)}\n{plan_summary(plan)}\nsaved in {out}"
    print_result(plan_data(plan) | {"out": str(out)}, text, as_json)


@app.command()
def estimate(
    model: Model,
    run: Annotated[Path | None, typer.Option(help="Folder of the work; not with --dry-run.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what this and other methods would take, after two seconds.")
    ] = False,
    granularity: Granularity = "block",
    backend: Backend = "rtn",
    group_size: GroupSize = None,
    act_order: ActOrder = None,
    symmetric: Symmetric = None,
    bits: Bits = "2,4",
    permutations: Permutations = 25,
    seed: Seed = 0,
    calibration: Calibration = "c4",
    calibration_seed: CalibrationSeed = 0,
    tokens: Tokens = 8192,
    sequence_length: Length = 512,
    dtype: Dtype = "auto",
    device: Device = "auto",
    ray_address: RayAddress = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure the walks and estimate Shapley values and their covariance."""
    texts = _calibration(calibration, tokens, sequence_length, calibration_seed)
    widths = _bits(bits)
    config = RunConfig(
        model, backend, group_size, *widths, permutations, seed, texts, dtype, device, act_order, symmetric, granularity
    )
    if dry_run:
        from coopq.forecast import forecast

        quiet_libraries()
        expected = forecast(config)
        print_result(forecast_data(expected), show_forecast(expected), as_json)
        return
    if run is None:
        raise RunError("estimate keeps its work in a folder: name one with --run, or ask with --dry-run what it takes")
    from coopq import pipeline

    quiet_libraries()
    with progress_bars() as progress:
        estimation = pipeline.estimate(config, run, progress, ray=_ray(ray_address, workers))
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
def compare(
    model: Model,
    budget: Annotated[list[str], typer.Option(help="As for quantize; may be given several times.")],
    run: Annotated[Path, typer.Option(help="Folder of the work; the figure and the numbers land there too.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"May be given several times. (default: the usual ones) {METHOD_HELP}")
    ] = None,
    granularity: Granularity = "block",
    backend: Backend = "rtn",
    group_size: GroupSize = None,
    act_order: ActOrder = None,
    symmetric: Symmetric = None,
    bits: Bits = "2,4",
    permutations: Permutations = 25,
    seed: Seed = 0,
    calibration: Calibration = "c4",
    calibration_seed: CalibrationSeed = 0,
    tokens: Tokens = 8192,
    sequence_length: Length = 512,
    screen_tokens: ScreenTokens = None,
    judge_tokens: Annotated[int | None, typer.Option(help="Only the first tokens of WikiText-2 (default: all)")] = None,
    judge_length: Annotated[int, typer.Option(help="Tokens of a WikiText-2 window.")] = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Searches and baselines at several budgets, judged on WikiText-2: one table, one figure. Resumes."""
    texts = _calibration(calibration, tokens, sequence_length, calibration_seed)
    widths = _bits(bits)
    config = RunConfig(
        model, backend, group_size, *widths, permutations, seed, texts, dtype, device, act_order, symmetric, granularity
    )
    config = _screened(config, screen_tokens)
    from coopq import evaluate as work
    from coopq.figure import check_plotting, save_comparison

    check_plotting()
    quiet_libraries()
    with progress_bars() as progress:
        rows = work.compare(
            config,
            budget,
            run,
            length=judge_length,
            max_tokens=judge_tokens,
            methods=method or work.COMPARED,
            progress=progress,
        )
    text = f"WikiText-2 test, {'all' if judge_tokens is None else f'first {judge_tokens}'} tokens by {judge_length}"
    data = {"config": config.to_json(), "text": text, "comparison": [asdict(row) for row in rows]}
    write_json(run / "comparison.json", data)
    title = f"{model}, {backend}, {config.low} and {config.high} bits by {granularity}: {text}"
    files = save_comparison(rows, title, run / "comparison")
    saved = ", ".join(map(str, [run / "comparison.json", *files]))
    print_result(data, Group(comparison_table(rows, text), Text(f"saved in {saved}")), as_json)


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="A TOML file of models, backends, widths, budgets, methods, seeds.")],
    out: Annotated[Path, typer.Option(help="Folder of the work and of the report.")],
    as_json: Json = False,
) -> None:
    """Methods side by side over models, backends, budgets and seeds: tables, figures, intervals. Resumes."""
    from coopq import bench as work
    from coopq.bench_report import save_report
    from coopq.figure import check_plotting

    check_plotting()
    quiet_libraries()
    asked = work.read_bench(config)
    with progress_bars() as progress:
        results = work.run_bench(asked, out, progress)
    files = [str(path) for path in save_report(asked, results, out)]
    print_result({"files": files, "results": [asdict(result) for result in results]}, "\n".join(files), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder saved by coopq, or any model as for quantize.")],
    tokens: Annotated[int | None, typer.Option(help="Only the first tokens of WikiText-2. (default: all)")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    comparison: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Compare a saved model with what else its budget buys.")
    ] = True,
    run: Annotated[Path | None, typer.Option(help="Run folder of the saved model. (default: MODEL-run)")] = None,
    source: Annotated[str | None, typer.Option(help="Where the full-precision model is now.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Zero-shot accuracy at a task of lm-eval, or of a .jsonl file; instead of perplexity."),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="Only the first questions of each task. (default: all)")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """WikiText-2 perplexity; for a saved model also of full precision, uniform widths and random assignments."""
    from coopq import evaluate as work
    from coopq.checkpoint import is_saved_model
    from coopq.downstream import evaluate_tasks
    from coopq.pipeline import default_run

    quiet_libraries()
    rows = []
    folder = Path(model)
    options: dict[str, Any] = {"length": sequence_length, "max_tokens": tokens, "device": device}
    if task:
        with progress_bars() as progress:
            accuracies = evaluate_tasks(model, task, task_limit, device=device, progress=progress)
        print_result([asdict(of) for of in accuracies], accuracy_table(accuracies, model), as_json)
        return
    with progress_bars() as progress:
        if is_saved_model(folder):
            place = run or default_run(folder)
            evaluation = work.evaluate_saved(folder, place, **options, progress=progress)
        else:
            evaluation = work.evaluate_model(model, **options, progress=progress)
    if not as_json:
        line = (
            f"{model}: perplexity {evaluation.perplexity:.3f}, {evaluation.nll:.5f} nats per token over "
            f"{evaluation.tokens} tokens ({evaluation.text}); {evaluation.bytes / 2**20:.2f} MiB of quantizable weights"
        )
        print_result(None, line, as_json)
    if is_saved_model(folder) and comparison:
        with progress_bars() as progress:
            plan = Plan.load(folder / "plan.json")
            rows = work.compare_plan(plan, place, **options, model=source, progress=progress)
    table = comparison_table(rows, f"{evaluation.text}, {evaluation.tokens} scored")
    if rows or as_json:
        print_result(evaluation_data(evaluation, rows), table, as_json)


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


def _calibration(source: str, tokens: int, length: int, seed: int) -> CalibrationConfig:
    if length < 1 or tokens % length:
        raise CalibrationError(
            f"--tokens {tokens} is not a multiple of --sequence-length {length}; sequences are never padded"
        )
    return CalibrationConfig(source=source, sequences=tokens // length, length=length, seed=seed)


def _screened(config: RunConfig, tokens: int | None) -> RunConfig:
    length = config.calibration.length
    if tokens is not None and tokens % length:
        raise CalibrationError(f"--screen-tokens {tokens} is not a multiple of --sequence-length {length}")
    return replace(config, screening=None if tokens is None else tokens // length)


def _ray(address: str | None, workers: int | None) -> "RayConfig | None":
    if address is None:
        if workers is not None:
            raise EstimationError(f"--workers {workers} goes with a cluster; name one with --ray-address")
        return None
    from coopq.distributed import RayConfig

    return RayConfig(address, workers)


def _bits(text: str) -> tuple[int, int]:
    try:
        low, high = sorted(int(part) for part in text.split(","))
    except ValueError as error:
        raise EstimationError(f"--bits {text!r} is not two widths; write 2,4 for example") from error
    return low, high


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
