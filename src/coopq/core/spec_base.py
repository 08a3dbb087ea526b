"""The base of all specs, and what options and messages are made from."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from coopq.core.errors import OptionError


class Spec(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all specs: every field is checked against its type and its limits when a spec is built.

    Raises:
        OptionError: If a value does not fit; the message names the option, the value and what fits.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                msgspec.convert(value, field.type)
            except msgspec.ValidationError as error:
                reason = str(error).replace("Expected", "expected").replace("`", "")
                raise OptionError(
                    f"{option_name(field)} = {value!r} does not fit: {_allowed(field) or reason}"
                ) from error


def build(kind: type[Spec], options: Mapping[str, Any]) -> Any:
    """A spec from flat options; options of other specs are ignored.

    Raises:
        OptionError: If a value does not fit, or a value is missing that has no default.
    """
    given = {field.name: options[field.encode_name] for field in fields(kind) if field.encode_name in options}
    missing = [field.encode_name for field in fields(kind) if field.required and field.name not in given]
    if missing:
        raise OptionError(f"{spelled(missing[0])} is missing; give one")
    return kind(**given)


def spec_options(spec: Spec) -> dict[str, Any]:
    """The values of a spec by option name."""
    return {field.encode_name: getattr(spec, field.name) for field in fields(spec)}


def option_name(field: FieldInfo) -> str:
    """An option's name as users write it: "sequence-length"."""
    return spelled(field.encode_name)


def spelled(name: str) -> str:
    """An option's name with dashes, as users write it."""
    return name.replace("_", "-")


def _allowed(field: FieldInfo) -> str:
    """What a field with a list of choices takes; nothing for other fields."""
    kind = get_args(field.type)[0]
    return f"choose from {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
