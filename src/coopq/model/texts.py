"""Token sequences from text: the calibration set that searches see, and the windows that judge them."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.core.errors import BackendError, CalibrationError
from coopq.core.config import CalibrationConfig

_FITTING_TOKENS = 32_768
_HUB_DOCUMENTS = 2000
"""Documents read from a hub data set; a calibration set needs no more, and some data sets have no end."""


@dataclass(frozen=True)
class TokenSet:
    """Sequences of tokens of equal length, each from one document, without padding.

    Attributes:
        tokens: Shape (n_sequences, length).
        source: Where the text came from.
        bos: Whether each sequence opens with the tokenizer's beginning-of-sequence token. It does exactly when
            the tokenizer puts one before every text by itself, because such models expect it.
    """

    tokens: npt.NDArray[np.int64]
    source: str
    bos: bool

    @property
    def n_scored(self) -> int:
        """Tokens that are predicted: all but the first of each sequence."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and their shape."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(str(self.tokens.shape).encode())
        digest.update(np.ascontiguousarray(self.tokens).tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for people."""
        sequences, length = self.tokens.shape
        return f"{sequences} x {length} tokens of {self.source}" + (", each after a BOS token" if self.bos else "")


def calibration_set(config: CalibrationConfig, tokenizer: Any, max_length: int | None = None) -> TokenSet:
    """Tokens to calibrate on: windows drawn at random, without replacement, from all documents.

    A document gives its non-overlapping windows of the wanted length; what is left of it is not used.

    Args:
        config: Which text, how many sequences, how long, which seed.
        tokenizer: The model's.
        max_length: Positions that the model has; None for no limit.
    Raises:
        CalibrationError: If the text cannot be read or is too short.
    """
    every = _drawn(config, tokenizer, max_length)
    return replace(every, tokens=every.tokens[: config.sequences])


def fitting_set(config: CalibrationConfig, tokenizer: Any, max_length: int | None = None) -> TokenSet:
    """Tokens to fit weights to: the next windows after those of the calibration set, which say more of fitted weights.

    Args:
        config: As for `calibration_set`.
        tokenizer: The model's.
        max_length: Positions that the model has; None for no limit.
    Raises:
        CalibrationError: If the text cannot be read or is too short.
    """
    every = _drawn(config, tokenizer, max_length)
    n = config.fitting or max(1, min(_FITTING_TOKENS // config.length, len(every.tokens) - config.sequences))
    _require(config, len(every.tokens), config.sequences + n)
    return replace(every, tokens=every.tokens[config.sequences :][:n])


def _drawn(config: CalibrationConfig, tokenizer: Any, max_length: int | None) -> TokenSet:
    """All windows of a text, in the order in which they are drawn."""
    check_calibration(config)
    bos = _bos(tokenizer)
    content = _content_length(config.length, bos, max_length)
    windows = [
        window for document in _documents(config.source) for window in _windows(_encode(tokenizer, document), content)
    ]
    _require(config, len(windows), config.sequences)
    order = np.random.default_rng(config.seed).permutation(len(windows))
    return TokenSet(_stack([windows[i] for i in order], bos), config.source, bos is not None)


def _require(config: CalibrationConfig, n: int, wanted: int) -> None:
    """Raise a CalibrationError where a text gives fewer sequences than are wanted."""
    if n < wanted:
        fitted = "" if wanted == config.sequences else f", {wanted - config.sequences} of them to fit weights to"
        raise CalibrationError(
            f"calibration text {config.source!r} gives {n} sequences of {config.length} tokens, and "
            f"{wanted} are wanted{fitted}; use fewer tokens, shorter sequences or more text"
        )


def check_calibration(config: CalibrationConfig) -> None:
    """Check what can be checked without a tokenizer, before a model is loaded.

    Raises:
        CalibrationError: If the request makes no sense or the file is missing or empty.
        BackendError: If a hub data set is asked for and `datasets` is not installed.
    """
    if config.sequences < 1 or config.length < 2:
        raise CalibrationError(
            f"{config.sequences} sequences of {config.length} tokens cannot be scored; "
            "take at least 1 sequence of at least 2 tokens"
        )
    if config.fitting is not None and config.fitting < 1:
        raise CalibrationError(f"weights cannot be fitted to {config.fitting} sequences; take at least 1")
    if config.source.startswith("hub:"):
        if importlib.util.find_spec("datasets") is None:
            raise BackendError("hub data sets need the package datasets; run: pip install 'coopq[datasets]'")
    elif config.source != "c4":
        path = Path(config.source)
        if not path.is_file():
            raise CalibrationError(
                f"no calibration file at {path}; give a .txt or .jsonl file, 'c4' (packaged), or 'hub:NAME'"
            )
        if path.suffix not in (".txt", ".jsonl"):
            raise CalibrationError(f"calibration file {path} is neither .txt nor .jsonl; convert it to one of them")
        _read_text(path)


def wikitext2(tokenizer: Any, length: int, max_tokens: int | None = None, max_length: int | None = None) -> TokenSet:
    """The packaged WikiText-2 test split in non-overlapping windows; for judging only, never searched on.

    The paragraphs are joined by blank lines and tokenised as one text; an incomplete last window is dropped.

    Args:
        tokenizer: The model's.
        length: Tokens of a window.
        max_tokens: Use only the first windows, up to this many tokens; None uses all.
        max_length: Positions that the model has; None for no limit.
    Raises:
        CalibrationError: If not even one window fits.
    """
    if length < 2 or (max_tokens is not None and max_tokens < 1):
        raise CalibrationError(f"windows of {length} tokens out of {max_tokens} cannot be scored; take at least 2")
    bos = _bos(tokenizer)
    lines = (resources.files("coopq.model") / "data" / "wikitext2_test.txt").read_text(encoding="utf-8").splitlines()
    tokens = _encode(tokenizer, "\n\n".join(line for line in lines if line.strip()))
    windows = _windows(tokens, _content_length(length, bos, max_length))
    if max_tokens is not None:
        windows = windows[: max_tokens // length]
    if not windows:
        raise CalibrationError(
            f"no window of {length} tokens fits into {max_tokens} tokens; take more tokens or shorter windows"
        )
    return TokenSet(_stack(windows, bos), "WikiText-2 test", bos is not None)


def _documents(source: str) -> list[str]:
    if source.startswith("hub:"):
        return _hub_documents(source.removeprefix("hub:"))
    if source == "c4":
        with resources.as_file(resources.files("coopq.model") / "data" / "c4_sample.jsonl") as path:
            return _jsonl_documents(path)
    path = Path(source)
    return _jsonl_documents(path) if path.suffix == ".jsonl" else [_read_text(path)]


def _hub_documents(name: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(*name.split(":"), split="train", streaming=True)
        return [row["text"] for row in rows.take(_HUB_DOCUMENTS) if row["text"]]
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"cannot read data set {name!r} ({type(error).__name__}: {error}); it needs a split 'train' with a "
            "column 'text' and, unless it is a local folder, a reachable hub"
        ) from error


def _jsonl_documents(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            if not isinstance(text, str):
                raise TypeError("not a text")
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"calibration file {path}, line {number}: not a JSON object with a field 'text'; "
                "mend or remove the line"
            ) from error
        documents.append(text)
    return documents


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {path} is not UTF-8 (byte {error.start}); convert it, with iconv say"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read calibration file {path}: {error.strerror}") from error
    if not text.strip():
        raise CalibrationError(f"calibration file {path} is empty; give one with text")
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text and nothing else: what looks like a special token in it stays text.

    Documents may be longer than the model's positions, of which the tokenizer would warn; windows are not.
    """
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return tokens


def _bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts before every text, if it does."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer.encode("a")[0] == bos else None


def check_length(length: int, max_length: int | None) -> None:
    """Check the tokens of a sequence against the positions that a model has, if it has a limit.

    Raises:
        CalibrationError: If there are too few.
    """
    if max_length is not None and length > max_length:
        raise CalibrationError(f"sequences of {length} tokens exceed the model's {max_length} positions; shorten them")


def _content_length(length: int, bos: int | None, max_length: int | None) -> int:
    check_length(length, max_length)
    return length - (bos is not None)


def _windows(tokens: Sequence[int], length: int) -> list[Sequence[int]]:
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def _stack(windows: Sequence[Sequence[int]], bos: int | None) -> npt.NDArray[np.int64]:
    tokens = np.array(windows, dtype=np.int64)
    return tokens if bos is None else np.insert(tokens, 0, bos, axis=1)
