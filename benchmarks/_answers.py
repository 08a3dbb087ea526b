"""Questions and answers of the reports, from answers.toml: the head of each page, and the list of all."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Table = list[dict[str, str]]
"""The rows of a table: cells by column."""
NUMBERS = "## Measurement"
"""The heading of what a benchmark writes; an answer stands above."""
_OVERVIEW = """\
# What was measured

Each line is a question, its answer, and the page with the table, the command and what speaks against the answer. Costs
are forwards of the model over the calibration text. The reference models are a Llama, a Gemma and a Qwen of ten million
parameters each (`benchmarks/train.py`). Times depend on the processor. All other numbers are the same on every machine,
except for last digits, which the number of threads can change.

A page that was measured by older code says so. Numbers stand in the tables of the pages; `main_job.json`,
`recipes.json`, `ablations.json` and the `results.csv` of each bench keep them too.
`python benchmarks/redraw.py` draws the figures from these, and `reproduced.py` compares with `small/results`.
"""
_FIRST_SENTENCE = re.compile(r".+?[.](?= [A-Z0-9`])|.+", re.DOTALL)


def read_answers() -> dict[str, Any]:
    """The questions and answers as answers.toml has them."""
    return tomllib.loads(Path(__file__).with_name("answers.toml").read_text(encoding="utf-8"))


def read_tables(lines: Sequence[str]) -> list[Table]:
    """The tables of a report in Markdown; of two columns of one name the first counts."""
    tables: list[Table] = []
    head: list[str] = []
    found: Table = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("| "):
            head = []
        elif not head:
            head, found = cells, []
            tables.append(found)
        elif set("".join(cells)) != {"-"}:
            found.append(dict(reversed(list(zip(head, cells, strict=True)))))
    return tables


def head(name: str, body: Sequence[str]) -> list[str]:
    """The head of a page: question, answer, figure, what speaks against the answer, whether older code measured it.

    Args:
        name: Name of the page without a suffix.
        body: Lines of the page below, from which some answers are computed.
    """
    answers = read_answers()
    page = next((page for group in answers["group"] for page in group["page"] if page["name"] == name), None)
    if page is None:  # a report that goes to another file
        return [f"# {name}", ""]
    lines = [f"# {page['question']}", "", _answer(page, body), ""]
    if "figure" in page:
        file, shown = page["figure"]
        lines += [f"![{shown}]({file})", ""]
    lines += [f"* {loss}" for loss in page.get("losses", [])]
    lines += [""] if page.get("losses") else []
    older = page.get("older_text") or answers["older"].get(page.get("older"))
    return [*lines, *([f"*{older}*", ""] if older else []), NUMBERS, ""]


def overview(pages: Mapping[str, Sequence[str]]) -> list[str]:
    """The list of all questions and answers.

    Args:
        pages: Lines of each page that exists, by name.
    """
    lines = _OVERVIEW.splitlines()
    for group in read_answers()["group"]:
        lines += ["", f"## {group['title']}", "", "| question | answer | command |", "| --- | --- | --- |"]
        lines += [_row(page, pages) for page in group["page"]]
    return [*lines, "", "Commands follow `python benchmarks/` unless they begin with `coopq`."]


def _row(page: Mapping[str, Any], pages: Mapping[str, Sequence[str]]) -> str:
    name, match = page["name"], None
    if is_answered(page) and name in pages:
        match = _FIRST_SENTENCE.match(_answer(page, pages[name]))
    return f"| [{page['question']}]({name}.md) | {match[0] if match else 'see page'} | `{page['command']}` |"


def is_answered(page: Mapping[str, Any]) -> bool:
    """Whether answers.toml has an answer of a page, or says that it is computed."""
    return "answer" in page or page.get("computed", False)


def _answer(page: Mapping[str, Any], body: Sequence[str]) -> str:
    return " ".join(filter(None, against_mixes(*read_tables(body)))) if page.get("computed") else str(page["answer"])


def against_mixes(losses: Table, divergences: Table, strongest: Sequence[dict[str, str]] = ()) -> Iterator[str]:
    """The answer of a page on llama.cpp's mixes, from its tables."""
    saved = [
        1 - float(row["ours"]) / float(row["WikiText-2: its divergence"])
        for row in divergences
        if float(row["ours"]) > 0
    ]
    beyond = _beyond(len(saved), len(divergences))
    if strongest:
        rivals = [_less(row) for row in strongest]
        less, more = ([change for change, side in rivals if side == wanted] for wanted in (-1, 1))
        yield (
            "CoopQ's files diverge less from full precision on WikiText-2 than the strongest mix of their size at"
            f" {len(less)} of {len(rivals)} sizes{_percent(less)}"
            + (f", more at {len(more)}{_percent([-each for each in more])}" if more else "")
            + "."
        )
        yield (
            "The strongest mix is chosen in hindsight, with any type of the embedding. Beside the mixes as llama.cpp"
            f" makes them the files diverge{_percent(saved, '')} less{beyond}."
        )
    else:
        yield (
            "CoopQ's files diverge less from full precision on WikiText-2 than the mixes of their size"
            f"{_percent(saved)}{beyond}."
        )
    changes = [_interval(row["our loss above"]) for row in losses]
    lower = [-change for change, _, high in changes if high < 0]
    higher = [change for change, low, _ in changes if low > 0]
    level = len(changes) - len(lower) - len(higher)
    said = [f"lower at {len(lower)} of {len(changes)} sizes{_between(lower)}"]
    said += [f"level at {level}"] if level else []
    said += [f"higher at {len(higher)}{_between(higher)}"] if higher else []
    yield f"Against the mixes as llama.cpp makes them, their loss is {', '.join(said)}."


def _less(row: dict[str, str]) -> tuple[float, int]:
    """How much less ours is, as a part of theirs, and the sign of the difference, 0 within its interval."""
    _, low, high = _interval(row["our divergence above"])
    return 1 - float(row["our divergence"]) / float(row["its divergence"]), (low > 0) - (high < 0)


def _percent(parts: Sequence[float], before: str = ", by") -> str:
    """The range of some parts, in percent."""
    low, high = (f"{100 * each:.0f}" for each in (min(parts, default=0), max(parts, default=0)))
    return "" if not parts else f"{before} {low} %" if low == high else f"{before} {low} to {high} %"


def _beyond(n: int, n_all: int) -> str:
    """What is said where some sizes are no smaller than the model's own file."""
    return "" if n == n_all else f" (at {n} of {n_all}; elsewhere the model's own file is the answer)"


def _interval(text: str) -> tuple[float, float, float]:
    """A difference and its interval, as `loss_above` writes them."""
    change, low, high = map(float, re.findall(r"[-+](?:\d+\.\d+|nan)", text))
    return change, low, high


def _between(values: Sequence[float]) -> str:
    """The range of some values, nats."""
    if not values:
        return ""
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return f", by {low} nats" if low == high else f", by {low} to {high} nats"
