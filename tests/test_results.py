"""The pages of results: each begins with its question and answer, links to what exists, and stays small."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
ANSWERED_BY_A_COUNT = {"architectures", "fuzz", "gguf_architectures", "making", "openvino", "reproduced", "vllm"}
"""Pages whose answer is a yes or a count, of which a figure would show nothing."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _answers

    yield _answers
    sys.modules.pop("_answers")


def test_pages_begin_with_the_answers_of_answers_toml(answers: ModuleType) -> None:
    known = [page for group in answers.read_answers()["group"] for page in group["page"]]
    names = {page["name"] for page in known}
    assert {path.stem for path in RESULTS.glob("*.md")} == names | {"README"}
    bodies = {}
    for name in names:
        lines = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
        body = lines[lines.index(answers.NUMBERS) + 2 :]
        assert lines == [*answers.head(name, body), *body], f"{name}.md: run python benchmarks/answers.py"
        bodies[name] = body
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert text.splitlines() == answers.overview(bodies), "README.md: run python benchmarks/answers.py"


def test_every_other_page_has_a_figure(answers: ModuleType) -> None:
    bare = {
        page["name"]
        for group in answers.read_answers()["group"]
        for page in group["page"]
        if "figure" not in page and "![" not in (RESULTS / f"{page['name']}.md").read_text(encoding="utf-8")
    }
    assert bare == ANSWERED_BY_A_COUNT


def test_links_and_figures_of_results_exist_and_figures_are_small() -> None:
    for page in RESULTS.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            target = page.parent / link
            assert "://" in link or target.exists(), f"{page.name} links to {link}"
    for figure in [*RESULTS.rglob("*.svg"), *RESULTS.rglob("*.png")]:
        assert figure.stat().st_size < 200_000, figure


def test_numbers_of_the_readme_stand_on_the_pages_that_it_cites() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    n_checked = 0
    for part in re.split(r"\n(?=\* |\| |\n)", text):
        pages = [page for page in re.findall(r"\]\((docs/[^)#]+\.md)", part) if "README" not in page]
        if not any(page.startswith(("docs/results/", "docs/large_models")) for page in pages):
            continue
        cited = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", part)
        for number in re.findall(r"(?<![\w.,-])\d+(?:,\d{3})*(?:\.\d+)?", words):
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d|[.,]\d)", cited), f"{number} in {part.strip()!r}"
            n_checked += 1
    assert n_checked > 15


def test_an_answer_on_mixes_counts_sizes_and_says_what_is_level(answers: ModuleType) -> None:
    changes = ["-0.1000 (-0.1500 to -0.0500)", "-0.0010 (-0.0040 to +0.0020)", "+0.0200 (+0.0100 to +0.0300)"]
    losses = [{"our loss above": change} for change in changes]
    divergences = [{"WikiText-2: its divergence": "0.2", "ours": ours} for ours in ("0.1", "0.15", "0.0000")]
    strongest = [
        {"its divergence": "0.2", "our divergence": ours, "our divergence above": change}
        for ours, change in zip(("0.1", "0.199", "0.22"), changes, strict=True)
    ]
    text = " ".join(answers.against_mixes(losses, divergences, strongest))
    assert "than the strongest mix of their size at 1 of 3 sizes, by 50 %, more at 1, by 10 %." in text
    assert "the files diverge 25 to 50 % less (at 2 of 3;" in text
    assert next(answers.against_mixes(losses, divergences)).endswith(
        "25 to 50 % (at 2 of 3; elsewhere the model's own file is the answer)."
    )
    assert "lower at 1 of 3 sizes, by 0.1000 nats, level at 1, higher at 1, by 0.0200 nats" in text
