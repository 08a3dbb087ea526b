"""Figures of the reports, from the tables in them."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from _answers import Table, read_tables
from _common import RESULTS
from coopq.judge.references import REFERENCES
from coopq.judge.results import Comparison
from coopq.report.page.colours import CHOICE, FAINT, FRONT, RUNNER_UP, width_colour
from coopq.report.plot_style import (
    INK,
    legend_beside,
    method_lines,
    new_axes,
    place_labels,
    readable_log,
    save_figure,
    set_title,
)

THREE = (INK, "#009e73", RUNNER_UP)
"""Colours of what is no method."""
SEARCHES = {
    "coopq, M = 10": "paper's method, 10 walks",
    "coopq, M = 50": "paper's method, 50 walks",
    "one-shot, at all high": "one-shot from high",
    "one-shot, at all low": "one-shot from low",
    "evopress": "EvoPress",
    "cross-layer": "cross-layer",
    "regression, order 2, 250 points": "regression",
    "greedy down": "greedy down",
    "greedy up": "greedy up",
    "greedy up, 4 a move": "greedy up, 4 a move",
    "greedy up, 4 a move, 10 swaps": "greedy with swaps",
}
PLAYERS = {"": "blocks", "-fused": "fused layers", "-linear": "linear layers"}


def tables_of(name: str) -> list[Table]:
    """The tables of a page."""
    return read_tables((RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines())


def numbers_in(text: str) -> list[float]:
    """The numbers in a cell, without commas."""
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace(",", ""))]


def draw_regret(out: Path) -> list[Path]:
    """Regret against cost; the active search at several limits."""
    (rows,) = tables_of("regret")
    found = {row["method"]: (float(row["cost"]), numbers_in(row["all"])[0]) for row in rows}
    figure, axes = new_axes(8, 4.2)
    active = sorted(point for method, point in found.items() if method.startswith("active"))
    axes.plot(*np.transpose(active), "o-", color=FRONT, linewidth=2.2, zorder=3)
    others = {shown: found[method] for method, shown in SEARCHES.items()}
    for name, point in others.items():
        axes.plot(*point, "o", color=CHOICE if name.startswith("paper") else FAINT)
    axes.set(xscale="log", yscale="log", xlim=(14, 1000), ylim=(0.00006, 0.3))
    axes.set(xlabel="forwards of the model for four budgets", ylabel="regret: 0 is the optimum, 1 is random")
    readable_log(axes.xaxis, 14, 1000)
    axes.set_yticks([0.0001, 0.001, 0.01, 0.1], ["0.0001", "0.001", "0.01", "0.1"])
    axes.minorticks_off()
    axes.grid(visible=True)
    set_title(axes, "36 synthetic games: regret against cost")
    pieces = [piece for ends in pairwise(np.log(active)) for piece in pairwise(np.exp(np.linspace(*ends, 20)))]
    place_labels(figure, axes, {**others, "active search": active[1]}, pieces)
    return save_figure(figure, out / "regret")


def draw_widths(out: Path) -> list[Path]:
    """Perplexity against bits per weight, by players and widths."""
    (rows,) = tables_of("widths")
    figure, axes = new_axes(8, 4)
    for (suffix, players), colour in zip(PLAYERS.items(), THREE, strict=True):
        for bits, dash in (("2-4", "--"), ("2-3-4-8", "-")):
            case = f"demo-hqq-{bits}{suffix}"
            row = next(row for row in rows if (row["case"], row["method"]) == (case, "active"))
            sizes = [size for size in row if size.endswith("bpw")]
            perplexity = [numbers_in(row[size])[0] for size in sizes]
            label = f"{players}, {bits.replace('-', ', ')} bits"
            x = [float(size.removesuffix("bpw")) for size in sizes]
            axes.plot(x, perplexity, "o", linestyle=dash, color=colour, label=label)
    axes.set(yscale="log", xlabel="bits per weight", ylabel="perplexity on WikiText-2", xticks=x, ylim=(80, 120_000))
    readable_log(axes.yaxis, 80, 120_000)
    axes.grid(visible=True)
    set_title(axes, "SmolLM2-135M by hqq: finer players and more widths")
    legend_beside(axes)
    return save_figure(figure, out / "widths")


def draw_calibration(out: Path) -> list[Path]:
    """Loss on other text against the number of calibration tokens."""
    rows = {row["method"]: row for row in tables_of("calibration")[0]}
    figure, axes = new_axes(8, 4)
    methods, shift = ("active", "coopq", "lim", "llm-mq"), 1.0
    looks = method_lines(methods)
    for text, dash in (("c4", "-"), ("wikipedia", "--")):
        for method in methods if text == "c4" else methods[:2]:
            cells = {key: cell for key, cell in rows[method].items() if key.startswith(f"{text}-") and cell}
            tokens = [1024 * int(re.findall(r"(\d+)k", key)[0]) * shift for key in cells]
            mean, low, high = np.transpose([numbers_in(cell) for cell in cells.values()])
            name = f"{method}, {'C4' if text == 'c4' else 'Wikipedia'}"
            marks = {"fmt": looks[method].marker, "color": looks[method].colour, "linestyle": dash, "label": name}
            axes.errorbar(tokens, mean, yerr=[mean - low, high - mean], elinewidth=1, markersize=5, **marks)
            shift *= 1.03  # so that intervals do not hide each other
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xscale="log", xlabel="calibration tokens")
    axes.set_ylabel("loss on WikiText-2, nats per token,\nabove the active search with 2,048 tokens of C4")
    ticks = [2048, 8192, 32768, 65536]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(visible=True)
    set_title(axes, "A Llama by hqq, mean over five budgets")
    legend_beside(axes)
    return save_figure(figure, out / "calibration")


def draw_divergence(out: Path) -> list[Path]:
    """What searches by divergence find, less what searches by likelihood find."""
    tables = tables_of("divergence")
    order = [row["method"] for row in tables[0]]
    figure, axes = new_axes(8, 3.8)
    looks = zip(("Llama", "Qwen", "Gemma"), THREE, "os^", tables, strict=True)
    for k, (name, colour, marker, table) in enumerate(looks):
        mean, low, high = np.transpose([numbers_in(row["all"]) for row in table])
        y = np.arange(len(order)) + 0.24 * (k - 1)
        style = {"fmt": marker, "color": colour, "markersize": 5, "elinewidth": 1.5, "label": name}
        axes.errorbar(mean, y, xerr=[mean - low, high - mean], **style)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlabel("loss on WikiText-2 by --loss kl, less that by --loss nll, nats per token")
    axes.grid(visible=True, axis="x")
    found = [numbers_in(row["all"]) for table in tables for row in table]
    lower, clear = (sum(numbers[k] < 0 for numbers in found) for k in (0, 2))
    pairs = f"all {lower} pairs" if lower == len(found) else f"{lower} of {len(found)} pairs"
    set_title(axes, f"Searching by divergence: lower for {pairs}, for {clear} by more than the interval")
    legend_beside(axes)
    return save_figure(figure, out / "divergence")


def draw_quantizers(out: Path) -> list[Path]:
    """Loss above full precision by quantizer, at 2 and at 4 bits."""
    (rows,) = tables_of("quantizers")
    lines = (RESULTS / "quantizers.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][2:]  # columns share their names
    found = sorted(((line[0], numbers_in(line[4]), numbers_in(line[9])) for line in cells), key=lambda one: one[1][0])
    assert len(found) == len(rows)
    figure, axes = new_axes(7, 3.2)
    for place, (_, two, four) in enumerate(found):
        axes.plot([four[0], two[0]], [place, place], color="#d0d7de", zorder=1)
        for bits, (mean, low, high) in ((2, two), (4, four)):
            axes.plot([low, high], [place, place], color=INK, linewidth=1.5)
            style = {"color": width_colour(bits), "markeredgecolor": INK, "markersize": 7}
            axes.plot(mean, place, "o", label=f"{bits} bits" if place == 0 else None, **style)
    axes.set_yticks(range(len(found)), [name for name, _, _ in found])
    axes.set(ylim=(len(found) - 0.5, -0.5), xscale="log", xlim=(0.008, 1.6))
    readable_log(axes.xaxis, 0.008, 1.6)
    axes.set_xlabel("loss above full precision on WikiText-2, nats per token; 95 % intervals")
    axes.grid(visible=True, axis="x")
    set_title(axes, "A Llama with every layer at one width")
    legend_beside(axes)
    return save_figure(figure, out / "quantizers")


def draw_types(out: Path) -> list[Path]:
    """Divergence against bits per weight of ggml's types, rounded by ggml and by GPTQ."""
    (rows,) = tables_of("ggml_types")
    found = {row["type"]: (float(row["bits per weight"]), float(row["llama: divergence"])) for row in rows}
    figure, axes = new_axes(8, 4.4)
    for name, (bits, divergence) in found.items():
        plain = found.get(name.removesuffix(" by GPTQ"), (bits, divergence))
        axes.plot([bits, bits], [plain[1], divergence], color="#afb8c1", linewidth=1, zorder=1)
    for by_gptq, colour, marker, label in ((False, "#57606a", "s", "rounded by ggml"), (True, FRONT, "o", "by GPTQ")):
        points = [point for name, point in found.items() if name.endswith(" by GPTQ") == by_gptq]
        axes.plot(*np.transpose(points), marker, color=colour, markersize=5, label=label)
    axes.set(yscale="log", xlim=(1.8, 9), ylim=(0.00007, 0.8), xlabel="bits per weight")
    axes.set_ylabel("KL divergence from full precision, nats per token")
    axes.set_yticks([0.0001, 0.001, 0.01, 0.1], ["0.0001", "0.001", "0.01", "0.1"])
    axes.minorticks_off()
    axes.grid(visible=True)
    set_title(axes, "A Llama with every layer in one type")
    legend_beside(axes)
    place_labels(figure, axes, {name: point for name, point in found.items() if not name.endswith(" by GPTQ")}, [])
    return save_figure(figure, out / "ggml_types")


