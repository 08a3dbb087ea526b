"""Commands that judge: perplexity and accuracy on text and tasks that no search sees."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from coopq.cli.options import PLACE, SectionedCommand, as_json, is_named, takes
from coopq.cli.terminal import print_result, progress_bars, quiet_libraries
from coopq.core.errors import OptionError
from coopq.core.files import expanded
from coopq.core.spec_base import spelled
from coopq.core.specs import Request

_WINDOW = "2048, or what the model has."


@click.command(cls=SectionedCommand)
@takes(Request, without=("target", "base", "context"))
@click.option("--budget", multiple=True, required=True, help="As for quantize; may be given several times.")
@click.option("--run", type=PLACE, required=True, help="Folder of the work; the numbers and the figure land there too.")
@click.option(
    "--method", multiple=True, help="May be given several times; `coopq methods` lists them. Default: the usual."
)
@click.option("--judge-tokens", type=int, help="Only the first tokens of WikiText-2. Default: all.")
@click.option("--judge-length", type=int, help=f"Tokens of a WikiText-2 window. Default: {_WINDOW}")
@as_json
def compare(
    request: Request,
    budget: tuple[str, ...],
    run: Path,
    method: tuple[str, ...],
    judge_tokens: int | None,
    judge_length: int | None,
    as_json: bool,
) -> None:
    """Compare methods at several budgets, judged on WikiText-2: one table, one figure. Run it again and it goes on."""
    from rich.console import Group
    from rich.text import Text

    from coopq.judge import comparison as work
    from coopq.judge.evaluation import window_length
    from coopq.model.texts import HeldOut
    from coopq.report.data import comparison_data
    from coopq.report.judged import comparison_table
    from coopq.report.page.ranking.page import save_comparison_page
    from coopq.report.page.saved import COMPARISON, SavedComparison
    from coopq.report.plots import save_comparison

    quiet_libraries()
    length = window_length(request.model.source) if judge_length is None else judge_length
    held_out = HeldOut(length, judge_tokens)
    with progress_bars() as progress:
        rows = work.compare(request, budget, run, held_out, methods=method or work.COMPARED, progress=progress)
    text = held_out.text
    file = SavedComparison(request, held_out, rows).save(run)
    widths = request.widths
    title = f"{request.model.source}, {request.quantizer.backend}, {widths.text} bits by {widths.granularity}: {text}"
    files = save_comparison(rows, title, run / "comparison")
    page = save_comparison_page(request, held_out, rows, run / COMPARISON)
    saved = ", ".join(map(str, [file, *files, page]))
    print_result(
        comparison_data(request, text, rows), Group(comparison_table(rows, text), Text(f"saved in {saved}")), as_json
    )


@click.command(cls=SectionedCommand)
@click.argument("config", type=PLACE)
@click.option("--out", type=PLACE, required=True, help="Folder of the work and of the report.")
@click.option("--so-far", is_flag=True, help="Measure nothing: report what is finished, also while the bench goes on.")
@as_json
def bench(config: Path, out: Path, so_far: bool, as_json: bool) -> None:
    """Compare methods as the TOML file CONFIG says: models, backends, budgets, seeds. An interrupted one continues."""
    from coopq.judge.bench import run as work
    from coopq.judge.bench.aggregate import check_pandas
    from coopq.judge.bench.config import read_bench
    from coopq.report.bench_tables import save_report
    from coopq.report.data import bench_data
    from coopq.report.page.ranking.page import save_bench_page
    from coopq.report.page.saved import REPORT

    check_pandas()
    quiet_libraries()
    asked = read_bench(config)
    if so_far:
        asked, results = work.finished(asked, out)
    else:
        with progress_bars() as progress:
            results = work.run_bench(asked, out, progress)
    files = [*save_report(asked, results, out), save_bench_page(asked.title, results, out / REPORT)]
    print_result(bench_data(files, results), "\n".join(map(str, files)), as_json)


@click.command(cls=SectionedCommand)
@click.argument("model")
@click.option(
    "--text", type=PLACE, help="Also judge on this .txt or .jsonl file. Use text that is not the calibration text."
)
@click.option("--tokens", type=int, help="Only the first tokens of each text. Default: all.")
@click.option("--sequence-length", type=int, help=f"Tokens of a window. Default: {_WINDOW}")
@click.option(
    "--reference",
    help="The original that divergence is measured from. Default: the model of the plan; name it if it has moved, or "
    "'none' to measure no divergence. If MODEL and the original are .gguf files, llama.cpp computes.",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    help="Compare a saved model with the original, uniform widths, random widths, and llama.cpp's mix of the size.",
)
@click.option(
    "--run", type=PLACE, help="Run folder of the saved model. Default: MODEL-run, or the folder around RUN/saved/NAME."
)
@click.option(
    "--task", multiple=True, help="Zero-shot accuracy at a task of lm-eval, or of a .jsonl file; instead of perplexity."
)
@click.option("--task-limit", type=int, help="Only the first questions of each task. Default: all.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@as_json
def evaluate(
    model: str,
    text: Path | None,
    tokens: int | None,
    sequence_length: int | None,
    reference: str | None,
    compare: bool,
    run: Path | None,
    task: tuple[str, ...],
    task_limit: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure how far MODEL is from its original (KL divergence), and its perplexity, on WikiText-2 and your text."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from coopq.export.checkpoint import SavedModel
    from coopq.game.run_folder import default_run
    from coopq.judge.judge import Judge
    from coopq.model.texts import WIKITEXT2, HeldOut
    from coopq.report.data import evaluation_data
    from coopq.report.judged import comparison_table, evaluation_text
    from coopq.report.page.saved import write_judged

    quiet_libraries()
    of_texts = ("text", "tokens", "sequence_length", "reference", "compare", "run")
    if task and (named := [name for name in of_texts if is_named(name)]):
        raise OptionError(f"--task measures accuracy, and --{spelled(named[0])} is for texts; leave one of the two out")
    if task_limit is not None and not task:
        raise OptionError(f"--task-limit {task_limit} goes with --task; name a task")
    if task:
        _evaluate_tasks(model, task, task_limit, device, as_json)
        return
    saved = SavedModel(expanded(model))
    asked = {"compare": compare and is_named("compare"), "run": is_named("run")}
    if not saved.exists and (named := [name for name, is_asked in asked.items() if is_asked]):
        raise OptionError(f"--{named[0]} is for models that coopq saved, and {model} is none; leave it out")
    judge = Judge(model, reference, run or default_run(Path(model)), compare, device)
    length = judge.window_length() if sequence_length is None else sequence_length
    texts = [HeldOut(length, tokens, source) for source in (WIKITEXT2, *([] if text is None else [str(text)]))]
    for each in texts:
        each.check()
    with progress_bars() as progress:  # the own text first: it may be too short, and WikiText-2 takes long
        judged = [judge.judge(each, progress) for each in reversed(texts)][::-1]
    data: list[dict[str, Any]] = []
    shown: list[str | Table | Text] = []
    for evaluation, rows in judged:
        data.append(evaluation_data(evaluation, rows))
        shown.append(evaluation_text(model, evaluation))
        if rows:
            shown.append(comparison_table(rows, f"{evaluation.text}, {evaluation.tokens} scored"))
    own: dict[str, Any] = {"own_text": data[1]} if len(data) > 1 else {}
    if saved.exists and (page := write_judged(saved.plan, saved.folder, judge.run, judged)) is not None:
        own["report"] = str(page)
        shown.append(Text(f"report: {page}"))
    print_result(data[0] | own, Group(*shown), as_json)


def _evaluate_tasks(model: str, tasks: tuple[str, ...], limit: int | None, device: str, as_json: bool) -> None:
    """Zero-shot accuracy instead of perplexity."""
    from coopq.judge.zero_shot import evaluate_tasks
    from coopq.report.judged import accuracy_table

    with progress_bars() as progress:
        accuracies = evaluate_tasks(model, tasks, limit, device=device, progress=progress)
    print_result([asdict(accuracy) for accuracy in accuracies], accuracy_table(accuracies, model), as_json)
