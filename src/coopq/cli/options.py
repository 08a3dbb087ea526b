"""Command-line options made from the specs: names, types, defaults and help come from `coopq.core.specs`."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem
from msgspec import Meta
from msgspec.structs import FieldInfo, fields

from coopq.core.errors import EstimationError, OptionError
from coopq.core.files import expanded
from coopq.core.goal import Goal
from coopq.core.recipes import ENGINES, OWN, RECIPES, recipe_options
from coopq.core.spec_base import Spec, build
from coopq.core.specs import (
    ModelSpec,
    QuantizerSpec,
    Request,
    SearchSpec,
    SolverSpec,
    TargetSpec,
    TextSpec,
    WidthsSpec,
)
from coopq.core.types import as_widths
from coopq.export.formats import FORMS
from coopq.plan.methods import METHODS
from coopq.quantizers import BACKENDS

if TYPE_CHECKING:  # it imports torch
    from coopq.game.engines.ray_cluster import RayConfig

_SECTIONS: dict[type[Spec], str] = {
    ModelSpec: "Model",
    Goal: "Goal",
    QuantizerSpec: "Quantizer",
    WidthsSpec: "Widths",
    TextSpec: "Calibration text",
    SearchSpec: "Search",
    SolverSpec: "Solver",
    TargetSpec: "Target engine",
}
_REQUEST = (ModelSpec, QuantizerSpec, WidthsSpec, TextSpec, SearchSpec, TargetSpec)
_NAMES: dict[str, Mapping[str, Any]] = {"backend": BACKENDS, "method": METHODS, "target": FORMS}
"""Options whose values are names of a registry."""

Command = Callable[..., None]


class SectionedCommand(click.Command):
    """A command whose help groups the options by the spec that they belong to."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each spec, and one for the options of the command itself."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *_SECTIONS.values())}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and record[1]:  # plain arguments are explained by the text above
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class SpecOption(click.Option):
    """An option of a spec, with the section of the help that the option belongs to."""

    def __init__(self, *args: Any, section: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class SpecArgument(click.Argument):
    """A required value of a spec, which the help explains as the help explains options."""

    def __init__(self, *args: Any, section: str, explanation: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section
        self.explanation = explanation

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The value's name and what the value is."""
        return (self.name or "").upper(), self.explanation


class _Place(click.Path):
    """A file or folder; `~` is the user's home, also where no shell expands it: after `=`, or from a program."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, absolute if it begins with `~`."""
        return expanded(str(super().convert(value, param, ctx)))


PLACE = _Place()


class _Name(click.ParamType):  # type: ignore[type-arg]  # generic at run time in new versions alone
    """A name that is checked elsewhere, with completion."""

    name = "text"

    def __init__(self, choices: Iterable[str]) -> None:
        self._choices = list(choices)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin with what is typed."""
        return [CompletionItem(name) for name in self._choices if name.startswith(incomplete)]


class _Widths(click.ParamType):  # type: ignore[type-arg]
    """Widths with commas between."""

    name = "widths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The widths as numbers."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(as_widths(value.split(",")))
        except ValueError as error:
            raise OptionError(f"bits = {value!r} are not widths with commas between; write 2,4 or 2,3,4,8") from error


def takes(
    *kinds: type[Request] | type[Spec], without: Sequence[str] = (), recipes: bool = False
) -> Callable[[Command], Command]:
    """Give a command the options of specs; the command gets the specs built from them, as keywords.

    Args:
        kinds: `Request` (keyword `request`), `Goal` (`goal`), `SolverSpec` (`solver`).
        without: Names of options that the command does not need; they keep their defaults.
        recipes: Whether `--for` and `--recipe` choose the options that are not given (keywords `engine`, `recipe`).
    """
    specs = [spec for kind in kinds for spec in _specs(kind)]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_specs(**values: Any) -> None:
            given: dict[str, Any] = {}
            if recipes:
                named = {name: value for name, value in values.items() if is_named(name)}
                named = {name: value for name, value in named.items() if name not in ("engine", "recipe")}
                values["recipe"] = values["recipe"] or values["engine"] or OWN
                values |= recipe_options(values["recipe"], values["engine"] or OWN, named)
            for kind in kinds:
                own = {name: values[name] for name in _option_names(kind) if name in values}
                built = Request.from_options(**own) if kind is Request else build(kind, own)  # type: ignore[arg-type]
                given[_KEYWORDS[kind]] = built
            taken = {name for kind in kinds for name in _option_names(kind)}
            command(**given, **{name: value for name, value in values.items() if name not in taken})

        for spec in reversed(specs):
            for field in reversed(fields(spec)):
                if field.encode_name not in without:
                    _parameter(spec, field, recipes)(with_specs)
        if recipes:
            _ENGINE(_RECIPE(with_specs))
        return with_specs

    return decorate


_ENGINE = click.option(
    "--for",
    "engine",
    type=_Name(ENGINES),
    help=f"Engine that will run the model. One of: {', '.join(ENGINES)}. Default: {OWN}.",
)
_RECIPE = click.option(
    "--recipe", type=_Name(RECIPES), help="Instead of the engine's recipe: speed (for llama.cpp), or paper."
)


def is_named(name: str) -> bool:
    """Whether the user wrote an option of the running command."""
    source = click.get_current_context().get_parameter_source(name)
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


_KEYWORDS: dict[type[Any], str] = {Request: "request", Goal: "goal", SolverSpec: "solver"}


def _specs(kind: type[Any]) -> tuple[type[Spec], ...]:
    """The specs that a kind is made of."""
    return _REQUEST if kind is Request else (kind,)


def _option_names(kind: type[Any]) -> list[str]:
    return [field.encode_name for spec in _specs(kind) for field in fields(spec)]


def _parameter(spec: type[Spec], field: FieldInfo, recipes: bool) -> Callable[[Command], Command]:
    """The argument or option of a field; defaults that recipes choose are not shown."""
    if field.required:
        explanation = get_args(field.type)[1].description
        return click.argument(field.encode_name, cls=SpecArgument, section=_SECTIONS[spec], explanation=explanation)
    kind, meta = _unpacked(field.type)
    name = field.encode_name
    flag = "--" + name.replace("_", "-")
    settings: dict[str, Any] = {"default": field.default, "help": _help(name, meta), "section": _SECTIONS[spec]}
    is_of_recipe = recipes and any(name in recipe.settings for recipe in RECIPES.values())
    if kind is bool:
        switches = meta.extra["flags"] if meta.extra else f"{flag}/--no-{flag[2:]}"
        settings |= {"is_flag": True, "show_default": "the recipe's" if is_of_recipe else None}
        return click.option(switches, name, cls=SpecOption, **settings)
    settings |= {"type": _click_type(name, kind), "show_default": field.default is not None}
    if is_of_recipe:
        settings["show_default"] = "the recipe's"
    elif name == "bits":
        settings["show_default"] = ",".join(map(str, field.default))
    flags = ("--size", flag) if name == "budget" else (flag,)
    return click.option(*flags, name, cls=SpecOption, **settings)


def _unpacked(annotation: Any) -> tuple[Any, Meta]:
    """The plain type of a field, None left out, and what the spec says of the field."""
    kind, meta = get_args(annotation)[:2]
    others = [part for part in get_args(kind) if part is not type(None)]
    is_union = get_origin(kind) not in (Literal, tuple) and others
    return (others[0] if is_union else kind), meta


def _help(name: str, meta: Meta) -> str:
    description = meta.description or ""
    return f"{description} One of: {', '.join(_NAMES[name])}." if name in _NAMES else description


def _click_type(name: str, kind: Any) -> Any:
    if name == "bits":
        return _Widths()
    if name in _NAMES:
        return _Name(_NAMES[name])
    return _Name(get_args(kind)) if get_origin(kind) is Literal else kind


def ray_config(address: str | None, workers: int | None) -> "RayConfig | None":
    """The cluster, if one is named."""
    if address is None:
        if workers is not None:
            raise EstimationError(f"--workers {workers} goes with a cluster; name one with --ray-address")
        return None
    from coopq.game.engines.ray_cluster import RayConfig

    return RayConfig(address, workers)


def takes_cluster(command: Command) -> Command:
    """Give a command the options of a Ray cluster."""
    for option in (
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="Number of workers. Default: one for each GPU, or one for each CPU core.",
        ),
        click.option(
            "--ray-address",
            help="Measure on a Ray cluster: its address, 'auto' for this machine's cluster, 'local' to start one here.",
        ),
    ):
        command = option(command)
    return command


def _name_converter(_: click.Context, __: click.Parameter, place: Path | None) -> None:
    """Name llama.cpp's converter for this process, and for no saved file."""
    if place is not None:
        os.environ["COOPQ_CONVERTER"] = str(place)


converter = click.option(
    "--converter",
    type=PLACE,
    expose_value=False,
    callback=_name_converter,
    help="For gguf without --base: convert_hf_to_gguf.py of llama.cpp, which makes the base. Default: "
    "$COOPQ_CONVERTER, the installed package convert-hf-to-gguf, or the command of that name.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
out_folder = click.option(
    "--out",
    type=PLACE,
    required=True,
    help="Folder of the quantized model; it appears whole, at the end.",
)
