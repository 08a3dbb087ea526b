"""Methods side by side on models, backends, budgets and seeds: measured, and kept in files that a later run reads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.quantize import get_backend
from coopq.quantize.bank import measure_storage
from coopq.plan.scores import random_assignments, uniform_assignment
from coopq.judge.bench.config import Bench, Case
from coopq.core.errors import RunError
from coopq.search import Measured, Setting
from coopq.judge.comparison import judge_windows
from coopq.core.files import locked, read_json, require_writable, write_json
from coopq.plan.methods import begin_with_nothing, check_method, check_players, measure, plans_on
from coopq.model.load import load_skeleton
from coopq.plan.plan import setting_of
from coopq.model.players import find_players
from coopq.core.config import RunConfig
from coopq.core.sizes import Budget
from coopq.search.surrogate import best_surrogate
from coopq.core.types import UNTOUCHED, Assignments, ProgressCallback, Width, as_widths, silent
from coopq.game.session import Workbench, check_config, open_workbench

_FORMAT_VERSION = 1
_N_RANDOM = 5


@dataclass(frozen=True)
class Row:
    """What a method came to at a budget.

    Attributes:
        method: Its name, or "full precision", "uniform", "random".
        budget: As the configuration writes it; None for what has no budget.
        assignment: Bits by player; None for the mean of several assignments.
        average_bits: Weight bits alone.
        bits_per_weight: With scales, zeros and padding.
        layer_forwards: What the method took for all budgets of the case together, with shared prefixes.
        calibration_nll: Loss on the calibration set, nats per token.
        windows: Loss on each window of the judging text.
    """

    method: str
    budget: str | None
    assignment: tuple[Width, ...] | None
    average_bits: float
    bits_per_weight: float
    layer_forwards: int
    calibration_nll: float
    windows: tuple[float, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Row":
        """From what `asdict` gave."""
        assignment = None if data["assignment"] is None else tuple(data["assignment"])
        return cls(**{**data, "assignment": assignment, "windows": tuple(data["windows"])})

    @property
    def nll(self) -> float:
        """Loss on the judging text, nats per token."""
        return float(np.mean(self.windows))

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return float(np.exp(self.nll))


@dataclass(frozen=True)
class Result:
    """A case for one seed.

    Attributes:
        case: Name of the case.
        seed: The seed.
        config: The whole configuration.
        blocks: Number of blocks of the model.
        players: Names of the players.
        rows: What was compared.
        shapley: Shapley values by the walks, and their standard errors; None without a method that walks.
        covariance: Of the walks' marginals, which the paper takes for interactions; None likewise.
        interactions: Pair terms of the surrogate fitted to everything measured, at the middle of the sizes.
    """

    case: str
    seed: int
    config: Mapping[str, Any]
    blocks: int
    players: tuple[str, ...]
    rows: tuple[Row, ...]
    shapley: tuple[Sequence[float], Sequence[float]] | None
    covariance: Sequence[Sequence[float]] | None
    interactions: Sequence[Sequence[float]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Result":
        """From what `asdict` gave."""
        fields = {key: value for key, value in data.items() if key not in ("format_version", "asked")}
        rows = tuple(Row.from_json(row) for row in fields.pop("rows"))
        return cls(**{**fields, "rows": rows, "players": tuple(fields["players"])})


def check_bench(bench: Bench) -> None:
    """Check everything that needs no weights, before anything is measured.

    Raises:
        CoopQError: Naming what is wrong.
    """
    for case in bench.cases:
        config = case.config
        check_config(config)
        for method in case.methods:
            check_method(method)
        budgets = [Budget.parse(budget) for budget in case.budgets]
        backend = get_backend(**config.quantizer, bits=config.widths)
        players = find_players(
            load_skeleton(config.model, dtype=config.dtype, device=config.device),
            config.granularity,
            config.embeddings,
        )
        check_players(case.methods, players, len(config.widths))
        storage = measure_storage(players, backend, config.widths)
        for budget in budgets:
            storage.limit(budget, config.low, config.high)


def run_bench(bench: Bench, out: Path, progress: ProgressCallback = silent) -> list[Result]:
    """Measure what is not measured yet; an interrupted bench goes on.

    Args:
        bench: What to compare.
        out: Folder of the work and the results; it is made when missing.
        progress: Told of every step.
    """
    check_bench(bench)
    require_writable(out)
    results = []
    with locked(out):
        runs = [(case, seed) for case in bench.cases for seed in case.seeds]
        for done, (case, seed) in enumerate(runs):
            progress("bench", done, len(runs))
            results.append(_result(bench, case, seed, out, progress))
        progress("bench", len(runs), len(runs))
    return results


def finished(bench: Bench, out: Path) -> tuple[Bench, list[Result]]:
    """What is measured already, of an interrupted bench or one that goes on.

    Returns:
        The bench without the runs that are not finished, and the results of the others.
    Raises:
        RunError: If none is.
    """
    found = {
        (case.name, seed): result
        for case in bench.cases
        for seed in case.seeds
        if (result := _finished(bench, case, seed, out)) is not None
    }
    if not found:
        raise RunError(f"nothing that {bench.title!r} asks for is finished in {out}; run it without --so-far")
    cases = [
        replace(case, seeds=tuple(seed for seed in case.seeds if (case.name, seed) in found)) for case in bench.cases
    ]
    left_out = [
        (case.name, [str(seed) for seed in case.seeds if (case.name, seed) not in found]) for case in bench.cases
    ]
    unfinished = [f"{name} (seeds {' '.join(seeds)})" for name, seeds in left_out if seeds]
    some = replace(bench, cases=tuple(case for case in cases if case.seeds), unfinished=tuple(unfinished))
    return some, list(found.values())


def _finished(bench: Bench, case: Case, seed: int, out: Path) -> Result | None:
    """The result of a run from its file; None if there is none, or one that was asked something else."""
    file = _file(out, case, seed)
    if not file.is_file():
        return None
    data = read_json(file)
    if data.get("format_version") != _FORMAT_VERSION:
        return None
    config = RunConfig.from_json(data["asked"]["config"]).to_json()  # with what later versions ask for
    if {**data["asked"], "config": config} != _asked(bench, case, seed):
        return None
    return Result.from_json(data)


def _file(out: Path, case: Case, seed: int) -> Path:
    return out / "results" / f"{case.name}-seed{seed}.json"


def _asked(bench: Bench, case: Case, seed: int) -> dict[str, Any]:
    """Everything that the result of a run depends on."""
    return {
        "config": case.seeded(seed).to_json(),
        "budgets": list(case.budgets),
        "methods": list(case.methods),
        "judge": [bench.judge_tokens, bench.judge_length],
    }


def _result(bench: Bench, case: Case, seed: int, out: Path, progress: ProgressCallback) -> Result:
    """One run, from its file if it is finished."""
    if (known := _finished(bench, case, seed, out)) is not None:
        return known
    config, file = case.seeded(seed), _file(out, case, seed)
    folder = out / "runs" / case.name
    check = partial(check_players, case.methods, n_widths=len(config.widths))
    # One bank serves all seeds, unless its weights are fitted to the calibration tokens.
    calibrated = get_backend(**config.quantizer, bits=config.widths).calibrated
    bank = None if calibrated else folder / "bank"
    stage = f"{case.name}, seed {seed}: "
    with open_workbench(
        config,
        folder / f"seed{seed}",
        lambda what, *counts: progress(stage + what, *counts),
        check=check,
        bank=bank,
        judge_length=bench.judge_length,
    ) as bench_:
        result = _compare(bench_, bench, case, seed)
    file.parent.mkdir(exist_ok=True)
    asked = _asked(bench, case, seed)
    write_json(file, {"format_version": _FORMAT_VERSION, "asked": asked, **asdict(result)})
    return result


def _compare(bench: Workbench, asked: Bench, case: Case, seed: int) -> Result:
    """All methods on an open workbench."""
    config, budgets = bench.config, [Budget.parse(budget) for budget in case.budgets]
    begin_with_nothing(bench, case.methods, budgets)
    plans = [measure(bench, plan) for method in case.methods for plan in plans_on(bench, method, budgets)]
    groups: list[tuple[str, str | None, int, Assignments]] = list(_references(bench, budgets))
    groups += [
        (plan.method, plan.budget, plan.layer_forwards, np.array([plan.assignment], dtype=np.float32)) for plan in plans
    ]
    points = np.concatenate([assignments for *_, assignments in groups])
    with bench.calibration_game("comparing on the calibration set") as game:
        calibration = game(points)
        known = game.journal.first(len(game.journal))
    windows = judge_windows(bench, points, length=asked.judge_length, max_tokens=asked.judge_tokens)
    rows, start = [], 0
    for method, budget, layer_forwards, assignments in groups:
        end = start + len(assignments)
        is_full = method == "full precision"
        full_bits = 8.0 * bench.loaded.checkpoint_dtype.itemsize
        sizes = [
            (bench.storage.average_bits(of), bench.storage.bits_per_weight(of)) for of in assignments if not is_full
        ]
        average_bits, bits_per_weight = (full_bits, full_bits) if is_full else np.mean(sizes, axis=0).tolist()
        rows.append(
            Row(
                method,
                budget,
                tuple(as_widths(assignments[0])) if len(assignments) == 1 else None,
                average_bits,
                bits_per_weight,
                layer_forwards,
                float(calibration[start:end].mean()),
                tuple(windows[start:end].mean(axis=0).tolist()),
            )
        )
        start = end
    setting = setting_of(bench)
    measured = Measured(setting)
    measured.add(*known)
    estimate = bench.folder.load().estimate if bench.folder.is_estimated else None
    return Result(
        case.name,
        seed,
        config.to_json(),
        bench.players[-1].block + 1,
        tuple(player.name for player in bench.players),
        tuple(rows),
        None if estimate is None else (estimate.shapley.tolist(), estimate.stderr.tolist()),
        None if estimate is None else estimate.covariance.tolist(),
        _by_player(best_surrogate(measured.surrogates(int(setting.costs.sum()) // 2)).quadratic, setting).tolist(),
    )


def _by_player(pairs: npt.NDArray[np.float64], setting: Setting) -> npt.NDArray[np.float64]:
    """Pair terms of steps, shape (n_steps, n_steps), as those of players."""
    return setting.by_player(setting.by_player(pairs), axis=1)


def _references(bench: Workbench, budgets: Sequence[Budget]) -> Iterator[tuple[str, str | None, int, Assignments]]:
    """What has no method: full precision, uniform widths, and random assignments that use up each budget."""
    config, n = bench.config, len(bench.players)
    yield "full precision", None, 0, uniform_assignment(n, UNTOUCHED)[None]
    for bits in reversed(bench.common_widths):
        yield "uniform", None, 0, uniform_assignment(n, bits)[None]
    for budget in budgets:
        limit = bench.storage.limit(budget, config.low, config.high)
        yield (
            "random",
            budget.text,
            0,
            random_assignments(bench.storage, config.widths, limit, _N_RANDOM, config.seed),
        )


def mean_windows(results: Sequence[Result], method: str, budget: str | None) -> npt.NDArray[np.float64] | None:
    """Loss on each judging window of a method at a budget, averaged over seeds; None where it was not asked for."""
    found = [row.windows for result in results for row in result.rows if (row.method, row.budget) == (method, budget)]
    return np.mean(found, axis=0) if found else None
