"""Report pages in tests: what they hold, and searches, records and comparisons to write pages of."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coopq import Request
from coopq.judge.results import Comparison
from coopq.model.texts import HeldOut
from coopq.plan.plan import Plan, PlayerPlan
from coopq.report.page.colours import WIDTH_COLOURS
from coopq.report.page.document import save_page
from coopq.report.page.ranking.page import save_comparison_page
from coopq.report.page.run.names import name_players
from coopq.report.page.run.page import run_sections
from coopq.report.page.run.record import PairTerms, Points, RunRecord
from tests.command_line import command
from tests.conftest import STORIES

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


def page_of(out: Path) -> Path:
    """The only page in the run folder of an output."""
    (page,) = out.with_name("out-run").glob("report-*.html")
    return page


def search(out: Path) -> Path:
    """A finished active search of linear layers: the folder `out` holds the model."""
    options = ["--bits", "2,3,4,8", "--granularity", "fused", "--loss", "kl", "--tokens", "128"]
    goal = ["--sequence-length", "64", "--budget", "3.2bpw", "--forwards", "20"]
    code, text, err = command("quantize", STORIES, *options, *goal, "--out", out)
    assert code == 0, err
    assert f"report: {page_of(out)}" in text
    return out


def comparison_page(folder: Path) -> Path:
    """The page of a comparison of twenty methods."""
    request = Request.from_options(model="demo")
    return save_comparison_page(request, HeldOut(64), many_methods(20), folder / "comparison.html")


def large_record(model: str = "demo") -> RunRecord:
    """210 layers of 30 blocks, 9 widths, 400 measured assignments."""
    rng = np.random.default_rng(0)
    widths = (*sorted(WIDTH_COLOURS)[1:-1], 16)
    layers = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    names = [(block, f"model.layers.{block}.{layer}_proj") for block in range(30) for layer in layers]
    if model != "demo":
        names = [(block, f"model.layers.{block}.{model}{layer}") for block in range(30) for layer in range(7)]
    assignments = rng.choice(widths, size=(400, 210)).astype(np.float32)
    n_bytes = (assignments.sum(axis=1) * 1000).astype(np.int64)
    losses = np.exp(-assignments.mean(axis=1, dtype=np.float64)) + rng.random(400) / 100
    players = tuple(
        PlayerPlan(name, float(bits), (name,), float(rng.random() + 0.01), None, block, 8000, _sizes(widths))
        for (block, name), bits in zip(names, assignments[7], strict=True)
    )
    plan = Plan(
        method="active",
        alpha=None,
        budget="6avg",
        budget_bytes=int(n_bytes.max()),
        bytes=int(n_bytes[7]),
        file_bytes=int(n_bytes[7]),
        average_bits=6.0,
        bits_per_weight=6.0,
        players=players,
        solver=None,
        predicted_loss=None,
        measured_loss=float(losses[7]),
        request=Request.from_options(model=model, bits=widths, granularity="linear"),
        fingerprint={"weights": "w", "bos": False},
        block_forwards=9000,
        block_forwards_unshared=12000,
        runner_up=tuple(assignments[8].tolist()),
    )
    points = Points(assignments, losses, n_bytes, np.array([0.8 * n for n in range(1, 401)]))
    above = np.triu(rng.normal(size=(210, 210)), 1)
    pairs = PairTerms(above + above.T, "change of the loss, %")
    return RunRecord(plan, name_players(players), points, points, 9.0, losses * 1.01, pairs)


def _sizes(widths: tuple[float, ...]) -> dict[str, int]:
    return {f"{width:g}": int(1000 * width) for width in widths}


def large_page(folder: Path) -> Path:
    """The page of the large record."""
    return save_page(folder / "large.html", "large", "", run_sections(large_record(), "out"))
