"""Scores and the files that keep them in a run folder."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from coopq.core.errors import RunError
from coopq.core.files import read_record, write_record
from coopq.game.run_folder import RunFolder
from coopq.plan.scores import Gains

_FORMAT_VERSION = 2


class _Record(Struct, forbid_unknown_fields=True):
    """The file of a score."""

    fingerprint: dict[str, Any]
    gains: list[float]
    block_forwards: Annotated[int, Meta(ge=0)]
    pairs: list[list[float]] | None = None


class Score(NamedTuple):
    """What a score says.

    Attributes:
        gains: Loss, or what stands for the loss, saved by not taking each step down, shape (n_steps,).
        pairs: What pairs of steps cost beyond that, shape (n_steps, n_steps); None for scores without pair terms.
        block_forwards: What the score takes.
    """

    gains: Gains
    pairs: Gains | None
    block_forwards: int


def save_score(folder: RunFolder, name: str, score: Score, fingerprint: Mapping[str, Any]) -> None:
    """Keep a score in a run folder, with what the score depends on."""
    folder.scores.mkdir(exist_ok=True)
    pairs = None if score.pairs is None else score.pairs.tolist()
    record = _Record(dict(fingerprint), score.gains.tolist(), score.block_forwards, pairs)
    write_record(folder.scores / f"{name}.json", record, _FORMAT_VERSION)


def kept_score(folder: RunFolder, name: str, fingerprint: Mapping[str, Any]) -> Score | None:
    """A score that a run folder keeps, if it was made for what a fingerprint says; None if there is none.

    Args:
        folder: The run folder.
        name: Name of the score.
        fingerprint: What the score has to depend on, as plain data.
    """
    path = folder.scores / f"{name}.json"
    if not path.is_file():
        return None
    kept = read_record(
        path,
        _Record,
        _FORMAT_VERSION,
        what="score",
        missing=f"{path} is gone; run the same command again",
        way_out="delete it, and run the same command again",
        error=RunError,
    )
    if {key: kept.fingerprint.get(key) for key in fingerprint} != fingerprint:
        return None
    return Score(np.array(kept.gains), None if kept.pairs is None else np.array(kept.pairs), kept.block_forwards)
