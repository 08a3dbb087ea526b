"""The figure of the README: our files and llama.cpp's mixes of the same size, and AutoScheme, from the reports.

    python benchmarks/front_figure.py

Measures nothing: the numbers are those of the tables in docs/results/llama_mixes-llama-fused.md and
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
    RESULTS / f"{name}.md" for name in ("llama_mixes-llama-fused", "llama_mixes-qwen-fused", "auto_scheme")
)
OURS, RIVAL = FRONT, "#57606a"
"""Blue is the active search in every figure."""
BESIDE = {"Q2_K": (7, 0), "IQ3_XXS": (10, 0), "IQ2_M": (-7, 0)}
"""Where a label is not above its point: points to the right, points up."""


def draw_mixes(axes: Any, page: Path) -> None:
    """Divergence against file size: our files, llama.cpp's mixes, and how far apart both are."""
    sizes, divergences = read_tables(page.read_text(encoding="utf-8").splitlines())
    lost = {row["llama.cpp's mix"]: row for row in divergences}
    points = []
    for row in sizes:
        mix = row["llama.cpp's mix"]
        megabytes = [int(row[column].replace(",", "")) / 1e6 for column in ("its bytes", "our bytes")]
        lost_by = [float(lost[mix][column]) for column in ("WikiText-2: its divergence", "ours")]
        points.append((mix, megabytes[0], megabytes[1], lost_by[0], lost_by[1]))
    for mix, size, _, theirs, ours in points:
        axes.plot([size, size], [theirs, ours], color="#afb8c1", linewidth=1, zorder=1)
        right, up = BESIDE.get(mix, (0, 7))
        align = "center" if not right else "left" if right > 0 else "right"
        style = {"textcoords": "offset points", "xytext": (right, up), "ha": align}
        axes.annotate(mix, (size, theirs), color=RIVAL, va="center" if right else "bottom", fontsize=8, **style)
    axes.plot([point[1] for point in points], [point[3] for point in points], "s", color=RIVAL, markersize=6)
    front = sorted((point[2], point[4]) for point in points)
    axes.plot(*np.transpose(front), "o-", color=OURS, markersize=6, linewidth=2)
    size, divergence = front[-2]
    style = {"textcoords": "offset points", "xytext": (-10, -8), "ha": "right", "va": "center"}
    axes.annotate("CoopQ, same size", (size, divergence), color=OURS, fontweight="bold", **style)
    size, divergence = max(((point[1], point[3]) for point in points), key=lambda point: point[1:])
    style = {"textcoords": "offset points", "xytext": (9, 0), "va": "center"}
    axes.annotate("llama.cpp's mixes", (size, divergence), color=RIVAL, fontweight="bold", **style)
    saved = [1 - point[4] / point[3] for point in points]
    axes.set(yscale="log", ylim=(0.009, 0.36), xlim=(3.75, 6.75), xlabel="file size, MB")
    axes.set_ylabel("KL divergence from full precision,\nnats per token of WikiText-2")
    readable_log(axes.yaxis, 0.009, 0.36)
    axes.grid(visible=True)
    set_title(axes, f"Same file size: {100 * min(saved):.0f} to {100 * max(saved):.0f} % less KL divergence")


def draw_scheme(axes: Any) -> None:
    """Perplexity against average bits: AutoScheme and the active search."""
    (rows,) = read_tables(SCHEME.read_text(encoding="utf-8").splitlines())
    rows = [row for row in rows if row["our loss"] == "kl" and row["model"].startswith("llama")]
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
    axes.set(
        xlim=(-0.45, len(rows) - 0.3),
        ylim=(48, 91),
        ylabel="perplexity on WikiText-2",
        xlabel="layers at 2 or 4 bits, average width",
    )
    axes.grid(visible=True, axis="y")
    set_title(axes, "Same width: lower perplexity")


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
