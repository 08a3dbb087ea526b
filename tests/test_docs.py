"""The README and the pages: commands, Python blocks, links, and what is written from the code."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from tools import reference

import coopq
from coopq.core.errors import CoopQError
from coopq.core.recipes import ENGINES, RECIPES
from tests.command_line import as_written
from tests.documents import (
    GUIDES,
    PAGES,
    ROOT,
    Block,
    all_options,
    blocks,
    broken_links,
    check_command,
    check_mention,
    commands,
    inline_code,
    links,
)

_OTHER_TOOLS = {"--strict", "--no-deps"}
"""Options of other tools that pages mention alone."""


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _marked(page: Path, mark: str) -> list[Block]:
    return [block for block in blocks(_text(page)) if block.language == "sh" and block.mark == mark]


def _with_python(pages: list[Path]) -> list[Path]:
    return [page for page in pages if any(_runs(block) for block in blocks(_text(page)))]


def _runs(block: Block) -> bool:
    return block.language == "python" and not block.mark.startswith("not run: ")


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_commands_are_what_the_command_line_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COOPQ_CONVERTER", "")  # restored after --converter
    for block in blocks(_text(page)):
        for words in commands(block.text) if block.language == "sh" else ():
            try:
                check_command(words)
            except (click.ClickException, CoopQError) as error:
                pytest.fail(f"{_name(page)}: coopq {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_mentioned_commands_exist(page: Path) -> None:
    for code in inline_code(_text(page)):
        if code.startswith("coopq "):
            try:
                check_mention(code)
            except click.UsageError as error:
                pytest.fail(f"{_name(page)}: `{code}`: {error}")


@pytest.mark.parametrize("page", GUIDES, ids=_name)
def test_mentioned_options_exist(page: Path) -> None:
    known = all_options() | _OTHER_TOOLS
    words = [word.partition("=")[0].rstrip(",") for code in inline_code(_text(page)) for word in code.split()[:1]]
    assert {word for word in words if word.startswith("--") and word not in known} == set()


@pytest.mark.parametrize("page", [page for page in GUIDES if _marked(page, "run")], ids=_name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: str) -> None:
    _run(page, "run", tmp_path, monkeypatch, stories)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in GUIDES if _marked(page, "run slow")], ids=_name)
def test_long_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: str) -> None:
    _run(page, "run slow", tmp_path, monkeypatch, stories)


def _run(page: Path, mark: str, folder: Path, monkeypatch: pytest.MonkeyPatch, stories: str) -> None:
    monkeypatch.chdir(folder)
    for block in _marked(page, mark):
        for words in commands(block.text):
            code, _, err = as_written(*[stories if word == "demo" else word for word in words])
            assert code == 0, (words, err)


@pytest.mark.parametrize("page", _with_python(PAGES), ids=_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stories: str) -> None:
    monkeypatch.chdir(tmp_path)
    program = "\n".join(block.text for block in blocks(_text(page)) if _runs(block))
    names: dict[str, Any] = {}
    exec(compile(program.replace('"demo"', repr(stories)), _name(page), "exec"), names)


def test_every_public_name_is_shown_in_use() -> None:
    assert len(coopq.__all__) <= 20
    shown = "\n".join(block.text for block in blocks(_text(ROOT / "docs" / "python.md")))
    assert [name for name in coopq.__all__ if f"coopq.{name}" not in shown] == []


@pytest.mark.parametrize("path", reference.PAGES)
def test_written_pages_follow_the_code(path: str) -> None:
    assert _text(ROOT / path) == reference.PAGES[path](), "run: python -m tools.reference"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_the_readme_says_how_to_run_the_result(engine: str) -> None:
    command = re.escape(RECIPES[engine].command("OUT")).replace("OUT", r"[\w.-]+")
    assert re.search(f"`{command}`", _text(ROOT / "README.md"))


def test_the_readme_is_short() -> None:
    assert len(_text(ROOT / "README.md").splitlines()) <= 250


def test_every_page_is_in_the_navigation() -> None:
    nav = tomllib.loads(_text(ROOT / "zensical.toml"))["project"]["nav"]
    named = set(_leaves(nav))
    assert all((ROOT / "docs" / page).is_file() for page in named)
    own = {str(page.relative_to(ROOT / "docs")) for page in GUIDES if page.is_relative_to(ROOT / "docs")}
    assert own <= named


def _leaves(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    inner = node.values() if isinstance(node, dict) else node
    return [leaf for part in inner for leaf in _leaves(part)]


def test_the_pages_are_small() -> None:
    assert sum(file.stat().st_size for file in (ROOT / "docs").rglob("*") if file.is_file()) < 5_000_000


@pytest.mark.parametrize(
    "line",
    [
        "quantise demo --size 3bpw --out out",
        "quantize demo --sise 3bpw --out out",
        "quantize demo --size 3bpw",
        "quantize demo --size 3bits --out out",
        "quantize demo --size 3bpw --bits 4 --out out",
        "quantize demo --size 3bpw --tokens many --out out",
        "quantize demo --size 3bpw --backend rtm --out out",
        "quantize demo --size 3bpw --method actve --out out",
        "quantize demo --size 3bpw --for llama --out out",
        "quantize demo --size 3bpw --target ggguf --out out",
        "export out --too gguf --out file.gguf",
        "estimate demo --tokens 100 --run run",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (words,) = commands(blocks(f"text\n\n```sh\ncoopq {line}  # a comment\n```\n")[0].text)
    with pytest.raises((click.ClickException, CoopQError)):
        check_command(words)


@pytest.mark.parametrize("code", ["coopq quantise", "coopq quantize demo ... --sise 3bpw", "coopq show RUN --pages"])
def test_a_wrong_mention_is_noticed(code: str) -> None:
    (found,) = inline_code(f"Run `{code}`.\n")
    with pytest.raises(click.UsageError):
        check_mention(found)


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](page.md) [b](none.md#x) ![c](none.svg) [d](https://example.org) `[e](none.md)`\n[f](#here)\n")
    assert links(_text(page)) == ["page.md", "none.md#x", "none.svg", "#here"]
    assert broken_links(page) == ["none.md#x", "none.svg"]


def test_blocks_and_their_marks_are_found() -> None:
    page = "<!-- run -->\n\n```sh\ncoopq quantize \\\n    demo | tee x\ncoopq\n```\n\n"
    shell, python = blocks(page + "<!-- not run: why -->\n\n```python\n1 / 0\n```\n")
    assert list(commands(shell.text)) == [["quantize", "demo"]]
    assert shell.mark == "run"
    assert not _runs(python)
    assert _runs(Block("", "python", ""))


@pytest.mark.slow
@pytest.mark.real
def test_the_notebook_runs() -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
    notebook = pytest.importorskip("nbformat").read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    done = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    printed = [output["text"] for cell in done.cells for output in cell.get("outputs", []) if "text" in output]
    assert any("perplexity" in text for text in printed)
