"""The report page in a browser: it opens without a network, on phones, in the dark."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, find_chromium, opened
from tests.pages import Parsed, page_of

CHROMIUM = find_chromium()
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on the path or named by COOPQ_CHROMIUM")


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert CHROMIUM is not None
    with opened(CHROMIUM) as page:
        yield page


@in_browser
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_pages_draw_without_a_word_at_every_width(
    width: int, browser: Page, large: Path, comparison: Path, searched: Path, finished: Path
) -> None:
    reports = [page_of(searched), page_of(finished)]
    for path in (large, comparison, *reports):
        for dark in (False, True):
            browser.open(path, width, dark=dark)
            assert browser.messages == [], path
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("document.querySelectorAll('.chart svg.marks').length") == len(Parsed(path).specs)


@in_browser
def test_a_map_answers_a_hover(browser: Page, searched: Path) -> None:
    browser.open(page_of(searched), 1400)
    told = browser.hover("#widths .mark-rect path")
    assert "block 0, q+k+v" in told
    assert {"bits", "size, MB", "cost of lowering", "runner-up"} <= set(re.split(r"\s*[\t\n]+\s*", told))


@pytest.mark.slow  # a wall-clock
@in_browser
def test_a_large_page_opens_at_once(browser: Page, large: Path) -> None:
    assert min(browser.open(large, 1400) for _ in range(2)) < 2000, "milliseconds"
