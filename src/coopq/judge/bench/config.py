"""The TOML file of a bench: its keys are the options of a request, and lists of what is compared."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta
from msgspec.structs import force_setattr

from coopq.core.errors import BudgetError, OptionError, RunError, hint
from coopq.core.files import expanded
from coopq.core.sizes import Budget
from coopq.core.spec_base import Spec, build, spec_options
from coopq.core.specs import Request, option_fields
from coopq.core.types import Width

Value = TypeVar("Value")
_Several = Annotated[tuple[Value, ...], Meta(min_length=1)]


class _Lists(Spec, frozen=True):
    """What a case compares: one run for each model, backend, list of widths and seed."""

    models: _Several[str]
    backends: _Several[str]
    bits: _Several[tuple[Width, ...]]
    budgets: _Several[str]
    methods: _Several[str]
    seeds: _Several[Annotated[int, Meta(ge=0)]] = (0,)
    label: Annotated[str, Meta(pattern=r"^[\w.-]*$")] = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, list) and all(isinstance(widths, list) for widths in self.bits)):
            raise OptionError(f"bits = {self.bits!r}; write lists of widths, [[2, 4], [2, 3, 4, 8]] for example")
        super().__post_init__()
        # A result has the budget as `Budget` writes it, and finds its case by it.
        force_setattr(self, "budgets", [Budget.parse(budget).text for budget in self.budgets])
        for name, values in spec_options(self).items():
            again = [value for value in values if values.count(value) > 1]
            if again and name != "label":
                raise OptionError(f"{name} = {values!r} names {again[0]!r} twice; leave one out")


class _ForAll(Spec, frozen=True):
    """Keys that only the top of the file can have."""

    title: str = "Bench"
    judge_tokens: int | None = None
    judge_length: Annotated[int, Meta(ge=2)] = 512


_LISTED = ("model", "backend", "seed")
"""Options of a request that a case lists in the plural."""
_PATHS = ("model", "calibration", "base", "imatrix")
"""Options that may be a path relative to the file."""


@dataclass(frozen=True)
class Case:
    """One table of a bench.

    Attributes:
        request: Model, backend, widths, text and target.
        budgets: The columns of the table.
        methods: The rows of the table.
        seeds: Seeds of walks, of searches and of the choice of calibration sequences; one run for each seed.
        label: Distinguishes cases whose names would be equal.
        fixed_text: Whether the calibration seed of the request is used instead of the seed of the run.
    """

    request: Request
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    label: str = ""
    fixed_text: bool = False

    @property
    def name(self) -> str:
        """Model, backend and widths; granularity, embeddings and loss where they are not the default; the label."""
        request = self.request
        model, widths = Path(request.model.source).name.removesuffix(".gguf"), request.widths
        parts = [model, request.quantizer.backend, *map(str, widths.bits)]
        parts += [] if widths.granularity == "block" else [widths.granularity]
        parts += ["embeddings"] if widths.embeddings else []
        parts += [] if request.search.loss == "nll" else [request.search.loss]
        return "-".join([*parts, self.label] if self.label else parts)

    def seeded(self, seed: int) -> Request:
        """The request of one run."""
        if self.fixed_text:
            return self.request.replace(seed=seed)
        return self.request.replace(seed=seed, calibration_seed=seed)


@dataclass(frozen=True)
class Bench:
    """What is compared, and on which text assignments are judged.

    Attributes:
        title: Title of the report.
        cases: The tables.
        judge_tokens: Only the first tokens of WikiText-2; None takes all.
        judge_length: Tokens of a window of WikiText-2.
        unfinished: Cases and seeds that are left out of the report because they are not finished, for people.
    """

    title: str
    cases: tuple[Case, ...]
    judge_tokens: int | None
    judge_length: int
    unfinished: tuple[str, ...] = ()


def read_bench(path: Path) -> Bench:
    """A bench from its TOML file.

    A key at the top of the file holds for each `[[case]]` that does not set the key itself. `models`, `backends`,
    `bits` (lists of widths) and `seeds` are lists; a case stands for all combinations. Every other option of a request
    is a key, spelled "sequence-length" or "sequence_length". A seed is also the calibration seed of its run, unless the
    case sets `calibration-seed`. Models, texts and bases may be paths relative to the file.

    Raises:
        RunError: If the file cannot be read, a key is missing or unknown, or a value does not fit.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as TOML: {error}") from error
    tables = data.pop("case", [{}])
    if not (isinstance(tables, list) and all(isinstance(table, dict) for table in tables)):
        raise RunError(f"{path}: case = {tables!r} is no list of tables; write [[case]] before each case")
    in_case = [name for name in dict.fromkeys(_names(_Lists) + _names()) if name not in _LISTED]
    try:
        top = _spelled_with_underscores(data, [*_names(_ForAll), *in_case])
        for_all = build(_ForAll, top)
        shared = {name: value for name, value in top.items() if name in in_case}
        tables = [{**shared, **_spelled_with_underscores(table, in_case)} for table in tables]
        cases = tuple(case for table in tables for case in _cases(path, table))
    except (BudgetError, OptionError) as error:
        raise RunError(f"{path}: {error}") from error
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f'{path}: two cases are {name}; give one a label = "..."')
    return Bench(for_all.title, cases, for_all.judge_tokens, for_all.judge_length)


def _cases(path: Path, table: Mapping[str, Any]) -> Iterator[Case]:
    """The cases that a table stands for, one for each model, backend and list of widths."""
    lists = build(_Lists, table)
    options = {name: value for name, value in table.items() if name not in _names(_Lists)}
    for model, backend, bits in product(lists.models, lists.backends, lists.bits):
        found = {**options, "model": model, "backend": backend, "bits": tuple(bits)}
        relative = {name: _beside(path, found[name]) for name in _PATHS if isinstance(found.get(name), str)}
        yield Case(
            request=Request.from_options(**{**found, **relative}),
            budgets=tuple(lists.budgets),
            methods=tuple(lists.methods),
            seeds=tuple(lists.seeds),
            label=lists.label,
            fixed_text="calibration_seed" in found,
        )


def _names(*kinds: type[Spec]) -> list[str]:
    """Names of the options of specs; without specs, those of a request."""
    return [field.encode_name for field in option_fields(*kinds)]


def _spelled_with_underscores(table: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """A table with underscores in its keys.

    Raises:
        OptionError: If a key is unknown, or is there in both spellings.
    """
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise OptionError(f"key {key!r} is unknown here; {hint(key, [name.replace('_', '-') for name in known])}")
        if name in found:
            raise OptionError(f"key {key!r} is given twice, in two spellings; leave one out")
        found[name] = value
    return found


def _beside(path: Path, name: str) -> str:
    """A path relative to the file, if something lies there; other names unchanged."""
    beside = path.parent / expanded(name)
    return str(beside) if beside.exists() else name
