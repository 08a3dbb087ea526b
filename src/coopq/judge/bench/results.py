"""What a bench finds out, and the files that keep it."""

from pathlib import Path

import numpy as np
from msgspec import Struct

from coopq.core.errors import RunError
from coopq.core.files import read_record, write_record
from coopq.core.specs import Request
from coopq.judge.bench.config import Bench, Case

_FORMAT_VERSION = 4


class Row(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a method finds for a budget, or what a reference is.

    Attributes:
        method: Name of the method, or one of `coopq.judge.references.REFERENCES`.
        budget: The budget as the TOML file writes it; None for the original and uniform widths.
        width: The width that was asked of every player; None except for uniform widths.
        assignment: Width of each player; None for the mean of several assignments.
        average_bits: Width averaged over the weights; scales and zeros do not count.
        bits_per_weight: Stored bits per weight; scales, zeros and padding count.
        block_forwards: Block forwards that the method takes for all budgets of the case together, prefixes shared.
        calibration_loss: Loss on the calibration set, nats per token; `Result.loss` says which loss.
        windows: Negative log-likelihood on each window of WikiText-2, nats per token.
    """

    method: str
    budget: str | None
    width: int | float | None
    assignment: tuple[int | float, ...] | None
    average_bits: float
    bits_per_weight: float
    block_forwards: int
    calibration_loss: float
    windows: tuple[float, ...]

    @property
    def nll(self) -> float:
        """Negative log-likelihood on WikiText-2, nats per token."""
        return float(np.mean(self.windows))

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return float(np.exp(self.nll))


class Result(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One run: a case for one seed.

    Attributes:
        case: Name of the case.
        seed: The seed.
        request: What was measured.
        loss: Which loss `Row.calibration_loss` is: "nll" or "kl".
        blocks: Number of blocks of the model.
        players: Names of the players.
        rows: The references, then each method at each budget.
        shapley: Shapley values by the walks, and their standard errors, each of shape (n_players,), nats per token;
            None without a method that walks.
        covariance: Covariance of the walks' marginal contributions, which the paper takes for interactions, shape
            (n_players, n_players); None likewise.
        interactions: What two players lose together beyond their sum, by a quadratic fitted to everything measured,
            for the budget halfway between the lowest and the highest width, shape (n_players, n_players), nats per
            token.
    """

    case: str
    seed: int
    request: Request
    loss: str
    blocks: int
    players: tuple[str, ...]
    rows: tuple[Row, ...]
    shapley: tuple[tuple[float, ...], tuple[float, ...]] | None
    covariance: tuple[tuple[float, ...], ...] | None
    interactions: tuple[tuple[float, ...], ...]


class _Record(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file of a run: the result, and what else the result depends on."""

    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    judge_tokens: int | None
    judge_length: int
    result: Result


def save_result(bench: Bench, case: Case, result: Result, out: Path) -> None:
    """Write the result of a run into the folder of a bench."""
    path = _path(out, case, result.seed)
    path.parent.mkdir(exist_ok=True)
    write_record(path, _record(bench, case, result), _FORMAT_VERSION)


def load_result(bench: Bench, case: Case, seed: int, out: Path) -> Result | None:
    """The result of a run from its file; None without a file, or if the run was asked something else.

    Raises:
        RunError: If the file cannot be read.
    """
    path = _path(out, case, seed)
    if not path.is_file():
        return None
    found = _read(path)
    is_asked = found.result.request == case.seeded(seed) and found == _record(bench, case, found.result)
    return found.result if is_asked else None


def load_results(out: Path) -> list[Result]:
    """The results of all runs in the folder of a bench, whatever the bench asked for, by the names of their files.

    Raises:
        RunError: If there is none, a file cannot be read, or the runs were judged on different texts.
    """
    files = sorted((out / "results").glob("*.json"))
    if not files:
        raise RunError(f"{out} holds no result of a bench; run the bench first")
    records = [_read(path) for path in files]
    if len({(record.judge_tokens, record.judge_length) for record in records}) > 1:
        raise RunError(
            f"{out / 'results'} holds results on judging texts of different lengths; delete the older files, or run "
            "the bench again"
        )
    return [record.result for record in records]


def _read(path: Path) -> _Record:
    """The file of a run, checked.

    Raises:
        RunError: If the file cannot be read.
    """
    found = read_record(
        path,
        _Record,
        _FORMAT_VERSION,
        what="result of a bench",
        missing=f"{path} is gone; run the bench again",
        way_out="delete the file to measure the run again",
        error=RunError,
    )
    if (wrong := _contradiction(found.result)) is not None:
        raise RunError(f"{path} contradicts itself: {wrong}; delete the file to measure the run again")
    return found


def _contradiction(result: Result) -> str | None:
    """What in a result cannot be true beside the rest; None if nothing is found."""
    n = len(result.players)
    if any(row.assignment is not None and len(row.assignment) != n for row in result.rows):
        return f"an assignment has another number of widths than {n}, the number of players"
    if len({len(row.windows) for row in result.rows}) != 1 or not result.rows[0].windows:
        return "rows have different numbers of windows"
    matrices = [matrix for matrix in (result.covariance, result.interactions) if matrix is not None]
    rows = [row for matrix in matrices for row in (matrix, *matrix)] + list(result.shapley or ())
    if any(len(row) != n for row in rows):
        return f"a list has another number of values than {n}, the number of players"
    return None


def _path(out: Path, case: Case, seed: int) -> Path:
    return out / "results" / f"{case.name}-seed{seed}.json"


def _record(bench: Bench, case: Case, result: Result) -> _Record:
    return _Record(
        budgets=case.budgets,
        methods=case.methods,
        judge_tokens=bench.judge_tokens,
        judge_length=bench.judge_length,
        result=result,
    )
