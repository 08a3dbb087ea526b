"""The figure of the README: our files and llama.cpp's mixes of the same size, and AutoScheme, from the reports.

    python benchmarks/front_figure.py

Measures nothing: the numbers are those of the tables in docs/results/llama_mixes-llama-linear.md and
docs/results/auto_scheme.md. Writes docs/results/front.svg and front.png.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from _answers import read_tables
from _common import RESULTS, command_line
from coopq.report.page.colours import FRONT
from coopq.report.plot_style import INK, new_axes, readable_log, save_figure, set_title

MIXES, QWEN, SCHEME = (
    RESULTS / f"{name}.md" for name in ("llama_mixes-llama-linear", "llama_mixes-qwen-linear", "auto_scheme")
)
OURS, RIVAL = FRONT, "#57606a"
"""Blue is the active search in every figure."""
BESIDE = {"Q2_K": (7, 0), "IQ3_XXS": (10, 0), "IQ2_M": (-7, 0), "Q3_K_S": (9, 4), "Q3_K_M": (9, 4), "Q4_K_S": (7, 4)}
"""Where a label is not above its point: points to the right, points up."""


def draw_mixes(axes: Any, page: Path) -> None:
    """Divergence against file size: our files, the strongest mix of each size, and llama.cpp's mixes as they are."""
    sizes, divergences, *strongest = read_tables(page.read_text(encoding="utf-8").splitlines())
    lost = {row["llama.cpp's mix"]: float(row["WikiText-2: its divergence"]) for row in divergences}
    made = [(row["llama.cpp's mix"], _megabytes(row["its bytes"])) for row in sizes]
    axes.plot([size for _, size in made], [lost[mix] for mix, _ in made], "s", color=RIVAL, markerfacecolor="none")
    for mix, size in made:
        right, up = BESIDE.get(mix, (0, 7))
        align = "center" if not right else "left" if right > 0 else "right"
        style = {"textcoords": "offset points", "xytext": (right, up), "ha": align}
        axes.annotate(mix, (size, lost[mix]), color=RIVAL, va="center" if right else "bottom", fontsize=8, **style)
    columns = ("its bytes", "its divergence", "our bytes", "our divergence")
    compared = strongest[0] if strongest else [_as_made(*pair) for pair in zip(sizes, divergences, strict=True)]
    rows = [[_megabytes(row[each]) if "bytes" in each else float(row[each]) for each in columns] for row in compared]
    rivals = sorted({(size, divergence) for size, divergence, _, _ in rows})
    ours = sorted((size, divergence) for _, _, size, divergence in rows)
    axes.plot(*np.transpose(rivals), "s-", color=RIVAL, markersize=6, linewidth=1)
    for row in compared:  # a strongest mix that is not among the first seven has no name yet
        if (name := row.get("strongest mix", "")) and name not in lost:
            below = {"textcoords": "offset points", "xytext": (2, -7), "ha": "center", "va": "top"}
            place = _megabytes(row["its bytes"]), float(row["its divergence"])
            axes.annotate(name, place, color=RIVAL, fontsize=8, **below)
    axes.plot(*np.transpose(ours), "o-", color=OURS, markersize=6, linewidth=2)
    for text, (size, divergence), place, colour in (
        ("CoopQ, same size", ours[-2], (-10, -8), OURS),
        ("strongest mix" if strongest else "llama.cpp's mixes", rivals[-2], (9, 15), RIVAL),
    ):
        style = {"textcoords": "offset points", "xytext": place, "ha": "right" if place[0] < 0 else "left"}
        axes.annotate(text, (size, divergence), color=colour, fontweight="bold", va="bottom", **style)
    saved = [1 - row[3] / row[1] for row in rows]
    axes.set(yscale="log", xlabel="file size, MB")
    _set_limits(axes, (3.6, 6.75), (0.009, 0.36))
    axes.set_ylabel("KL divergence from full precision,\nnats per token of WikiText-2")
    readable_log(axes.yaxis, 0.009, 0.36)
    axes.grid(visible=True)
    set_title(axes, f"Same file size: {100 * min(saved):.0f} to {100 * max(saved):.0f} % less KL divergence")


def _set_limits(axes: Any, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Set limits of axes, and check that no point lies outside."""
    found = axes.dataLim
    assert x[0] <= found.x0 <= found.x1 <= x[1], (found, x)
    assert y[0] <= found.y0 <= found.y1 <= y[1], (found, y)
    axes.set(xlim=x, ylim=y)


def _as_made(size: dict[str, str], divergence: dict[str, str]) -> dict[str, str]:
    """A row of the comparison with the mixes as llama.cpp makes them."""
    return {**size, "its divergence": divergence["WikiText-2: its divergence"], "our divergence": divergence["ours"]}


def _megabytes(text: str) -> float:
    """Bytes of a table, in millions."""
    return int(text.replace(",", "")) / 1e6


def draw_scheme(axes: Any) -> None:
    """Perplexity against average bits: AutoScheme, and the active search for as long as AutoScheme takes."""
    (rows,) = read_tables(SCHEME.read_text(encoding="utf-8").splitlines())
    rows = [row for row in rows if row["our loss"] == "kl" and row["model"].startswith("llama")]
    rows = [row for row in rows if row["our search"] == "AutoScheme's time"]
    full = float(re.findall(r"\((.+)\)", rows[0]["model"])[0])
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        theirs, ours = float(row["AutoScheme"]), float(row["active"])
        axes.plot([place, place], [theirs, ours], color="#afb8c1", linewidth=1, zorder=1)
        axes.plot(place, theirs, "s", color=RIVAL, markersize=6)
        axes.plot(place, ours, "o", color=OURS, markersize=6)
        beside = {"textcoords": "offset points", "xytext": (8, 0), "va": "center"}
        first = place == 0
        axes.annotate(f"{'AutoScheme ' if first else ''}{theirs:.1f}", (place, theirs), color=RIVAL, **beside)
        axes.annotate(f"{'CoopQ ' if first else ''}{ours:.1f}", (place, ours), color=OURS, fontweight="bold", **beside)
    axes.axhline(full, color=INK, linestyle=":", linewidth=1)
    above = {"textcoords": "offset points", "xytext": (0, 4), "ha": "left"}
    axes.annotate(f"full precision {full:.1f}", (-0.4, full), color=INK, **above)
    axes.set_xticks(places, [f"{float(row['average bits']):g} bits" for row in rows])
    _set_limits(axes, (-0.45, len(rows) - 0.3), (48, 91))
    axes.set(ylabel="perplexity on WikiText-2", xlabel="layers at 2 or 4 bits, average width")
    axes.grid(visible=True, axis="y")
    set_title(axes, "Same width, same time")


def draw_qwen(out: Path) -> list[Path]:
    """The figure of the page on the Qwen: its mixes alone."""
    figure, axes = new_axes(6.5, 3.9)
    draw_mixes(axes, QWEN)
    return save_figure(figure, out / QWEN.stem)


def draw_front() -> None:
    """Draw the figure."""
    figure, (left, right) = new_axes(9, 3.9, 2, (1.75, 1))
    draw_mixes(left, MIXES)
    draw_scheme(right)
    save_figure(figure, RESULTS / "front")


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    draw_front()
