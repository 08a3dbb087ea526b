"""What a bench compares, as its configuration file lists it."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from coopq.core.errors import RunError, hint
from coopq.core.config import CalibrationConfig, RunConfig

_REQUIRED = ("models", "backends", "bits", "budgets", "methods")
_DEFAULTS: dict[str, Any] = {
    "label": "",
    "seeds": [0],
    "granularity": "block",
    "embeddings": False,
    "group-size": None,
    "permutations": 25,
    "calibration": "c4",
    "tokens": 8192,
    "sequence-length": 512,
    "dtype": "auto",
    "device": "auto",
    "loss": "nll",
}
_WHOLE: dict[str, Any] = {"title": "Bench", "judge-tokens": None, "judge-length": 512}
"""What holds for all cases; the rest can be set for a case too."""


@dataclass(frozen=True)
class Case:
    """One table of a bench.

    Attributes:
        config: Model, backend, widths, text; seeds are set for each run.
        budgets: The columns.
        methods: The rows.
        seeds: Of walks and of the choice of calibration sequences, both; a run each.
        label: Tells cases apart that differ in nothing else that their names show.
    """

    config: RunConfig
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    label: str = ""

    @property
    def name(self) -> str:
        """Model, backend, widths, who plays beside or instead of blocks, and label."""
        config = self.config
        parts = [Path(config.model).name.removesuffix(".gguf"), config.backend, *map(str, config.widths)]
        parts += [] if config.granularity == "block" else [config.granularity]
        parts += ["embeddings"] if config.embeddings else []
        parts += [] if config.loss == "nll" else [config.loss]
        return "-".join([*parts, self.label] if self.label else parts)

    def seeded(self, seed: int) -> RunConfig:
        """The configuration of one run."""
        return replace(self.config, seed=seed, calibration=replace(self.config.calibration, seed=seed))


@dataclass(frozen=True)
class Bench:
    """What is compared, and on what it is judged.

    Attributes:
        title: For people.
        cases: The tables.
        judge_tokens: Only the first tokens of WikiText-2; None takes all.
        judge_length: Tokens of a window.
        unfinished: Cases and seeds that were asked for and are left out, for people.
    """

    title: str
    cases: tuple[Case, ...]
    judge_tokens: int | None
    judge_length: int
    unfinished: tuple[str, ...] = ()


def read_bench(path: Path) -> Bench:
    """A bench from its TOML file.

    Every key of a `[[case]]` has the value of the same key at the top of the file unless it sets its own. `models`,
    `backends`, and `bits`, each a list of widths, are lists: a case stands for all combinations. Models and calibration
    texts that are found beside the file are meant as paths from there.

    Raises:
        RunError: If the file cannot be read, lacks a key, or has one that means nothing.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as TOML: {error}") from error
    tables = data.pop("case", [{}])
    whole = {**_WHOLE, **{key: data.pop(key) for key in _WHOLE if key in data}}
    known = (*_REQUIRED, *_DEFAULTS)
    cases: list[Case] = []
    for table in tables:
        values = {**_DEFAULTS, **data, **table}
        for key in values:
            if key not in known:
                raise RunError(f"{path}: {key!r} means nothing in a case; {hint(key, known)}")
        for key in _REQUIRED:
            if key not in values:
                raise RunError(f"{path}: a case has no {key!r}, and the top of the file has none for all")
        for model, backend, bits in product(values["models"], values["backends"], values["bits"]):
            cases.append(_case(path, values, model, backend, bits))
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f'{path}: two cases are {name}; give one a label = "..."')
    return Bench(whole["title"], tuple(cases), whole["judge-tokens"], whole["judge-length"])


def _case(path: Path, values: Mapping[str, Any], model: str, backend: str, bits: Any) -> Case:
    length, tokens = values["sequence-length"], values["tokens"]
    if tokens % length:
        raise RunError(f"{path}: tokens = {tokens} is not a multiple of sequence-length = {length}")
    if not (isinstance(bits, list) and len(set(bits)) == len(bits) >= 2):
        raise RunError(f"{path}: bits holds {bits!r}; write lists of widths, [[2, 4], [2, 3, 4, 8]] for example")
    low, *between, high = sorted(bits)
    if not (isinstance(values["label"], str) and re.fullmatch(r"[\w.-]*", values["label"])):
        raise RunError(f"{path}: label = {values['label']!r} is not letters, digits, '.', '_' and '-'")
    config = RunConfig(
        _beside(path, model),
        backend,
        values["group-size"],
        low,
        high,
        values["permutations"],
        calibration=CalibrationConfig(_beside(path, values["calibration"]), tokens // length, length),
        dtype=values["dtype"],
        device=values["device"],
        granularity=values["granularity"],
        between=tuple(between),
        embeddings=values["embeddings"],
        loss=values["loss"],
    )
    return Case(config, tuple(values["budgets"]), tuple(values["methods"]), tuple(values["seeds"]), values["label"])


def _beside(path: Path, name: str) -> str:
    """The path of what lies beside the configuration file, and other names as they are."""
    beside = path.parent / name
    return str(beside) if beside.exists() else name
