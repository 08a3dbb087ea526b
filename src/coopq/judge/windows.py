"""Assignments judged on windows of held-out text, which no search sees."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.types import Assignments
from coopq.game.losses import JUDGED, TokenScores
from coopq.game.session import Session
from coopq.model.load import max_positions
from coopq.model.texts import HeldOut, TokenSet

_PORTION_BYTES = 2**31
"""Most bytes that the prefix engine holds for a text at once: hidden states, one for each depth, and the original's
predictions. A longer text is judged in portions. Chosen by hand."""


def judging_text(session: Session, text: HeldOut) -> TokenSet:
    """Held-out text in windows, for the model of a session.

    Raises:
        CalibrationError: If the text has no window of this length.
    """
    return text.windows(session.loaded.tokenizer, max_positions(session.loaded.model))


def judge_windows(session: Session, assignments: Assignments, text: HeldOut) -> npt.NDArray[np.float64]:
    """Loss of each assignment on each window of a text, shape (n, n_windows), nats per token."""
    return _measure(session, assignments, text, "nll", "wikitext2")


def judge_scores(session: Session, assignments: Assignments, text: HeldOut) -> npt.NDArray[np.float64]:
    """The means of `TokenScores` of each assignment on each window of a text, shape (n, n_windows, 3).

    The reference is the session's model in full precision.
    """
    found = _measure(session, assignments, text, JUDGED, JUDGED)
    return found.reshape(len(assignments), -1, len(TokenScores._fields))


def _measure(
    session: Session, assignments: Assignments, text: HeldOut, loss: str, name: str
) -> npt.NDArray[np.float64]:
    """What a loss gives for each assignment on all windows, one after the other."""
    model, parts = session.loaded.model, []
    token_bytes = 4 * model.config.get_text_config().vocab_size if loss == JUDGED else 0
    session.folder.evaluation.mkdir(exist_ok=True)
    for portion in portions(model, judging_text(session, text), token_bytes):
        journal = session.folder.evaluation / f"{name}-{portion.fingerprint[:16]}.jsonl"
        with session.game_on(portion, journal, f"judging on {portion.source}", loss) as game:
            parts.append(game.per_sequence(assignments))
    return np.concatenate(parts, axis=1)


def portions(model: Any, text: TokenSet, token_bytes: int = 0) -> Iterator[TokenSet]:
    """A text in portions that fit into memory.

    Args:
        model: The model.
        text: The text.
        token_bytes: Bytes that a token takes beside its hidden states.
    """
    config = model.config.get_text_config()
    token_bytes += (config.num_hidden_layers + 1) * config.hidden_size * model.dtype.itemsize
    n_windows = max(1, _PORTION_BYTES // (token_bytes * text.tokens.shape[1]))
    for start in range(0, len(text.tokens), n_windows):
        yield replace(text, tokens=text.tokens[start : start + n_windows])
