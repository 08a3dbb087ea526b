"""The answers in answers.toml, written into the pages of docs/results and into their list.

    python benchmarks/answers.py

Measures nothing: below an answer each page stays as it is.
"""

from pathlib import Path

from _answers import NUMBERS, head, is_answered, overview, read_answers
from _common import RESULTS, command_line, write_lines


def body_of(page: Path) -> list[str]:
    """What a benchmark wrote into a page, below the answer."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return lines[lines.index(NUMBERS) + 2 :] if NUMBERS in lines else lines[2:]


def main() -> None:
    """Write the answers."""
    command_line(__doc__).parse_args()
    known = [page for group in read_answers()["group"] for page in group["page"]]
    pages = {page["name"]: RESULTS / f"{page['name']}.md" for page in known}
    for page in known:
        path = pages[page["name"]]
        if path.exists() and is_answered(page):
            body = body_of(path)
            write_lines(path, [*head(page["name"], body), *body])
    bodies = {name: body_of(path) for name, path in pages.items() if path.exists()}
    write_lines(RESULTS / "README.md", overview(bodies))


if __name__ == "__main__":
    main()
