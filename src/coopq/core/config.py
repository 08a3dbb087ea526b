"""A run folder: what was asked for, what was measured, what was learnt.

run.json       the configuration
journal.jsonl  every loss measured on the calibration set
estimate.json  Shapley values, covariance, sizes: all that an allocation needs
bank/          dequantised weights
scores/        what one-layer scores say
searches.json  what searches knew when they began
screening-*    losses on the screening sequences
plans/         one plan for each budget allocated from this run
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coopq.core.errors import Mismatch, RunError
from coopq.search import ShapleyEstimate
from coopq.core.files import write_json
from coopq.core.sizes import Storage
from coopq.core.types import UNTOUCHED, LinearLayer, Player, Width, as_width

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the game is played on.

    Attributes:
        source: "c4" (the packaged sample), a .txt or .jsonl file, or "hub:NAME" or "hub:NAME:CONFIG".
        sequences: Number of sequences.
        length: Tokens of each sequence.
        seed: Seed of the choice of sequences.
        fitting: Number of further sequences, which searches do not see: backends that fit weights fit them to these.
            None takes 32,768 tokens, or what the text has left.
    """

    source: str = "c4"
    sequences: int = 16
    length: int = 512
    seed: int = 0
    fitting: int | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that an estimation depends on.

    Attributes:
        model: Hub id, local folder, GGUF file, or "demo".
        backend: "rtn", "quanto", "hqq", "gptq", "gptq-static", "autoround", "ggml", "ggml-iq" or "ggml-gptq".
        group_size: Weights that share a scale; None takes the backend's default.
        act_order: For gptq and gptq-static; None takes their default.
        symmetric: For these and autoround; None takes their default.
        low: Bit-width that players are lowered to.
        high: Bit-width that players start from.
        permutations: Number of walks, M.
        seed: Seed of the walks.
        calibration: The text.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPUs, the checkpoint's elsewhere.
        device: "cpu", "cuda", ..., "sharded" (all GPUs), or "auto".
        between: Other widths between `low` and `high`, ascending.
        target: Form of an engine that the model will be exported to (`coopq.export.formats.FORMS`): what it cannot hold is
            refused before any work, and budgets in bytes are those of the exported file. None exports nowhere.
        base: The model in full precision in the form of the target "gguf" or "openvino"; None where the model is a
            GGUF file itself, or for other targets.
        context: Tokens of a KV cache of 16 bits that budgets in bytes have to hold too.
        embeddings: Whether the embedding and the head are players too; one, where they are tied.
        granularity: What is a player: a "block", layers that engines fuse ("fused"), or each "linear" layer.
        screening: Calibration sequences that searches look at; the decision falls on all of them. None takes all.
        loss: What searches lower, one of `coopq.game.losses.LOSSES`.
    """

    model: str
    backend: str = "rtn"
    group_size: int | None = None
    low: Width = 2
    high: Width = 4
    permutations: int = 25
    seed: int = 0
    calibration: CalibrationConfig = CalibrationConfig()
    dtype: str = "auto"
    device: str = "auto"
    act_order: bool | None = None
    symmetric: bool | None = None
    granularity: str = "block"
    screening: int | None = None
    between: tuple[Width, ...] = ()
    embeddings: bool = False
    target: str | None = None
    base: str | None = None
    context: int | None = None
    loss: str = "nll"

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths to choose from, ascending."""
        return (self.low, *self.between, self.high)

    @property
    def quantized_widths(self) -> tuple[Width, ...]:
        """Those that weights are quantized to."""
        return tuple(width for width in self.widths if width != UNTOUCHED)

    @property
    def widths_text(self) -> str:
        """The same for people."""
        *first, last = map(str, self.widths)
        return f"{', '.join(first)} and {last}"

    @property
    def quantizer(self) -> dict[str, Any]:
        """The backend with its options, as `coopq.quantize.get_backend` takes them."""
        return {
            "name": self.backend,
            "group_size": self.group_size,
            "act_order": self.act_order,
            "symmetric": self.symmetric,
        }

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"between": list(self.between)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RunConfig":
        """From what `to_json` gave."""
        calibration, between = CalibrationConfig(**data["calibration"]), tuple(data.get("between", ()))
        return cls(**{**data, "calibration": calibration, "between": between})


@dataclass(frozen=True)
class Subject:
    """What plans are made for.

    Attributes:
        config: What was asked for.
        players: Who plays.
        storage: Their sizes.
        fingerprint: What losses depend on.
    """

    config: RunConfig
    players: tuple[Player, ...]
    storage: Storage
    fingerprint: Mapping[str, Any]

    @cached_property
    def levels(self) -> tuple[tuple[Width, ...], ...]:
        """The widths that each player has, ascending."""
        return self.storage.levels(*self.config.widths)

    @property
    def common_widths(self) -> tuple[Width, ...]:
        """Those that weights are quantized to, and that every player has."""
        return tuple(bits for bits in self.config.quantized_widths if all(bits in levels for levels in self.levels))


