"""The README and the pages of docs/, taken apart: blocks of code, commands, links.

A comment above a block says what tests do with it. Shell blocks are parsed; `<!-- run -->` also runs them, in order, in
one folder for each page, and `<!-- run slow -->` does so in a slow test. Python blocks run, as one program for each
page; `<!-- not run: REASON -->` leaves one out. The tiny model of the tests takes the place of `demo`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
from click.core import ParameterSource

from coopq.cli.main import app
from coopq.core.errors import CoopQError
from coopq.core.goal import Goal
from coopq.core.recipes import OWN, recipe_options
from coopq.core.spec_base import build
from coopq.core.specs import Request, option_fields
from coopq.export.formats import FORMS
from coopq.plan.methods import get_method
from coopq.quantizers import BACKENDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GUIDES = [page for page in PAGES if not {"results", "decisions"} & set(page.parts) and page.name != "CHANGELOG.md"]
"""Pages that tell users what to do now."""
_FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n\n?)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(?:\.\w+)?")
_ENDS = {"|", "&&", "||", ";", ">"}


class Block(NamedTuple):
    """A block of code: what the comment above the block says, its language and its text."""

    mark: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [Block(mark or "", language, text) for mark, language, text in _FENCE.findall(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The `coopq` commands of a shell block: the words after `coopq`."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "coopq" in words:
            rest = words[words.index("coopq") + 1 :]
            end = next((place for place, word in enumerate(rest) if word in _ENDS), len(rest))
            if end:
                yield rest[:end]


def inline_code(page: str) -> list[str]:
    """The pieces of code within sentences and tables."""
    return [" ".join(code.split()) for code in _INLINE.findall(_FENCE.sub("", page))]


def links(page: str) -> list[str]:
    """Targets of links and images outside of code, without those of the web."""
    prose = _INLINE.sub("", _FENCE.sub("", page))
    return [target for target in _LINK.findall(prose) if "://" not in target and not target.startswith("mailto:")]


def check_command(words: list[str]) -> None:
    """Parse a whole command as the command line does, and build what it asks for.

    Raises:
        click.ClickException: If the command, an option or a value is unknown, or something required is missing.
        CoopQError: If values do not fit.
    """
    group = click.Context(app, info_name="coopq")
    command = app.get_command(group, words[0])
    assert command is not None
    with command.make_context(words[0], words[1:], parent=group) as context:
        if words[0] in ("quantize", "estimate", "compare") and not any(map(_PLACEHOLDER.fullmatch, words)):
            _check_options(context)


def _check_options(context: click.Context) -> None:
    """Build the request and the goal of a command."""
    values = dict(context.params)
    named = {name: values[name] for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    engine, recipe = named.pop("engine", None), named.pop("recipe", None)
    if context.info_name == "quantize":
        values |= recipe_options(recipe or engine or OWN, engine or OWN, named)
        get_method(build(Goal, values).method)
    names = {field.encode_name for field in option_fields()}
    request = Request.from_options(**{name: value for name, value in values.items() if name in names})
    if request.quantizer.backend not in BACKENDS or request.target.form not in (None, *FORMS):
        raise CoopQError(f"there is no backend {request.quantizer.backend!r} or no form {request.target.form!r}")


def check_mention(code: str) -> None:
    """Check that a command within a sentence exists, and that its options do.

    Raises:
        click.UsageError: If not.
    """
    words = [word for word in shlex.split(code)[1:] if word != "..."]
    while words and words[0].startswith("--"):
        del words[0]
    if not words or _PLACEHOLDER.fullmatch(words[0]):
        return
    known = _options_of(words[0])
    for word in words[1:]:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise click.NoSuchOption(word)


def all_options() -> set[str]:
    """The options of all commands, and of `coopq` itself."""
    own = {name for parameter in app.params for name in parameter.opts}
    return own.union(*(_options_of(name) for name in app.list_commands(click.Context(app))))


def _options_of(name: str) -> set[str]:
    group = click.Context(app, info_name="coopq")
    command = app.get_command(group, name)
    assert command is not None
    parameters = command.get_params(click.Context(command, parent=group))
    return {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}


def broken_links(file: Path) -> list[str]:
    """Links of a page that lead nowhere, or from the site to a file outside of it."""
    site, found = ROOT / "docs", []
    for target in links(file.read_text(encoding="utf-8")):
        path = (file.parent / target.partition("#")[0]).resolve() if target[0] != "#" else file
        leaves = file.is_relative_to(site) and not path.is_relative_to(site)
        if not path.exists() or (leaves and "results" not in file.parts):  # results are read in a checkout
            found.append(target)
    return found
