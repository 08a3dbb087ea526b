"""Models that the benchmarks measure: sessions, plans, saved models and their losses."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import coopq
from _common import DATA
from coopq.cli.terminal import progress_bars
from coopq.core.files import as_plain, read_json, write_json
from coopq.core.sizes import Budget
from coopq.core.specs import Request
from coopq.core.types import Losses
from coopq.export.checkpoint import SavedModel, Source, save_model
from coopq.export.formats import TargetFile
from coopq.game.engines.prefix_engine import model_nll
from coopq.game.prepared import prepare
from coopq.game.session import Session, open_session
from coopq.judge.comparison import make_measured_plans
from coopq.model.load import load_model
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan


def source_of(name: str) -> str:
    """Where a model is: a reference model is a folder of benchmarks/data; any other name is taken as it is."""
    folder = DATA / name
    return str(folder) if folder.is_dir() else name


@contextmanager
def session_on(request: Request, folder: Path, *, bank: Path | None = None) -> Iterator[Session]:
    """An open session with progress bars.

    Args:
        request: What to measure.
        folder: The run folder.
        bank: Folder of the weight bank, if several runs share a bank.
    """
    prepared = prepare(request, target=TargetFile())
    with progress_bars() as progress, open_session(prepared, folder, progress, bank=bank) as session:
        yield session


def measured_plans(session: Session, method: str, budgets: Sequence[str]) -> list[Plan]:
    """The plans of budgets by a method, their losses on the calibration set measured."""
    return make_measured_plans(session, [method], [Budget.parse(budget) for budget in budgets])


def save_plan(session: Session, plan: Plan, out: Path) -> Plan:
    """Save the model of a plan with the weights of an open session; returns the plan as it was saved."""
    return save_model(Source.from_session(session), plan, out, session.progress)


def saved_model(session: Session, plan: Plan, folder: Path) -> SavedModel:
    """The saved model of a plan; a folder that holds another assignment, or other weights, is made anew."""
    saved = SavedModel(folder)
    if saved.exists and _made_from(saved.plan) != _made_from(plan):
        shutil.rmtree(folder)
        _losses_file(folder).unlink(missing_ok=True)
    if not saved.exists:
        save_plan(session, plan, folder)
    return SavedModel(folder)


def _made_from(plan: Plan) -> Any:
    """What the weights of a saved model depend on."""
    return plan.assignment, as_plain(plan.fingerprint)


def _losses_file(saved: Path) -> Path:
    """The file of a saved model's losses, beside the model's folder."""
    return saved.with_name(f"{saved.name}.json")


def saved_losses(saved: Path, tokens: npt.NDArray[np.int64]) -> Losses:
    """Losses of a saved model on each sequence of tokens, nats per token; kept in a file beside the model's folder."""
    file = _losses_file(saved)
    if not file.exists():
        write_json(file, sequence_losses(coopq.load(saved, device="cpu"), tokens).tolist())
    return np.array(read_json(file))


def full_precision_losses(name: str, length: int, max_tokens: int) -> Losses:
    """Losses of a model in full precision on each window of WikiText-2, nats per token."""
    loaded = load_model(source_of(name), device="cpu")
    return sequence_losses(loaded.model, HeldOut(length, max_tokens).windows(loaded.tokenizer).tokens)


def sequence_losses(model: object, tokens: npt.NDArray[np.int64]) -> Losses:
    """Losses of a model on each sequence of tokens, nats per token, shape (n_sequences,)."""
    return np.concatenate(list(model_nll(model, tokens)))