def draw_main_job(parts: Mapping[str, Sequence[Comparison]], out: Path) -> list[Path]:
    """The paper's method against the best of the others, in all cases.

    Args:
        parts: The comparison of each part, by name.
        out: Folder of the figure.
    """
    cases: list[tuple[str, str, float, str]] = []
    for name, rows in parts.items():
        for budget in dict.fromkeys(row.budget for row in rows if row.budget):
            losses = {row.method: row.nll for row in rows if row.budget == budget}
            rivals = {method: loss for method, loss in losses.items() if method not in ("coopq", *REFERENCES[:2])}
            best = min(rivals, key=lambda method: rivals[method])
            cases.append((name, budget, losses["coopq"] - rivals[best], best))
    figure, axes = new_axes(7.5, 5.2)
    _draw_cases(axes, cases)
    won = sum(case[2] < 0 for case in cases)
    set_title(axes, f"The paper's method has the lowest loss in {won} of {len(cases)} cases")
    return save_figure(figure, out / "main_job")


def _draw_cases(axes: Any, cases: Sequence[tuple[str, str, float, str]]) -> None:
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, (_, _, above, best) in enumerate(cases):
        axes.plot([0, above], [place, place], color=CHOICE, linewidth=1.5, alpha=0.5)
        axes.plot(above, place, "o", color=CHOICE, markerfacecolor=CHOICE if above < 0 else "white", markersize=6)
        align = {"ha": "left" if above > 0 else "right", "va": "center", "fontsize": 7.5}
        axes.annotate(best, (above, place), textcoords="offset points", xytext=(7 if above > 0 else -7, 0), **align)
    labels = [f"{name.replace('-', ' ', 1).replace('-', ', ')} bits   {budget}" for name, budget, _, _ in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    most = max(abs(case[2]) for case in cases) * 1.25
    axes.set(ylim=(len(cases) - 0.4, -0.6), xlim=(-most, most))
    axes.set_xlabel("loss on WikiText-2 less that of the best other method (named), nats per token; left is better")
    axes.grid(visible=True, axis="x")
