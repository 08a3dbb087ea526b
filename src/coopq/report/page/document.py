"""One self-contained HTML file of sections, tables and Vega-Lite figures."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

from coopq.core.files import atomic_file

Spec: TypeAlias = dict[str, Any]
"""A Vega-Lite specification with its data."""

_LIBRARIES = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")


_DIGITS = r"[+-]?[\d,]+(\.\d+)?(e[+-]\d+)?%?"
_NUMBER = re.compile(rf"(± )?{_DIGITS}( MB| bpw)?( ± {_DIGITS})?|reference")


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says how to read it.

    Attributes:
        name: Name of the figure in the page, a word.
        spec: The specification.
        caption: How to read the figure, plain text.
        is_square: Whether the figure compares like with like and needs no more width than height.
    """

    name: str
    spec: Spec
    caption: str
    is_square: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: The question that the section answers.
        parts: Pieces of HTML from the functions of this module, and figures.
    """

    title: str
    parts: Sequence[str | Figure]


def save_page(path: Path, title: str, subtitle: str, sections: Iterable[Section]) -> Path:
    """Write the page; returns its path."""
    with atomic_file(path) as temporary:
        temporary.write_text(render(title, subtitle, sections), encoding="utf-8")
    return path


def render(title: str, subtitle: str, sections: Iterable[Section]) -> str:
    """The page as HTML."""
    return Template(_asset("page.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=_asset("page.css"),
        body="\n".join(map(_section, sections)),
        libraries="\n".join(f"<script>{_asset(name)}</script>" for name in _LIBRARIES),
        script=_asset("page.js"),
        licences=html.escape(_asset("LICENSES.md")),
    )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Commands to copy."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def facts(named: Sequence[tuple[str, str, str]]) -> str:
    """A row of boxes, each a name, a value in large letters and a note."""
    boxes = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd><dd class=note>{html.escape(note)}</dd></div>"
        for name, value, note in named
    )
    return f"<dl class=facts>{''.join(boxes)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on narrow screens; columns of numbers are right-aligned."""
    rows = list(rows)
    are_numbers = [all(_NUMBER.fullmatch(cell) for cell in column if cell) for column in zip(*rows, strict=True)]
    kinds = [" class=number" if is_number else "" for is_number in are_numbers] or [""] * len(head)
    names = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"


def details(summary: str, content: str) -> str:
    """A piece of HTML that opens on a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _section(section: Section) -> str:
    parts = (_figure(part) if isinstance(part, Figure) else part for part in section.parts)
    return f"<section><h2>{html.escape(section.title)}</h2>\n{''.join(parts)}</section>"


def _figure(figure: Figure) -> str:
    # In a script element "</" could end the element, whatever the text around it.
    spec = json.dumps(figure.spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure{" class=square" if figure.is_square else ""}><div class=chart id="{figure.name}" role=img></div>'
        f'<script type="application/json" data-chart="{figure.name}">{spec}</script>'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>\n"
    )


def _asset(name: str) -> str:
    return files("coopq.report.page").joinpath("assets", name).read_text(encoding="utf-8")