@dataclass(frozen=True)
class Estimation(Subject):
    """A finished estimation with everything that an allocation and a plan need.

    Attributes:
        estimate: What the walks say.
        layer_forwards: Block forwards over all calibration tokens that one uninterrupted run spends.
        layer_forwards_unshared: The same without sharing prefixes: walks times players times blocks.
    """

    estimate: ShapleyEstimate
    layer_forwards: int
    layer_forwards_unshared: int


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: The folder.
        bank: Folder of the weight bank, if not in this one.
    """

    def __init__(self, path: Path, bank: Path | None = None) -> None:
        self.path = path
        self.bank = bank or path / "bank"
        self.journal = path / "journal.jsonl"
        self.evaluation = path / "evaluation"
        self.plans = path / "plans"

    @property
    def is_estimated(self) -> bool:
        """Whether the estimation is finished."""
        return (self.path / "estimate.json").is_file()

    def check(self, config: RunConfig) -> None:
        """Check that `config` goes on with the configuration recorded, if there is one.

        Other walks go on from the same journal. Where the model lies, what computes, and what budgets in bytes hold
        may change too: the fingerprints of the weight bank and the journal guard what they must not.

        Raises:
            Mismatch: If the folder belongs to another configuration.
        """
        if (self.path / "run.json").exists():
            ours, theirs = config.to_json(), self.config().to_json()
            for free in ("permutations", "seed", "model", "device", "dtype", "screening", "target", "base", "context"):
                theirs[free] = ours[free]
            if ours != theirs:
                raise Mismatch(
                    f"run folder {self.path} was started with another configuration",
                    ours,
                    theirs,
                    "use another run folder, or repeat the first configuration",
                )

    def start(self, config: RunConfig) -> None:
        """Record the configuration."""
        write_json(self.path / "run.json", {"format_version": _FORMAT_VERSION, "config": config.to_json()})

    def config(self) -> RunConfig:
        """The configuration.

        Raises:
            RunError: If this is no run folder.
        """
        path = self.path / "run.json"
        data = _read(path, f"{self.path} is not a run folder; `coopq estimate` makes one")
        with _complete(path):
            return RunConfig.from_json(data["config"])

    def save(self, estimation: Estimation) -> None:
        """Write the estimation."""
        estimate = estimation.estimate
        write_json(
            self.path / "estimate.json",
            {
                "format_version": _FORMAT_VERSION,
                "config": estimation.config.to_json(),
                "fingerprint": dict(estimation.fingerprint),
                "layer_forwards": estimation.layer_forwards,
                "layer_forwards_unshared": estimation.layer_forwards_unshared,
                "players": [asdict(player) for player in estimation.players],
                "bytes": {str(bits): list(sizes) for bits, sizes in estimation.storage.n_bytes.items()},
                "fixed": estimation.storage.fixed,
                "estimate": {
                    field.name: value.tolist() if isinstance(value, np.ndarray) else value
                    for field in fields(estimate)
                    for value in [getattr(estimate, field.name)]
                },
            },
        )

    def load(self) -> Estimation:
        """The estimation.

        Raises:
            RunError: If there is none yet.
        """
        config, path = self.config(), self.path / "estimate.json"
        unfinished = (
            f"the work in {self.path} is not finished; repeat the command it was started with, or estimate with: "
            f"coopq estimate {config.model} --run {self.path}"
        )
        data = _read(path, unfinished)
        with _complete(path):
            estimation = _estimation(data)
        if (estimation.config.permutations, estimation.config.seed) != (config.permutations, config.seed):
            raise RunError(unfinished)
        return estimation


def _estimation(data: Mapping[str, Any]) -> Estimation:
    """What `RunFolder.save` wrote."""
    players = tuple(
        Player(
            name=player["name"],
            linears=tuple(
                LinearLayer(x["name"], (x["shape"][0], x["shape"][1]), x.get("is_plain", True))
                for x in player["linears"]
            ),
            block=player.get("block", index),  # not written when every player was a block
            is_end=player.get("is_end", False),
        )
        for index, player in enumerate(data["players"])
    )
    estimate: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in data["estimate"].items()}
    return Estimation(
        config=RunConfig.from_json(data["config"]),
        players=players,
        storage=Storage(
            n_weights=tuple(player.n_weights for player in players),
            n_bytes={as_width(bits): tuple(sizes) for bits, sizes in data["bytes"].items()},
            fixed=data.get("fixed", 0),
        ),
        estimate=ShapleyEstimate(**estimate),
        fingerprint=data["fingerprint"],
        layer_forwards=data["layer_forwards"],
        layer_forwards_unshared=data["layer_forwards_unshared"],
    )


@contextmanager
def _complete(path: Path) -> Iterator[None]:
    """Turn what reading an incomplete file raises into an error that says so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is not complete ({error!r}); use another run folder") from error


def _read(path: Path, missing: str) -> dict[str, Any]:
    """A JSON file of this folder; `missing` is the error when it does not exist."""
    if not path.is_file():
        raise RunError(missing)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not readable as JSON ({error}); use another run folder") from error
    if not isinstance(data, dict) or data.get("format_version") != _FORMAT_VERSION:
        raise RunError(f"{path} has an unknown format; this version of coopq reads version {_FORMAT_VERSION}")
    return data
