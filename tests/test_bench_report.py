"""The tables and figures of a bench, of results made by hand."""

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from coopq.core.specs import Request
from coopq.judge.bench.aggregate import average_over_seeds, tidy
from coopq.judge.bench.config import Bench, Case
from coopq.judge.bench.results import Result, Row
from coopq.judge.results import Comparison
from coopq.report.bench_plots import name_players
from coopq.report.bench_tables import markdown
from coopq.report.plot_style import method_lines
from coopq.report.plots import save_comparison


def test_figures_name_players_by_block_and_projection() -> None:
    layers = ["self_attn.q_proj+k_proj", "mlp.experts.gate", "mlp.shared.gate"]
    names = ["model.embed_tokens", "model.layers.0", *(f"model.layers.1.{layer}" for layer in layers), "lm_head"]
    inside = ["block 1, q+k", "block 1, mlp.experts.gate", "block 1, mlp.shared.gate"]
    assert name_players(names) == ["embed_tokens", "block 0", *inside, "lm_head"]


def test_methods_keep_their_colours() -> None:
    few, many = ["coopq", "lim", "zd"], ["lim", "active", "coopq", "random", "zd", "llm-mq", "regression", "hawq"]
    looks, more = method_lines(few), method_lines(many)
    assert list(looks) == few
    assert all(more[method] == looks[method] for method in few)
    assert len({look.colour for look in more.values()}) == len({look.marker for look in more.values()}) == 7


def test_a_figure_has_seven_lines_and_names_the_methods_left_out(tmp_path: Path) -> None:
    rows = [
        Comparison(f"method{k}", f"{bits}avg", 1, bits, bits, "nll", 2.0, 3.0, 20.0 + k * bits, (3.0 + 0.1 * k,))
        for k in range(9)
        for bits in (2.5, 3.0)
    ]
    png, svg = save_comparison(rows, "nine methods", tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = re.findall(r"<!-- (.+) -->", svg.read_text())
    assert [line for line in text if line.startswith("method")] == [f"method{k}" for k in range(5)]
    assert "Not drawn: method5, method6, method7, method8" in text


def row(method: str, budget: str | None, windows: list[float], block_forwards: int = 0) -> Row:
    return Row(
        method=method,
        budget=budget,
        width=3 if method == "uniform" else None,
        assignment=(2, 4),
        average_bits=3.0,
        bits_per_weight=3.5,
        block_forwards=block_forwards,
        calibration_loss=1.0,
        windows=tuple(windows),
    )


def toy(rows: list[Row], seed: int = 0, case: str = "toy") -> Result:
    return Result(
        case=case,
        seed=seed,
        request=Request.from_options(model="m"),
        loss="nll",
        blocks=2,
        players=("a", "b"),
        rows=tuple(rows),
        shapley=None,
        covariance=None,
        interactions=((0.0, 0.1), (0.1, 0.0)),
    )


def test_who_wins_by_hand() -> None:
    references = [row("original", None, [0.5, 0.5]), row("uniform", None, [1.0, 1.0])]
    first = toy([*references, row("coopq", "3avg", [1.0, 2.0], 60), row("lim", "3avg", [2.0, 3.0], 2)])
    second = toy([*references, row("coopq", "3avg", [1.0, 4.0], 40), row("lim", "3avg", [2.0, 3.0], 2)], seed=1)
    cells = average_over_seeds(tidy([first, second]))
    assert cells["windows"]["toy", "3avg", "coopq"].tolist() == [1.0, 3.0], "the mean over seeds"
    assert cells["cost"]["toy", "3avg", "coopq"] == 25
    assert cells["nll"].idxmin() == ("toy", "3avg", "coopq")
    shown = markdown(Bench("Toy", (), None, 64), [first, second])
    assert "Lower in 1 of 1 cells (0 beyond the interval), higher in 0 (0 beyond)." in shown
    assert f"| toy | 3avg | {np.exp(2):.2f} | lim | {np.exp(2.5):.2f} | {np.expm1(-0.5) * 100:+.1f} % " in shown
    assert "| coopq | 1 of 1 | 0.0000 ± nan | 0.0000 | 0.0000 | 25 |" in shown


def test_cases_that_share_budgets_in_bytes_stand_side_by_side() -> None:
    blocks = Request.from_options(model="m", backend="rtn")
    cases = tuple(
        Case(request, ("3avg", "3bpw"), ("coopq", "lim"), (0,))
        for request in (blocks, blocks.replace(granularity="fused"))
    )
    references = [row("original", None, [0.5, 0.5]), row("uniform", None, [1.0, 1.0])]
    results = [
        toy(
            [*references, *(row(method, budget, [nll, nll], 60) for method in ("coopq", "lim") for budget in budgets)],
            case=case.name,
        )
        for case, nll, budgets in zip(cases, (2.0, 1.5), [case.budgets for case in cases], strict=True)
    ]
    shown = markdown(Bench("Toy", cases, None, 64), results)
    assert "## m by rtn at equal bytes" in shown
    assert "| case | method | 3bpw | cost |" in shown, "equal average bits may be other bytes"
    assert f"| m-rtn-2-4 | lim | {np.exp(2):.2f} | 30 |" in shown
    assert f"| m-rtn-2-4-fused | coopq | **{np.exp(1.5):.2f}** | 30 |" in shown
    assert "equal bytes" not in markdown(Bench("Toy", cases[:1], None, 64), results[:1]), "there is nothing beside it"
    cases = (cases[0], replace(cases[1], request=cases[1].request.replace(embeddings=True)))
    results[1] = msgspec.structs.replace(results[1], case=cases[1].name)
    assert "equal bytes" not in markdown(Bench("Toy", cases, None, 64), results), "bits of more weights are more bytes"
