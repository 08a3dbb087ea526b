"""The documents of a text: a packaged text, a file of the user's, or a data set of the hub."""

import hashlib
from importlib import resources
from pathlib import Path

import msgspec
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by its version

from coopq.core.errors import CalibrationError
from coopq.core.files import expanded

PACKAGED = "c4"
"""Name of the packaged calibration text."""
WIKITEXT2 = "WikiText-2 test"
"""Name of the packaged text that judges."""
_DATA = resources.files("coopq.model.texts") / "data"
_HUB_DOCUMENTS = 2000
"""Documents read from a data set of the hub: more than a calibration set needs, and some data sets have no end."""


class _Document(msgspec.Struct):
    """A line of a .jsonl file; other fields are ignored."""

    text: str


def documents(source: str) -> list[str]:
    """Documents of a text."""
    if source.startswith("hub:"):
        return _hub_documents(*hub_name(source))
    if source == PACKAGED:
        with resources.as_file(_DATA / "c4_sample.jsonl") as path:
            return _jsonl_documents(path)
    if source == WIKITEXT2:  # one text, its paragraphs joined by blank lines
        lines = (_DATA / "wikitext2_test.txt").read_text(encoding="utf-8").splitlines()
        return ["\n\n".join(line for line in lines if line.strip())]
    path = expanded(source)
    return _jsonl_documents(path) if path.suffix == ".jsonl" else [_read_text(path)]


def hub_name(source: str) -> list[str]:
    """The name of a data set of the hub, and its configuration if one is named.

    Raises:
        CalibrationError: If there is no name, or more than a name and a configuration.
    """
    parts = source.removeprefix("hub:").split(":")
    if len(parts) > 2 or not all(parts):
        raise CalibrationError(f"text {source!r} names no data set; write hub:NAME or hub:NAME:CONFIGURATION")
    return parts


def _hub_documents(*name: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(*name, split="train", streaming=True)
        texts = [row["text"] for row in rows.take(_HUB_DOCUMENTS) if row["text"]]
    except (
        OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, HTTPError
    ) as error:  # fmt: skip
        raise CalibrationError(
            f"cannot read data set {':'.join(name)!r} ({type(error).__name__}: {error}); give a local folder, or a "
            "data set on a hub that can be reached, with a split 'train' and a column 'text'"
        ) from error
    if others := sorted({type(text).__name__ for text in texts if not isinstance(text, str)}):
        raise CalibrationError(
            f"data set {':'.join(name)!r}: its column 'text' holds {', '.join(others)}, not strings; give a data set "
            "of plain text, or a .jsonl file"
        )
    return texts


def _jsonl_documents(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = msgspec.json.decode(line, type=_Document).text
        except (ValueError, RecursionError) as error:
            raise CalibrationError(
                f"text file {path}, line {number}: not a JSON object with a field 'text'; repair or remove the line"
            ) from error
        documents.append(text)
    return documents


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"text file {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read text file {path}: {error.strerror}") from error
    if not text.strip():
        raise CalibrationError(f"text file {path} is empty; give one with text")
    return text


def text_name(source: str) -> str:
    """A text's name, and a digest of a file: two files can have one name."""
    if source == WIKITEXT2:
        return source
    file = expanded(source)
    return f"{file.name} ({hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"


def check_file(path: Path, instead: str = "") -> None:
    """Check that a file of text can be read; `instead` is what else a user can name."""
    if not path.is_file():
        raise CalibrationError(f"no text file at {path}; give a .txt or .jsonl file{instead}")
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"text file {path} is neither .txt nor .jsonl; convert it to one of them")
    _read_text(path)
