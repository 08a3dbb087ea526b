"""Writes the pages that follow from the code: all options, the Python API and the list of decisions.

python -m tools.reference    # from the root of the checkout; tests/test_docs.py fails where a page is stale
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from msgspec.structs import fields

import coopq
from coopq.cli.main import app
from coopq.core.recipes import RECIPES
from coopq.core.spec_base import Spec, spelled

ROOT = Path(__file__).parents[1]
_WRITTEN = "<!-- Written by `python -m tools.reference`. -->"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):(.*)$")
_ENTRY = re.compile(r"^(\*{0,2}\w+): (.*)$")


def options_page() -> str:
    """All commands with their options, and the settings of all recipes."""
    parts = [
        "# Options",
        _WRITTEN,
        "`coopq COMMAND --help` prints the same. `coopq --debug COMMAND` shows tracebacks.",
    ]
    context = click.Context(app, info_name="coopq")
    for name in app.list_commands(context):
        command = app.get_command(context, name)
        assert command is not None
        parts += _command(name, command, click.Context(command, info_name=name, parent=context))
    parts += ["## Recipes", "What `--for` and `--recipe` choose. An option that you write replaces the recipe's."]
    for name, recipe in RECIPES.items():
        form = "CoopQ's own form" if recipe.form is None else f"the form `{recipe.form}`"
        rows = [
            (f"`{spelled(option)} {_shown(setting.value)}`", setting.why) for option, setting in recipe.settings.items()
        ]
        parts += [f"### `{name}`", f"Saved in {form}.", _table(("setting", "reason"), rows)]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """The public names with their arguments."""
    parts = [
        "# Python API",
        _WRITTEN,
        "The names of `coopq.__all__`. [Python](python.md) shows each in use. `progress` is called with a stage, the "
        "steps done and the steps in all.",
    ]
    for name in coopq.__all__:
        thing = getattr(coopq, name)
        parts += [f"## `coopq.{name}`", *_described(name, thing)]
    return "\n\n".join(parts) + "\n"


def decisions_page() -> str:
    """The list of decisions."""
    files = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    rows = [(file.name[:4], f"[{_title(file)}]({file.name})") for file in files]
    text = "Why things are as they are. A decision says what was chosen, what else was tried, and what decided."
    return "\n\n".join(["# Decisions", _WRITTEN, text, _table(("", "decision"), rows)]) + "\n"


PAGES: Mapping[str, Callable[[], str]] = {
    "docs/options.md": options_page,
    "docs/api.md": api_page,
    "docs/decisions/README.md": decisions_page,
}
"""What writes each page, by the page's path in the checkout."""


def _title(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _command(name: str, command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"## `coopq {name}`"
    yield f"`{context.command_path} {' '.join(command.collect_usage_pieces(context))}`"
    for text in inspect.cleandoc(command.help or "").split("\n\n"):
        words = " ".join(text.removeprefix("\b").split())
        yield f"`{words}`" if text.startswith("\b") else words
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1] and record[0] != "--help":
            sections.setdefault(getattr(parameter, "section", "Job"), []).append((f"`{record[0]}`", record[1]))
    for section, rows in sections.items():
        yield _table((section, ""), rows)


def _described(public_name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        yield from _docstring(thing)
    elif inspect.isclass(thing) and issubclass(thing, Spec):
        yield from _docstring(thing)
        rows = []
        for field in fields(thing):
            _, meta = get_args(field.type)[:2]
            default = "required" if field.required else f"`{field.default!r}`"
            rows.append((f"`{field.encode_name}`", default, meta.description or ""))
        yield _table(("field", "default", "what it is"), rows)
    elif inspect.isclass(thing) and issubclass(thing, msgspec.Struct):
        yield from _docstring(thing)
        for name, member in inspect.getmembers(thing):
            if not name.startswith("_") and inspect.isroutine(member) and name in vars(thing):
                yield f"**`{name}{_signature(member)}`**"
                yield from _docstring(member)
    else:
        yield f"```text\ncoopq.{public_name}{_signature(thing)}\n```"
        yield from _docstring(thing)


def _signature(thing: Any) -> str:
    """The arguments, one in a line if there are many; types without their modules."""
    signature = str(inspect.signature(thing))
    signature = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", signature)
    signature = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", signature)
    signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature)  # types by name
    signature = re.sub(r"SolverSpec\(alpha=[^)]*\)", "SolverSpec()", signature)
    if len(signature) <= 90:
        return signature
    inner, _, result = signature[1:].rpartition(") -> ")
    return "(\n    " + ",\n    ".join(_split(inner)) + f"\n) -> {result}"


def _split(arguments: str) -> Iterator[str]:
    """The arguments, split at commas that are in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(arguments):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield arguments[start:place].strip()
            start = place + 1
    yield arguments[start:].strip()


def _docstring(thing: Any) -> Iterator[str]:
    """A docstring in Google's form as Markdown."""
    title = ""
    entries: list[str] = []
    paragraph: list[str] = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if (section := _SECTION.match(line)) is not None:
            yield from _block(title, entries, paragraph)
            title, rest = section.groups()
            entries, paragraph = [], [rest.strip()]
        elif title and line.startswith("        ") and entries:
            entries[-1] += f" {line.strip()}"
        elif title and line.startswith("    "):
            entries.append(line.strip())
        elif not line:
            yield from _block(title, entries, paragraph)
            title, entries, paragraph = "", [], []
        else:
            if title:
                yield from _block(title, entries, paragraph)
                title, entries, paragraph = "", [], []
            paragraph.append(line.strip())
    yield from _block(title, entries, paragraph)


def _block(title: str, entries: list[str], paragraph: list[str]) -> Iterator[str]:
    text = " ".join(filter(None, paragraph))
    listed = [_ENTRY.sub(r"`\1`: \2", entry) for entry in entries]
    if title in ("Returns", "Yields"):
        listed, text = [], " ".join(filter(None, [text, *entries]))
    if title and (text or listed):
        yield f"**{title}** {text}".strip()
    elif text:
        yield text
    if listed:
        yield "\n".join(f"* {entry}" for entry in listed)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    for path, page in PAGES.items():
        (ROOT / path).write_text(page(), encoding="utf-8")
        print(f"wrote {path}")
