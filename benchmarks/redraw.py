"""The figures of reports once more, from the results that the repository keeps.

    python benchmarks/redraw.py

Measures nothing. Draws docs/results/main_job-PART.png from docs/results/main_job.json, and ranking.png and cost.png of
each bench from its results.csv. The commands of these reports draw the same figures.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from _common import BENCHMARKS, RESULTS, command_line
from coopq.judge.bench.config import read_bench
from coopq.report.bench_plots import save_ranks
from main_job import draw_part, read_parts

RANKED = ("small",)
"""Benches of so many methods that a ranking says something."""


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
    with TemporaryDirectory() as folder:
        for name, part in read_parts().items():
            draw_part(name, part.rows, Path(folder))
        for name in RANKED:
            for figure in draw_bench(name, Path(folder)):
                if figure.suffix == ".png":
                    shutil.copy(figure, RESULTS / name)


if __name__ == "__main__":
    main()
