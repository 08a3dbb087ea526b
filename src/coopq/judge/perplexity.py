"""Perplexity on WikiText-2, which no search sees."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.files import locked, require_writable
from coopq.core.specs import Request
from coopq.core.types import Assignments, Losses, ProgressCallback, silent
from coopq.export.checkpoint import SavedModel, load
from coopq.game.engines.prefix_engine import model_nll
from coopq.game.journal import Journal
from coopq.game.session import Session, prepare
from coopq.judge.results import Evaluation
from coopq.model.load import max_positions
from coopq.model.memory import weights_fit
from coopq.model.offload import OffloadedBlocks
from coopq.model.sources.folder import find_folder, read_config, read_tokenizer
from coopq.model.texts import TokenSet, wikitext2

_log = logging.getLogger(__name__)
_WINDOW = 2048
"""Tokens of a window in most reports of perplexity."""
_STATE_BYTES = 2**31
"""Most bytes of hidden states that the prefix engine holds at once, one for each depth; a longer text is judged in
portions. Chosen by hand."""


def window_length(source: str) -> int:
    """Tokens of a window if nobody says how many: 2048, or the positions of a model that has fewer.

    Args:
        source: A model as in `coopq.model.load.load_model`, or the folder of a saved model.
    """
    saved = SavedModel(Path(source).expanduser())
    config = saved.config if saved.exists else read_config(find_folder(source))[0]
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _WINDOW
    if positions < _WINDOW:
        _log.info("windows of %d tokens instead of %d: the model has no more positions", positions, _WINDOW)
    return min(positions, _WINDOW)


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
        source: The model, as in `coopq.model.load.load_model`.
        length: Tokens of a window.
        max_tokens: Only the first tokens of the text; None takes all.
        device: Where to compute.
        progress: Told of every batch.
    """
    one_window = {"tokens": max(length, 2), "sequence_length": length}  # a bad length is refused by its own name
    prepared = prepare(Request.from_options(model=source, device=device, **one_window))
    # Nothing is quantized here, so the weights need no room for a bank.
    must_offload = not weights_fit(source, device=device)
    loaded = prepared.load(progress, on_host=must_offload)
    if must_offload:
        OffloadedBlocks(loaded.model, prepared.device)
    text = wikitext2(loaded.tokenizer, length, max_tokens, max_positions(loaded.model))
    losses: list[float] = []
    for batch in model_nll(loaded.model, text.tokens):
        losses.extend(batch)
        progress("evaluating", len(losses), len(text.tokens))
    n_bytes = sum(player.n_weights for player in prepared.players) * loaded.checkpoint_dtype.itemsize
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
    """WikiText-2 perplexity of a saved model, computed by the packed layers of the saved model.

    Args:
        folder: The saved model.
        run: Run folder that keeps what is measured; an interrupted evaluation goes on.
        length: Tokens of a window.
        max_tokens: Only the first tokens of the text; None takes all.
        device: Where to compute.
        progress: Told of every batch.
    """
    saved, model = SavedModel(folder), load(folder, device=device)
    text = wikitext2(
        read_tokenizer(folder, getattr(model.get_input_embeddings(), "num_embeddings", None)),
        length,
        max_tokens,
        max_positions(model),
    )
    assignment = np.array(saved.plan.assignment, dtype=np.float32)
    weights = saved.fingerprint()
    total, done = 0.0, 0
    require_writable(run)
    with locked(run):
        for portion, journal in _portions(model, text, run / "evaluation", f"saved-{weights[:8]}"):
            fingerprint = {"file": weights, "tokens": portion.fingerprint, "device": model.device.type}
            with Journal(journal, fingerprint) as measured:
                losses = measured.get(assignment)
                if losses is None:
                    parts = []
                    for batch in model_nll(model, portion.tokens):
                        parts.append(batch)
                        progress("evaluating the saved model", done + sum(map(len, parts)), len(text.tokens))
                    losses = np.concatenate(parts)
                    measured.append(assignment, losses, model.config.get_text_config().num_hidden_layers)
            total, done = total + float(losses.sum()), done + len(losses)
    return Evaluation(total / done, text.n_scored, saved.n_bytes(), text.describe())


def judging_text(session: Session, length: int, max_tokens: int | None = None) -> TokenSet:
    """WikiText-2 in windows, for the model of a session.

    Raises:
        CalibrationError: If the text has no window of this length.
    """
    loaded = session.loaded
    return wikitext2(loaded.tokenizer, length, max_tokens, max_positions(loaded.model))


def judge_on(session: Session, assignments: Assignments, *, length: int, max_tokens: int | None = None) -> Losses:
    """WikiText-2 loss of each assignment, shape (n,), nats per token; searches never see these losses."""
    return judge_windows(session, assignments, length=length, max_tokens=max_tokens).mean(axis=1)


def judge_windows(
    session: Session, assignments: Assignments, *, length: int, max_tokens: int | None = None
) -> npt.NDArray[np.float64]:
    """WikiText-2 loss of each assignment on each window, shape (n, n_windows), nats per token."""
    text = judging_text(session, length, max_tokens)
    parts = []
    for portion, journal in _portions(session.loaded.model, text, session.folder.evaluation, "wikitext2"):
        with session.game_on(portion, journal, "judging on WikiText-2") as game:
            parts.append(game.per_sequence(assignments))
    return np.concatenate(parts, axis=1)


def _portions(model: Any, text: TokenSet, folder: Path, name: str) -> Iterator[tuple[TokenSet, Path]]:
    """The text in portions whose hidden states fit into memory, each with the journal that keeps its losses."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.get_text_config()
    token_bytes = (config.num_hidden_layers + 1) * config.hidden_size * model.dtype.itemsize
    n_windows = max(1, _STATE_BYTES // (token_bytes * text.tokens.shape[1]))
    for start in range(0, len(text.tokens), n_windows):
        portion = replace(text, tokens=text.tokens[start : start + n_windows])
        yield portion, folder / f"{name}-{portion.fingerprint[:16]}.jsonl"
