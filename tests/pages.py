"""Report pages in tests: what they hold, and comparisons to write pages of."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq.judge.results import Comparison

MOST_BYTES = 2_000_000


class Parsed(HTMLParser):
    """What a page loads, and its specifications."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.specs: dict[str, dict[str, Any]] = {}
        self.open: list[str] = []
        self._spec: str | None = None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.open += [tag] if tag not in ("meta", "link", "br") else []
        self._spec = given.get("data-chart")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._spec = None

    def handle_data(self, data: str) -> None:
        if self._spec is not None:
            self.specs[self._spec] = json.loads(data)


def checked(path: Path) -> Parsed:
    """A page that is whole, small, and loads nothing."""
    page = Parsed(path)
    assert page.open == []
    assert page.loaded == []
    style = page.text[page.text.index("<style>") : page.text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert path.stat().st_size < MOST_BYTES
    assert page.specs
    return page


def many_methods(n: int) -> list[Comparison]:
    """A comparison of n methods at three budgets; method 0 is the best by far, method 1 as good as method 2."""
    rng = np.random.default_rng(0)
    windows = 3 + rng.normal(size=40) / 3
    rows: list[tuple[str, str | None, float, npt.NDArray[np.float64]]] = []
    for number in range(n):
        for size in (2.5, 3.0, 3.5):
            own = (
                windows + 1 / size + (0 if number == 0 else 0.1 + 0.02 * (number // 2 * 2)) + rng.normal(size=40) / 100
            )
            name = "active" if number == 0 else f"method-{number}"
            rows.append((name, f"{size}avg", size, own))
    rows += [("uniform", None, width, windows + 1 / width + 0.2) for width in (2.0, 4.0)]
    rows.append(("original", None, 16.0, windows))
    return [
        Comparison(
            method=name,
            budget=budget,
            n=1,
            average_bits=size,
            bits_per_weight=size + 0.25,
            loss="kl",
            calibration_loss=float(own.mean()) - 3,
            nll=float(own.mean()),
            perplexity=float(np.exp(own.mean())),
            windows=tuple(own.tolist()),
        )
        for name, budget, size, own in rows
    ]
