"""Seeded mutations of files: changed bytes, lines, values, keys and digits."""

import json
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000
"""Brackets of a value that is nested too deep."""


def mutate(content: bytes, rng: random.Random, name: str) -> tuple[bytes, str]:
    """Another content, and how it came about."""
    kinds = list(_BYTES)
    if name.endswith((".json", ".jsonl")):
        kinds += ["value", "key", "number"] * 3
    elif name.endswith(".toml"):
        kinds += ["number"] * 3
    while True:
        kind = rng.choice(kinds)
        changed = _BYTES[kind](content, rng) if kind in _BYTES else _structured(content, rng, kind)
        if changed is not None and changed != content:
            return changed, kind


def _place(content: bytes, rng: random.Random) -> int:
    """A position; half of them in the first two thousand bytes, where binary files have their headers."""
    return rng.randrange(max(1, min(len(content), 2000) if rng.random() < 0.5 else len(content)))


def _flip(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _replace(content: bytes, rng: random.Random) -> bytes:
    at, n = _place(content, rng), rng.choice((1, 4, 64))
    return content[:at] + rng.randbytes(n) + content[at + n :]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.choice((rng.randbytes(8), b"\0" * 16, b"\n", b"{", b"NaN")) + content[at:]


def _delete(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + rng.choice((1, 8, 200)) :]


def _swap(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def _drop_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


_BYTES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": _flip,
    "replace": _replace,
    "insert": _insert,
    "delete": _delete,
    "swap lines": _swap,
    "drop line": _drop_line,
    "truncate": lambda content, rng: content[: _place(content, rng)],
    "zeros": lambda content, rng: content[: _place(content, rng)].ljust(len(content), b"\0"),
    "twice": lambda content, rng: content * 2,
    "garbage": lambda content, rng: rng.randbytes(rng.choice((0, 1, 300))),
    "byte order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
}
_VALUES = ("null", "true", "-1", "0", "1e308", "1e999", "NaN", '""', '"x"', "[]", "{}", "1" * 5000, "0.5", "[" * DEEP)


def _structured(content: bytes, rng: random.Random, kind: str) -> bytes | None:
    """A change of one value, key or digit of a file of JSON or TOML; None if the file has none."""
    if kind == "number":
        places = [index for index, byte in enumerate(content) if 48 <= byte <= 57]
        if not places:
            return None
        at = rng.choice(places)
        return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]
    lines = content.splitlines(keepends=True)
    row = rng.randrange(len(lines)) if len(lines) > 1 and lines[0].rstrip().endswith(b"}") else None
    data: Any = json.loads(content if row is None else lines[row])
    spots = list(_spots(data))
    if not spots:
        return None
    holder, key = rng.choice(spots)
    if kind == "key":
        value = holder.pop(key)
        if isinstance(holder, dict) and rng.random() < 0.5:
            holder[f"{key}x"] = value
        text = json.dumps(data)
    else:
        holder[key] = "@@"
        text = json.dumps(data).replace('"@@"', rng.choice(_VALUES), 1)
    return text.encode() if row is None else b"".join([*lines[:row], text.encode() + b"\n", *lines[row + 1 :]])


def _spots(data: Any) -> "list[tuple[Any, Any]]":
    """Every place of a value in nested lists and dictionaries."""
    found: list[tuple[Any, Any]] = []
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        found += _spots(data[key])
    return found
