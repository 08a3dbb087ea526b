"""Pages of what lies on disk: a plan, a saved model, a run folder, a comparison, the folder of a bench."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

from coopq.core.errors import RunError
from coopq.core.files import as_plain, expanded, read_record, write_record
from coopq.core.specs import Request
from coopq.game.run_folder import Delivered, RunFolder, default_run
from coopq.judge.results import Comparison, Evaluation, JudgedPlan, keep_judged
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan, load_plans
from coopq.report.page.ranking.page import save_bench_page, save_comparison_page
from coopq.report.page.run.page import save_run_page

REPORT, COMPARISON = "report.html", "comparison.html"
_COMPARISON, _FORMAT_VERSION = "comparison.json", 1


class SavedComparison(Struct, frozen=True):
    """A comparison: what was asked for, the judging text, and the rows."""

    request: Request
    held_out: HeldOut
    comparison: list[Comparison]

    def save(self, run: Path) -> Path:
        """Write comparison.json into a run folder; returns its path."""
        write_record(run / _COMPARISON, self, _FORMAT_VERSION)
        return run / _COMPARISON

    @classmethod
    def load(cls, run: Path) -> "SavedComparison":
        """The comparison of a run folder.

        Raises:
            RunError: If the file is not what this version writes.
        """
        file, again = run / _COMPARISON, "run coopq compare again"
        missing = f"{file} is missing; {again}"
        return read_record(
            file, cls, _FORMAT_VERSION, what="comparison", missing=missing, way_out=again, error=RunError
        )


def write_pages(path: Path) -> list[Path]:
    """Write the pages of a plan file, a saved model, a run folder or the folder of a bench.

    Returns:
        The HTML files: in the run folder, in the bench's folder, or beside a plan whose run folder is gone.
    Raises:
        CoopQError: If nothing is found, or a file is damaged.
    """
    path = expanded(path).resolve()
    if path.name == "plan.json":
        path = path.parent
    if path.is_file():
        return [_plan_page(path, path.parent.parent)]
    if (path / "plan.json").is_file():
        return [_plan_page(path / "plan.json", default_run(path), path)]
    if (path / "results").is_dir():
        from coopq.judge.bench.results import load_results

        return [save_bench_page(path.name, load_results(path), path / REPORT)]
    pages = write_run_pages(path)
    if not pages:
        raise RunError(f"{path} holds no plan yet; repeat the command that it was started with")
    return pages


def write_run_pages(run: Path) -> list[Path]:
    """Write the page of a run folder's comparison, and one for each plan; none if the folder holds neither.

    Raises:
        CoopQError: If the path is no run folder, or a file is damaged.
    """
    run = expanded(run).resolve()
    folder, pages = RunFolder(run), []
    folder.request()  # says what else the folder is
    if (run / _COMPARISON).is_file():
        found = SavedComparison.load(run)
        pages.append(save_comparison_page(found.request, found.held_out, found.comparison, run / COMPARISON))
    for plan in load_plans(sorted(folder.plans.glob("*.json"))):
        pages.append(_page_of_run(plan, run))
    return pages


def write_report(plan: Plan, out: Path, run: Path | None) -> Path:
    """Write the page of a finished job; beside the output, if the run folder was deleted.

    Args:
        plan: The plan.
        out: What the job made.
        run: The run folder; None stands for the default.
    """
    out = expanded(out).resolve()
    run = default_run(out) if run is None else expanded(run).resolve()
    if run.is_dir():
        return save_run_page(plan, run, out.name, run / _page_name(plan))
    return save_run_page(plan, None, out.name, out.with_name(f"{out.name}-{REPORT}"))


def write_judged(
    plan: Plan, saved: Path, run: Path, judged: Iterable[tuple[Evaluation, list[Comparison]]]
) -> Path | None:
    """Keep what was found out about a saved model, and write the page of its plan again.

    Args:
        plan: The plan of the model.
        saved: Folder of the model.
        run: Its run folder; nothing is kept if the folder was deleted.
        judged: The evaluation and the comparison on each text.
    Returns:
        The page, if there is a run folder.
    """
    run = expanded(run).resolve()
    if not (run / "run.json").is_file():
        return None
    for evaluation, rows in judged:
        keep_judged(run, JudgedPlan(as_plain(plan.fingerprint), plan.assignment, evaluation, rows))
    return write_report(plan, _output(expanded(saved).resolve(), run), run)


def _page_name(plan: Plan) -> str:
    """The file of a plan's page in a run folder: each size has its own."""
    return f"report-{Path(plan.file_name).stem}.html"


def _output(saved: Path, run: Path) -> Path:
    """What a job made: the saved model, or what an engine loads if the model was saved on the way to that."""
    record = saved.with_name(f"{saved.name}.json")
    return (run / Delivered.load(record).out).resolve() if run in saved.parents and record.is_file() else saved


def _page_of_run(plan: Plan, run: Path) -> Path:
    """The page of a plan in its run folder: of the plan as saved, which has the file's exact size, if a model was."""
    page = run / _page_name(plan)
    for saved, out in _made(plan, run):
        if out.exists():
            own = Plan.load(saved / "plan.json") if (saved / "plan.json").is_file() else plan
            return save_run_page(own if own.budget == plan.budget else plan, run, out.name, page)
    return save_run_page(plan, run, None, page)


def _made(plan: Plan, run: Path) -> Iterator[tuple[Path, Path]]:
    """Saved models of a plan, and what was made of each."""
    for file in sorted(run.glob("saved/*.json")):
        record = Delivered.load(file)
        if record.bits == plan.assignment and record.form == plan.request.target.form and record.is_whole:
            yield file.with_suffix(""), (run / record.out).resolve()
    own = run.with_name(run.name.removesuffix("-run"))
    if (own / "plan.json").is_file() and Plan.load(own / "plan.json").assignment == plan.assignment:
        yield own, own


def _plan_page(file: Path, run: Path, saved: Path | None = None) -> Path:
    """The page of one plan; `run` is used if it is a run folder, and `saved` is the model if the path names one."""
    plan = Plan.load(file)
    if (run / "run.json").is_file():
        if saved is None:
            return _page_of_run(plan, run)
        return save_run_page(plan, run, _output(saved, run).name, run / _page_name(plan))
    beside = file.with_suffix("") if saved is None else saved  # a saved model's folder stays as it is
    name = None if saved is None else saved.name
    return save_run_page(plan, None, name, beside.with_name(f"{beside.name}-{REPORT}"))
