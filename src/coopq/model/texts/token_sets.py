"""Token sequences from text: the calibration tokens that searches see, and the held-out tokens that judge them."""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BackendError, CalibrationError
from coopq.core.files import expanded
from coopq.core.specs import TextSpec
from coopq.model.texts.documents import PACKAGED, WIKITEXT2, check_file, documents, hub_name, text_name

_FIT_TOKENS = 32_768
"""Tokens that weights are fitted to if a user does not say how many."""


@dataclass(frozen=True)
class TokenSet:
    """Sequences of tokens of equal length, each from one document, without padding.

    Attributes:
        tokens: Shape (n_sequences, length).
        source: Name of the text.
        bos: Whether each sequence starts with the tokenizer's beginning-of-sequence token. This is so if the tokenizer
            puts the token before every text, because the model then expects the token.
    """

    tokens: npt.NDArray[np.int64]
    source: str
    bos: bool

    @property
    def n_scored(self) -> int:
        """Number of tokens that are predicted: all but the first of each sequence."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their shape."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(str(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens).tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for users."""
        sequences, length = self.tokens.shape
        return f"{sequences} x {length} tokens of {self.source}" + (", each after a BOS token" if self.bos else "")


def require_known_tokens(model: Any, tokens: npt.NDArray[np.int64]) -> None:
    """Check that a model has a row for each token: a text may spell special tokens that the model never had.

    Args:
        model: A causal language model of transformers.
        tokens: Any shape.
    Raises:
        CalibrationError: If not.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if rows is not None and tokens.size and (largest := int(tokens.max())) >= rows:
        raise CalibrationError(
            f"a text holds token {largest}, and the model's embedding has {rows} rows; take special tokens out of the "
            "text, or give the tokenizer that belongs to the model"
        )


def calibration_set(text: TextSpec, tokenizer: Any, max_positions: int | None = None) -> TokenSet:
    """Calibration tokens: windows drawn at random, without replacement, from all documents of a text.

    A document gives its non-overlapping windows of the wanted length; the rest of the document is not used.

    Args:
        text: Which text, how many tokens, which length and seed.
        tokenizer: The model's tokenizer.
        max_positions: Positions of the model; None for no limit.
    Raises:
        CalibrationError: If the text cannot be read or is too short.
    """
    windows = _shuffled_windows(text, tokenizer, max_positions)
    return replace(windows, tokens=windows.tokens[: text.n_sequences])


def fitting_set(text: TextSpec, tokenizer: Any, max_positions: int | None = None) -> TokenSet:
    """Tokens that weights are fitted to: the windows that follow those of the calibration set.

    Searches do not see these windows, so the calibration loss tells how well fitted weights do on other text.

    Args and errors: as for `calibration_set`.
    """
    windows = _shuffled_windows(text, tokenizer, max_positions)
    left = len(windows.tokens) - text.n_sequences
    n = text.n_fit_sequences or max(1, min(_FIT_TOKENS // text.sequence_length, left))
    _require(text, len(windows.tokens), text.n_sequences + n)
    return replace(windows, tokens=windows.tokens[text.n_sequences :][:n])


def _shuffled_windows(text: TextSpec, tokenizer: Any, max_positions: int | None) -> TokenSet:
    """All windows of a text, in random order; at least `text.n_sequences` of them."""
    check_text(text)
    bos = _bos(tokenizer)
    windows = _windows(text.source, tokenizer, text.sequence_length, bos, max_positions)
    _require(text, len(windows), text.n_sequences)
    order = np.random.default_rng(text.seed).permutation(len(windows))
    return TokenSet(_stack([windows[i] for i in order], bos), text.source, bos is not None)


def _require(text: TextSpec, n: int, needed: int) -> None:
    """Raise a CalibrationError if a text gives fewer sequences than are needed."""
    if n < needed:
        fitted = f", {needed - text.n_sequences} of them to fit weights to" if needed > text.n_sequences else ""
        raise CalibrationError(
            f"calibration text {text.source!r} gives {n} sequences of {text.sequence_length} tokens, and {needed} are "
            f"needed{fitted}; use fewer tokens, shorter sequences or more text"
        )


def check_text(text: TextSpec) -> None:
    """Check that a text can be read, before a model is loaded; data sets of the hub are read later.

    Raises:
        CalibrationError: If the file is missing, empty or of another kind, or the name of the data set is none.
        BackendError: If the text is a data set of the hub, and the package datasets is not installed.
    """
    if text.source.startswith("hub:"):
        hub_name(text.source)
        if importlib.util.find_spec("datasets") is None:
            raise BackendError("hub data sets need the package datasets; run: pip install 'coopq[datasets]'")
    elif text.source != PACKAGED:
        check_file(expanded(text.source), ", 'c4' (packaged), or 'hub:NAME'")


def is_gone(source: str) -> bool:
    """Whether a text is a file that is no longer there."""
    return source != PACKAGED and not source.startswith("hub:") and not expanded(source).exists()


@dataclass(frozen=True)
class HeldOut:
    """Text that no search sees, in non-overlapping windows; an incomplete last window of a document is dropped.

    Attributes:
        length: Tokens of a window.
        max_tokens: Use only the first windows, up to this many tokens; None uses all.
        source: A .txt or .jsonl file, or the packaged WikiText-2 test split.
    """

    length: int
    max_tokens: int | None = None
    source: str = WIKITEXT2

    @property
    def text(self) -> str:
        """The text for people: which, how many tokens, and how long a window is."""
        amount = "all" if self.max_tokens is None else f"first {self.max_tokens}"
        return f"{text_name(self.source)}, {amount} tokens by {self.length}"

    def check(self) -> None:
        """Check that the text can be read and scored, before a model is loaded.

        Raises:
            CalibrationError: If not.
        """
        if self.length < 2:
            raise CalibrationError(f"windows of {self.length} tokens cannot be scored; use at least 2")
        if self.max_tokens is not None and self.max_tokens < self.length:
            raise CalibrationError(
                f"no window of {self.length} tokens fits into {self.max_tokens} tokens; use more tokens or shorter "
                "windows"
            )
        if self.source != WIKITEXT2:
            check_file(expanded(self.source))

    def windows(self, tokenizer: Any, max_positions: int | None = None) -> TokenSet:
        """The tokens.

        Args:
            tokenizer: The model's tokenizer.
            max_positions: Positions of the model; None for no limit.
        Raises:
            CalibrationError: If the text cannot be read, or not even one window fits.
        """
        self.check()
        bos = _bos(tokenizer)
        windows, name = _windows(self.source, tokenizer, self.length, bos, max_positions), text_name(self.source)
        windows = windows if self.max_tokens is None else windows[: self.max_tokens // self.length]
        if not windows:
            raise CalibrationError(
                f"no window of {self.length} tokens fits into all tokens of {name}; use more text or shorter windows"
            )
        return TokenSet(_stack(windows, bos), name, bos is not None)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text and nothing else: characters that look like a special token stay text.

    The tokenizer's warning about texts longer than the model's positions is off, because windows are shorter.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return tokens


def _bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text; None if it puts none."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[0] == bos else None


def check_length(sequence_length: int, max_positions: int | None) -> None:
    """Check that sequences fit into the positions of a model.

    Raises:
        CalibrationError: If not.
    """
    if max_positions is not None and sequence_length > max_positions:
        raise CalibrationError(
            f"sequences of {sequence_length} tokens exceed the model's {max_positions} positions; use shorter sequences"
        )


def _windows(
    source: str, tokenizer: Any, length: int, bos: int | None, max_positions: int | None
) -> list[Sequence[int]]:
    """Non-overlapping windows of all documents of a text, without the beginning-of-sequence token."""
    check_length(length, max_positions)
    content = length - (bos is not None)
    texts = [_encode(tokenizer, document) for document in documents(source)]
    return [tokens[i : i + content] for tokens in texts for i in range(0, len(tokens) - content + 1, content)]


def _stack(windows: Sequence[Sequence[int]], bos: int | None) -> npt.NDArray[np.int64]:
    tokens = np.array(windows, dtype=np.int64)
    return tokens if bos is None else np.insert(tokens, 0, bos, axis=1)
