"""Runs of a bench: methods side by side on models, backends, budgets and seeds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coopq.core.errors import RunError
from coopq.core.files import locked, require_writable
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.core.types import ProgressCallback, as_widths, silent
from coopq.export.formats import TargetFile
from coopq.game.journal import Journal
from coopq.game.prepared import Prepared, prepare
from coopq.game.session import Session, open_session
from coopq.judge.bench.config import Bench, Case
from coopq.judge.bench.results import Result, Row, load_result, save_result
from coopq.judge.comparison import Judged, beside_references, make_measured_plans
from coopq.judge.windows import judging_text
from coopq.model.texts import HeldOut
from coopq.plan.allocate import search_space
from coopq.plan.estimation import find_estimation
from coopq.plan.methods import check_methods, get_method
from coopq.search import Measured, SearchSpace


def check_bench(bench: Bench) -> None:
    """Check everything that needs no weights, before anything is measured.

    Raises:
        CoopQError: Naming what is wrong.
    """
    _text(bench).check()
    for case in bench.cases:
        for method in case.methods:
            get_method(method)
        _prepare(bench, case, case.request)


def run_bench(bench: Bench, out: Path, progress: ProgressCallback = silent) -> list[Result]:
    """Measure what is not measured yet; an interrupted bench goes on.

    Args:
        bench: What to compare.
        out: Folder of the work and of the results; it is made if it is missing.
        progress: Told of every step.
    Returns:
        A result for each case and seed.
    Raises:
        CoopQError: As `check_bench`.
    """
    check_bench(bench)
    require_writable(out)
    results = []
    with locked(out):
        runs = list(_runs(bench))
        for done, (case, seed) in enumerate(runs):
            progress("bench", done, len(runs))
            result = load_result(bench, case, seed, out)
            results.append(_run(bench, case, seed, out, progress) if result is None else result)
        progress("bench", len(runs), len(runs))
    return results


def finished(bench: Bench, out: Path) -> tuple[Bench, list[Result]]:
    """What is measured already, of a bench that was interrupted or still goes on.

    Returns:
        The bench without the runs that are not finished, and the results of the other runs.
    Raises:
        RunError: If no run is finished.
    """
    found = {
        (case.name, seed): result
        for case, seed in _runs(bench)
        if (result := load_result(bench, case, seed, out)) is not None
    }
    if not found:
        raise RunError(f"nothing that {bench.title!r} asks for is finished in {out}; run it without --so-far")
    cases, unfinished = [], []
    for case in bench.cases:
        seeds = tuple(seed for seed in case.seeds if (case.name, seed) in found)
        missing = [str(seed) for seed in case.seeds if seed not in seeds]
        cases += [replace(case, seeds=seeds)] if seeds else []
        unfinished += [f"{case.name} (seeds {' '.join(missing)})"] if missing else []
    return replace(bench, cases=tuple(cases), unfinished=tuple(unfinished)), list(found.values())


def _text(bench: Bench) -> HeldOut:
    return HeldOut(bench.judge_length, bench.judge_tokens)


def _runs(bench: Bench) -> Iterator[tuple[Case, int]]:
    return ((case, seed) for case in bench.cases for seed in case.seeds)


def _prepare(bench: Bench, case: Case, request: Request) -> Prepared:
    """A request of a case, checked with the methods and the budgets of the case."""
    budgets = [Budget.parse(budget) for budget in case.budgets]
    prepared = prepare(request, target=TargetFile(), judge_length=bench.judge_length)
    check_methods(case.methods, prepared)
    prepared.check_budgets(budgets)
    return prepared


def _run(bench: Bench, case: Case, seed: int, out: Path, progress: ProgressCallback) -> Result:
    """Measure one run, and save its result."""
    folder = out / "runs" / case.name
    prepared = _prepare(bench, case, case.seeded(seed))
    # All seeds share one bank, unless its weights are fitted to tokens.
    bank = None if prepared.backend.calibrated else folder / "bank"
    stage = f"{case.name}, seed {seed}: "
    with open_session(
        prepared,
        folder / f"seed{seed}",
        lambda what, *counts: progress(stage + what, *counts),
        bank=bank,
    ) as session:
        result = _compare(session, bench, case, seed)
    save_result(bench, case, result, out)
    return result


def _compare(session: Session, bench: Bench, case: Case, seed: int) -> Result:
    """All methods of a case in an open session."""
    budgets = [Budget.parse(budget) for budget in case.budgets]
    text = _text(bench)
    judging_text(session, text)  # a text that is too short is an error before the plans
    plans = make_measured_plans(session, case.methods, budgets)
    judged = beside_references(session, plans, session.request.search.seed, text)
    walks = any(get_method(method).kind == "walks" for method in case.methods)
    estimation = find_estimation(session.folder.path) if walks else None
    estimate = None if estimation is None else estimation.estimate
    return Result(
        case=case.name,
        seed=seed,
        request=session.request,
        loss=session.request.search.loss,
        blocks=session.blocks[-1] + 1,
        players=tuple(player.name for player in session.players),
        rows=tuple(map(_row, judged)),
        shapley=None if estimate is None else (tuple(estimate.shapley.tolist()), tuple(estimate.stderr.tolist())),
        covariance=None if estimate is None else _as_tuples(estimate.covariance),
        interactions=_as_tuples(_interactions(session)),
    )


def _row(judged: Judged) -> Row:
    return Row(
        method=judged.method,
        budget=judged.budget,
        width=judged.width,
        assignment=tuple(as_widths(judged.assignments[0])) if len(judged.assignments) == 1 else None,
        average_bits=judged.average_bits,
        bits_per_weight=judged.bits_per_weight,
        block_forwards=judged.block_forwards,
        calibration_loss=float(judged.calibration.mean()),
        windows=tuple(judged.windows.mean(axis=0).tolist()),
    )


def _interactions(session: Session) -> npt.NDArray[np.float64]:
    """Pair terms of players in a surrogate fitted to everything measured, as `pair_terms` has them."""
    space = search_space(session)
    measured = Measured(space)
    with Journal(session.folder.journal, session.fingerprint) as journal:
        measured.add(*journal.first(len(journal)))
    return pair_terms(space, measured)


def pair_terms(space: SearchSpace, measured: Measured) -> npt.NDArray[np.float64]:
    """What two players lose together beyond their sum, by a quadratic fitted to losses, halfway between the widths.

    Returns:
        Symmetric, shape (n_players, n_players), nats per token.
    """
    raw = measured.surrogates(int(space.step_bytes.sum()) // 2)[0]  # the quadratic of the loss itself
    terms = space.sum_by_player(space.sum_by_player(2 * raw.K), axis=1)  # q'Kq holds each pair twice
    np.fill_diagonal(terms, 0.0)  # steps of one player
    return terms


def _as_tuples(matrix: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, matrix.tolist()))
