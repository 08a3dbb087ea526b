"""The figures of reports once more, from the results that the repository keeps.

    python benchmarks/redraw.py

Measures nothing. Draws docs/results/main_job-PART.png from docs/results/main_job.json, ranking.png and cost.png of the
bench of allocators from its results.csv, as the commands of these reports do, and NAME.svg from the tables in NAME.md.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from _common import BENCHMARKS, RESULTS, command_line
from _cost_figures import OF_COSTS
from _figures import (
    draw_calibration,
    draw_divergence,
    draw_main_job,
    draw_quantizers,
    draw_regret,
    draw_types,
    draw_widths,
)
from _page_figures import OF_FINDINGS
from coopq.judge.bench.config import read_bench
from coopq.report.bench_plots import save_ranks
from front_figure import draw_front, draw_qwen
from main_job import draw_part, read_parts

RANKED = ("small",)
"""Benches of so many methods that a ranking says something."""

SHAPED = (draw_calibration, draw_divergence, draw_quantizers, draw_qwen, draw_regret, draw_types, draw_widths)
"""Figures of pages that have a shape of their own."""


def draw_bench(name: str, out: Path) -> list[Path]:
    """The ranking of a bench, and its costs."""
    rows = pd.read_csv(RESULTS / name / "results.csv").dropna(subset=["budget"])
    blocks = {"demo": 30}
    rows["cost"] = rows["block_forwards"] / rows["model"].map(blocks).fillna(12)
    groups = rows.groupby(["case", "budget", "method"], sort=False)
    cells = groups[["nll", "calibration_loss"]].mean()
    cells = cells.join(rows.groupby(["case", "method"], sort=False)["cost"].mean())
    return save_ranks(cells, read_bench(BENCHMARKS / f"{name}.toml").title, out)


def main() -> None:
    """Draw all figures."""
    command_line(__doc__).parse_args()
    draw_front()
    parts = {name: part.rows for name, part in read_parts().items()}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for part, rows in parts.items():
            draw_part(part, rows, folder)
        of_pages = [file for draw in (*SHAPED, *OF_FINDINGS, *OF_COSTS) for file in draw(folder)]
        for figure in of_pages + draw_main_job(parts, folder):
            if figure.suffix == ".svg":
                shutil.copy(figure, RESULTS)
        for bench in RANKED:
            for figure in draw_bench(bench, folder):
                if figure.suffix == ".png":
                    shutil.copy(figure, RESULTS / bench)


if __name__ == "__main__":
    main()
