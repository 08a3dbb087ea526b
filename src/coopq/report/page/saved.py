"""Pages of what lies on disk: a plan, a saved model, a run folder, a comparison, the folder of a bench."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from coopq.core.errors import RunError
from coopq.core.files import read_json
from coopq.core.specs import Request
from coopq.game.run_folder import RunFolder
from coopq.judge.results import Comparison
from coopq.plan.plan import Plan, load_plans
from coopq.report.page.ranking.page import save_bench_page, save_comparison_page
from coopq.report.page.run.page import save_run_page

REPORT = "report.html"


class _SavedComparison(Struct, frozen=True):
    """comparison.json."""

    request: Request
    text: str
    comparison: list[Comparison]


def write_pages(path: Path) -> list[Path]:
    """Write the pages of a plan file, a saved model, a run folder or the folder of a bench.

    Returns:
        The HTML files: in the run folder, in the bench's folder, or beside a plan whose run folder is gone.
    Raises:
        CoopQError: If nothing is found, or a file is damaged.
    """
    path = path.expanduser().resolve()
    if path.is_file():
        return [_plan_page(path, path.parent.parent)]
    if (path / "plan.json").is_file():
        return [_plan_page(path / "plan.json", path.with_name(f"{path.name}-run"), path.name)]
    if (path / "results").is_dir():
        from coopq.judge.bench.results import load_results

        return [save_bench_page(path.name, load_results(path), path / REPORT)]
    return list(_run_pages(path))


def write_report(plan: Plan, out: Path, run: Path | None) -> Path:
    """Write the page of a finished job; beside the output, if the run folder was deleted.

    Args:
        plan: The plan.
        out: What the job made.
        run: The run folder; None stands for "<out>-run".
    """
    out = out.expanduser().resolve()
    run = out.with_name(f"{out.name}-run") if run is None else run.expanduser().resolve()
    if run.is_dir():
        return save_run_page(plan, run, out.name, run / REPORT)
    return save_run_page(plan, None, out.name, out.with_name(f"{out.name}-{REPORT}"))


def _plan_page(file: Path, run: Path, out: str = "OUT") -> Path:
    """The page of one plan; `run` is used if it is a run folder."""
    plan = Plan.load(file)
    if (run / "run.json").is_file():
        name = REPORT if file.name == "plan.json" else f"report-{file.stem}.html"
        return save_run_page(plan, run, out, run / name)
    beside = file.parent if file.name == "plan.json" else file.with_suffix("")  # a saved model's folder stays as it is
    return save_run_page(plan, None, out, beside.with_name(f"{beside.name}-{REPORT}"))


def _run_pages(run: Path) -> Iterator[Path]:
    """The page of a run folder's comparison, or else one for each plan; a plan's own path gives the plan's page."""
    folder, comparison = RunFolder(run), run / "comparison.json"
    folder.request()  # says what else the folder is
    if comparison.is_file():
        found = _read_comparison(comparison)
        yield save_comparison_page(found.request, found.text, found.comparison, run / REPORT)
        return
    files = sorted(folder.plans.glob("*.json"))
    if not files:
        raise RunError(f"{run} holds no plan yet; repeat the command that it was started with")
    for file, plan in zip(files, load_plans(files), strict=True):
        name = REPORT if len(files) == 1 else f"report-{file.stem}.html"
        yield save_run_page(plan, run, run.name.removesuffix("-run"), run / name)


def _read_comparison(path: Path) -> _SavedComparison:
    """The comparison of a run folder.

    Raises:
        RunError: If the file is not what this version writes.
    """
    try:
        return msgspec.convert(read_json(path), _SavedComparison)
    except msgspec.ValidationError as error:
        raise RunError(f"{path} is not a comparison of this version ({error}); run coopq compare again") from error
