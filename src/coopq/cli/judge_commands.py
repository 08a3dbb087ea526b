"""Commands that judge: perplexity and accuracy on text and tasks that no search sees."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from coopq.core.files import write_json
from coopq.cli.options import METHOD_HELP, Device, Json, measures
from coopq.plan.plan import Plan
from coopq.report.tables import accuracy_table, comparison_table, evaluation_data
from coopq.core.config import RunConfig
from coopq.cli.terminal import print_result, progress_bars, quiet_libraries


@measures("target", "base", "context")
def compare(
    config: RunConfig,
    budget: Annotated[list[str], typer.Option(help="As for quantize; may be given several times.")],
    run: Annotated[Path, typer.Option(help="Folder of the work; the figure and the numbers land there too.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"May be given several times. (default: the usual ones) {METHOD_HELP}")
    ] = None,
    judge_tokens: Annotated[int | None, typer.Option(help="Only the first tokens of WikiText-2 (default: all)")] = None,
    judge_length: Annotated[int, typer.Option(help="Tokens of a WikiText-2 window.")] = 2048,
    as_json: Json = False,
) -> None:
    """Searches and baselines at several budgets, judged on WikiText-2: one table, one figure. Resumes."""
    from coopq.judge import comparison as work
    from coopq.report.plots import check_plotting, save_comparison

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
    title = f"{config.model}, {config.backend}, {config.widths_text} bits by {config.granularity}: {text}"
    files = save_comparison(rows, title, run / "comparison")
    saved = ", ".join(map(str, [run / "comparison.json", *files]))
    print_result(data, Group(comparison_table(rows, text), Text(f"saved in {saved}")), as_json)


def bench(
    config: Annotated[Path, typer.Argument(help="A TOML file of models, backends, widths, budgets, methods, seeds.")],
    out: Annotated[Path, typer.Option(help="Folder of the work and of the report.")],
    so_far: Annotated[
        bool, typer.Option("--so-far", help="Measure nothing: report what is finished, also while it goes on.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Methods side by side over models, backends, budgets and seeds: tables, figures, intervals. Resumes."""
    from coopq.judge.bench import run as work
    from coopq.judge.bench.config import read_bench
    from coopq.report.bench_tables import save_report
    from coopq.report.plots import check_plotting

    check_plotting()
    quiet_libraries()
    asked = read_bench(config)
    if so_far:
        asked, results = work.finished(asked, out)
    else:
        with progress_bars() as progress:
            results = work.run_bench(asked, out, progress)
    files = [str(path) for path in save_report(asked, results, out)]
    print_result({"files": files, "results": [asdict(result) for result in results]}, "\n".join(files), as_json)


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
    from coopq.judge import comparison as work
    from coopq.export.checkpoint import is_saved_model
    from coopq.judge.zero_shot import evaluate_tasks
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
