"""A finished estimation of Shapley values, and its file estimate.json in a run folder."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from coopq.core.errors import RunError
from coopq.core.files import read_record, write_record
from coopq.core.sizes import Sizes
from coopq.core.specs import Request, request_words
from coopq.core.subject import Subject
from coopq.core.types import Player, as_width
from coopq.game.run_folder import RunFolder
from coopq.search.shapley import ShapleyEstimate

_FORMAT_VERSION = 5


@dataclass(frozen=True)
class Spent:
    """What a method takes, in forwards of one block over all calibration tokens.

    Attributes:
        block_forwards: The number of an uninterrupted run that shares the forwards of common prefixes.
        unshared: The same number if no two assignments shared a prefix.
    """

    block_forwards: int
    unshared: int


@dataclass(frozen=True)
class Estimation(Subject):
    """A finished estimation with everything that an allocation and a plan need.

    Attributes:
        estimate: What the walks say.
        spent: What the walks took.
    """

    estimate: ShapleyEstimate
    spent: Spent


_Size = Annotated[int, Meta(ge=0)]


class _Estimate(Struct, forbid_unknown_fields=True):
    """The arrays of `ShapleyEstimate` as lists."""

    shapley: list[float]
    stderr: list[Annotated[float, Meta(ge=0)]]
    covariance: list[list[float]]
    loss_high: float
    permutations: Annotated[int, Meta(ge=2)]


class _Record(Struct, forbid_unknown_fields=True):
    """estimate.json."""

    request: Request
    fingerprint: dict[str, Any]
    players: Annotated[tuple[Player, ...], Meta(min_length=1)]
    bytes: dict[str, tuple[_Size | None, ...]]
    fixed: _Size
    reserved: _Size
    estimate: _Estimate
    spent: Spent

    def __post_init__(self) -> None:
        n = len(self.players)
        found = self.estimate
        lengths = [len(found.shapley), len(found.stderr), len(found.covariance)]
        lengths += [*map(len, found.covariance), *map(len, self.bytes.values())]
        if set(lengths) != {n}:
            raise ValueError(f"not every list has a value for each of {n} players")
        if not set(self.request.widths.bits) <= {as_width(bits) for bits in self.bytes}:
            raise ValueError(f"no sizes for some of {self.request.widths.text} bits")
        linears = [linear for player in self.players for linear in player.linears]
        if (
            len({linear.name for linear in linears}) < len(linears)
            or not linears
            or min(min(x.shape) for x in linears) < 1
        ):
            raise ValueError("a module belongs to two players, or has no weights")


def save_estimation(folder: RunFolder, estimation: Estimation) -> None:
    """Write an estimation into its run folder."""
    plain = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(estimation.estimate).items()
    }
    record = _Record(
        request=estimation.request,
        fingerprint=dict(estimation.fingerprint),
        players=estimation.players,
        bytes={str(bits): n_bytes for bits, n_bytes in estimation.sizes.n_bytes.items()},
        fixed=estimation.sizes.fixed,
        reserved=estimation.sizes.reserved,
        estimate=_Estimate(**plain),
        spent=estimation.spent,
    )
    write_record(folder.estimate, record, _FORMAT_VERSION)


def load_estimation(path: Path) -> Estimation:
    """The estimation of a run folder.

    Raises:
        RunError: As `find_estimation`, or if the estimation is not finished.
    """
    if (found := find_estimation(path)) is None:
        request = RunFolder(path).request()
        if len(request.widths.bits) == 2:
            walked = request.replace(target=None, base=None, context=None, screen_tokens=None)
            words = ["coopq", "estimate", *request_words(walked), "--run", str(path)]
            way_out = f"run: {shlex.join(words)}"
        else:
            way_out = "estimate in another run folder, with two widths: --bits 2,4"
        raise RunError(f"{path} holds no finished estimation, which the paper's program needs; {way_out}")
    return found


def find_estimation(path: Path) -> Estimation | None:
    """The estimation of a run folder; None if the walks that the folder was asked for last are not finished.

    Raises:
        RunError: If the folder is no run folder, or the file is damaged.
    """
    folder = RunFolder(path)
    request = folder.request()
    if not folder.estimate.is_file():
        return None
    record = read_record(
        folder.estimate,
        _Record,
        _FORMAT_VERSION,
        what="record of an estimation",
        missing=f"{folder.estimate} is gone; estimate again",
        way_out="use another run folder",
        error=RunError,
    )
    ours, theirs = record.request.search, request.search
    if (ours.permutations, ours.seed) != (theirs.permutations, theirs.seed):
        return None
    estimate = record.estimate
    return Estimation(
        request=record.request,
        players=record.players,
        sizes=Sizes(
            n_weights=tuple(player.n_weights for player in record.players),
            n_bytes={as_width(bits): n_bytes for bits, n_bytes in record.bytes.items()},
            fixed=record.fixed,
            reserved=record.reserved,
        ),
        fingerprint=record.fingerprint,
        estimate=ShapleyEstimate(
            shapley=np.array(estimate.shapley),
            stderr=np.array(estimate.stderr),
            covariance=np.array(estimate.covariance),
            loss_high=estimate.loss_high,
            permutations=estimate.permutations,
        ),
        spent=record.spent,
    )
