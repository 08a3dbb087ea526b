"""Perplexity of models and plans on text that no search has seen."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.plan.scores import PAPER_BASELINES, random_assignments, uniform_assignment
from coopq.model.texts import TokenSet, wikitext2
from coopq.export.checkpoint import fingerprint_saved, load, saved_bytes
from coopq.game.prefix_engine import model_nll
from coopq.core.files import locked, require_writable
from coopq.model.offload import HostedBlocks
from coopq.game.journal import Journal
from coopq.model.memory import weights_fit
from coopq.plan.methods import check_method, check_players, measure, plans_on
from coopq.model.load import load_model, max_positions, pick_device
from coopq.plan.plan import Plan
from coopq.model.players import find_players
from coopq.core.config import RunConfig
from coopq.judge.results import Comparison, Evaluation
from coopq.core.sizes import Budget
from coopq.core.types import UNTOUCHED, Assignment, Assignments, Losses, ProgressCallback, silent
from coopq.game.session import Workbench, open_workbench

_HIDDEN_BYTES = 2**31
"""Hidden states that the prefix walk may hold at once, one for each depth; longer texts go in portions."""
_N_RANDOM = 5
_RANDOM_SEED = 0
COMPARED = ("active", "coopq", "shapley", "interactions", "fisher", *PAPER_BASELINES)
"""Methods that are compared unless others are named: those that take little beside the walks. `shapley` and
`interactions` are other readings of the walks of `coopq`, and show what its covariance adds."""


def evaluate_model(
    source: str,
    *,
    length: int,
    max_tokens: int | None = None,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Evaluation:
    """WikiText-2 perplexity of a model in full precision.

    Args:
        source: As in `coopq.model.load.load_model`.
        length: Tokens of a window.
        max_tokens: Only the first tokens of the text; None takes all.
        device: Where to compute.
        progress: Told of every batch.
    """
    is_hosted = not weights_fit(source, device=device)
    loaded = load_model(source, device=device, on_host=is_hosted)
    if is_hosted:
        HostedBlocks(loaded.model, pick_device(device))
    players = find_players(loaded.model)
    text = wikitext2(loaded.tokenizer, length, max_tokens, max_positions(loaded.model))
    losses: list[float] = []
    for batch in model_nll(loaded.model, text.tokens):
        losses.extend(batch)
        progress("evaluating", len(losses), len(text.tokens))
    n_bytes = sum(player.n_weights for player in players) * loaded.checkpoint_dtype.itemsize
    return Evaluation(float(np.mean(losses)), text.n_scored, n_bytes, text.describe())


def evaluate_saved(
    folder: Path,
    run: Path,
    *,
    length: int,
    max_tokens: int | None = None,
    device: str = "auto",
    progress: ProgressCallback = silent,
) -> Evaluation:
    """WikiText-2 perplexity of a quantized model as it lies on disk, by its own packed layers.

    Args:
        folder: The saved model.
        run: Run folder that keeps what is measured; an interrupted evaluation goes on.
        length: Tokens of a window.
        max_tokens: Only the first tokens of the text; None takes all.
        device: Where to compute.
        progress: Told of every batch.
    """
    from transformers import AutoTokenizer

    plan = Plan.load(folder / "plan.json")
    model = load(folder, device=device)
    text = wikitext2(AutoTokenizer.from_pretrained(folder), length, max_tokens, max_positions(model))
    assignment = np.array(plan.assignment, dtype=np.float32)
    weights = fingerprint_saved(folder)
    total, done = 0.0, 0
    require_writable(run)
    with locked(run):
        for portion, journal in _portions(model, text, run / "evaluation", f"saved-{weights[:8]}"):
            fingerprint = {"file": weights, "tokens": portion.fingerprint, "device": model.device.type}
            with Journal(journal, fingerprint) as values:
                losses = values.get(assignment)
                if losses is None:
                    parts = []
                    for batch in model_nll(model, portion.tokens):
                        parts.append(batch)
                        progress("evaluating the saved model", done + sum(map(len, parts)), len(text.tokens))
                    losses = np.concatenate(parts)
                    values.append(assignment, losses, model.config.get_text_config().num_hidden_layers)
            total, done = total + float(losses.sum()), done + len(losses)
    return Evaluation(total / done, text.n_scored, saved_bytes(folder), text.describe())


def compare_plan(
    plan: Plan,
    run: Path,
    *,
    length: int,
    max_tokens: int | None = None,
    model: str | None = None,
    device: str | None = None,
    progress: ProgressCallback = silent,
) -> list[Comparison]:
    """A plan beside full precision, uniform widths, and random assignments of its budget.

    Args:
        plan: The plan.
        run: Its run folder, whose weight bank and journals are used; it is made when missing.
        length: Tokens of a window of WikiText-2.
        max_tokens: Only the first tokens of the text; None takes all.
        model: Where the plan's model is now; None takes the plan's word.
        device: Where to compute; None takes the plan's word.
        progress: Told of every step.
    """
    config, quantizer = RunConfig.from_json(plan.config), plan.quantizer
    config = replace(
        config,
        model=model or config.model,
        device=device or config.device,
        backend=quantizer.pop("name"),
        **quantizer,
    )
    with open_workbench(config, run, progress, judge_length=length) as bench:
        return compare_on(bench, [plan], length=length, max_tokens=max_tokens)


def compare(
    config: RunConfig,
    budgets: Sequence[str],
    run: Path,
    *,
    length: int,
    max_tokens: int | None = None,
    methods: Sequence[str] = COMPARED,
    progress: ProgressCallback = silent,
) -> list[Comparison]:
    """Methods at several budgets, beside uniform widths and random assignments.

    Args:
        config: The model and how to measure it.
        budgets: As for `coopq.quantize`.
        run: The run folder; what it knows is not measured again.
        length: Tokens of a window of WikiText-2.
        max_tokens: Only the first tokens of the text; None takes all.
        methods: Which ones; see `coopq.plan.methods.METHODS`.
        progress: Told of every step.
    """
    parsed = [Budget.parse(budget) for budget in budgets]
    for method in methods:
        check_method(method)
    check = partial(check_players, methods, n_widths=len(config.widths))
    with open_workbench(config, run, progress, *parsed, check=check, judge_length=length) as bench:
        _judging_text(bench, length, max_tokens)  # too short a text is noticed before the walks
        plans = [measure(bench, plan) for method in methods for plan in plans_on(bench, method, parsed)]
        return compare_on(bench, plans, length=length, max_tokens=max_tokens)


def compare_on(bench: Workbench, plans: list[Plan], *, length: int, max_tokens: int | None = None) -> list[Comparison]:
    """Plans of one open workbench beside full precision, uniform widths, and random assignments of their budgets."""
    widths, n_players = bench.config.widths, len(bench.players)
    groups: list[tuple[str, str | None, Assignments]] = [
        ("full precision", None, uniform_assignment(n_players, UNTOUCHED)[None]),
        *(("uniform", None, uniform_assignment(n_players, bits)[None]) for bits in reversed(bench.common_widths)),
    ]
    groups += [(plan.method, plan.budget, np.array([plan.assignment], dtype=np.float32)) for plan in plans]
    for budget, limit in {plan.budget: plan.budget_bytes for plan in plans}.items():
        random = random_assignments(bench.storage, widths, limit, _N_RANDOM, _RANDOM_SEED)
        groups.append(("random", budget, random))
    points = np.unique(np.concatenate([assignments for _, _, assignments in groups]), axis=0)
    with bench.calibration_game("comparing on the calibration set") as game:
        calibration = game(points)
    judged = judge_on(bench, points, length=length, max_tokens=max_tokens)
    position = {row.tobytes(): i for i, row in enumerate(points)}
    rows = []
    for method, budget_text, assignments in groups:
        where = [position[row.tobytes()] for row in assignments]
        rows.append(
            Comparison(
                method=method,
                budget=budget_text,
                n=len(assignments),
                average_bits=float(np.mean([_average_bits(bench, row) for row in assignments])),
                bits_per_weight=float(np.mean([_bits_per_weight(bench, row) for row in assignments])),
                calibration_nll=float(calibration[where].mean()),
                nll=float(judged[where].mean()),
                perplexity=float(np.exp(judged[where]).mean()),
            )
        )
    return rows


def judge_on(bench: Workbench, points: Assignments, *, length: int, max_tokens: int | None = None) -> Losses:
    """WikiText-2 loss of each assignment, shape (n,), nats per token; kept apart from what searches see."""
    return judge_windows(bench, points, length=length, max_tokens=max_tokens).mean(axis=1)


def judge_windows(
    bench: Workbench, points: Assignments, *, length: int, max_tokens: int | None = None
) -> npt.NDArray[np.float64]:
    """The same for each window of the text, shape (n, n_windows)."""
    text = _judging_text(bench, length, max_tokens)
    parts = []
    for portion, journal in _portions(bench.loaded.model, text, bench.folder.evaluation, "wikitext2"):
        with bench.game(portion, journal, "judging on WikiText-2") as game:
            parts.append(game.per_sequence(points))
    return np.concatenate(parts, axis=1)


def _judging_text(bench: Workbench, length: int, max_tokens: int | None) -> TokenSet:
    return wikitext2(bench.loaded.tokenizer, length, max_tokens, max_positions(bench.loaded.model))


def _average_bits(bench: Workbench, assignment: Assignment) -> float:
    if (assignment == UNTOUCHED).all():
        return 8.0 * bench.loaded.checkpoint_dtype.itemsize
    return bench.storage.average_bits(assignment)


def _bits_per_weight(bench: Workbench, assignment: Assignment) -> float:
    if (assignment == UNTOUCHED).all():
        return _average_bits(bench, assignment)
    return bench.storage.bits_per_weight(assignment)


def _portions(model: Any, text: TokenSet, folder: Path, name: str) -> Iterator[tuple[TokenSet, Path]]:
    """The text in portions whose hidden states fit into memory, each with the journal that keeps its values."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.get_text_config()
    per_token = (config.num_hidden_layers + 1) * config.hidden_size * model.dtype.itemsize
    windows = max(1, _HIDDEN_BYTES // (per_token * text.tokens.shape[1]))
    for start in range(0, len(text.tokens), windows):
        portion = replace(text, tokens=text.tokens[start : start + windows])
        yield portion, folder / f"{name}-{portion.fingerprint[:16]}.jsonl"
