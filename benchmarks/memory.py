"""Peak memory of a run on the demo model, against what is said before it starts.

    python benchmarks/memory.py                # a few minutes; writes docs/results/memory.md

A process for each number of tokens opens a workbench, scores by `fisher` (what the active search begins with) and
measures three assignments. Peak: the most that the process had resident (VmHWM, Linux), less what it had once the
libraries were imported and the model's modules made, without storage. All of the bank is touched, so that its pages
count where it is kept, although the system could drop them; where it is not, weights are read whenever they are set,
and the model itself holds those of one width.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from coopq.model.memory import Footprint
from coopq.plan.by_score import probes_of, terms_on
from coopq.model.load import load_skeleton
from coopq.model.players import find_players
from coopq.core.config import CalibrationConfig, RunConfig
from coopq.game.session import open_workbench

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "memory.md"
TOKENS, LENGTH = (1024, 4096, 16384), 512


def resident(field: str) -> int:
    """A size of this process in bytes, as Linux states it: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run(tokens: int, kept: bool) -> dict[str, int]:
    """Bytes foreseen and bytes at the peak."""
    config = RunConfig("demo", low=3, high=4, calibration=CalibrationConfig(sequences=tokens // LENGTH, length=LENGTH))
    skeleton = load_skeleton("demo")
    expected = Footprint.of(skeleton, find_players(skeleton), config.calibration, "cpu")
    before = resident("VmRSS")
    with TemporaryDirectory() as folder, open_workbench(config, Path(folder)) as bench:
        bench.bank.resident = kept
        terms_on(bench, "fisher", probes_of(bench))
        points = np.array([[3] * 30, [4] * 30, [3, 4] * 15], dtype=np.float32)
        with bench.calibration_game("measuring") as game:
            game(points)
    parts = {name: getattr(expected, name) for name in ("weights", "bank", "states", "working")}
    parts["bank"] //= 1 if kept else 2
    return {"tokens": tokens, **parts, "total": sum(parts.values()), "peak": resident("VmHWM") - before}


def main() -> None:
    """A process for each number of tokens, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, help="one number of tokens, in this process")
    parser.add_argument("--read", action="store_true", help="with --only: weights are read whenever they are set")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(run(arguments.only, not arguments.read)))
        return
    lines = [
        "# Peak memory against its forecast",
        "",
        f"Written by `python benchmarks/memory.py`: SmolLM2-135M-Instruct in float32 on a CPU, sequences of {LENGTH}",
        f"tokens; torch {torch.__version__}, transformers {transformers.__version__}. In MiB,",
        "beside the interpreter and the libraries.",
        "",
        "| tokens | bank | weights | of the bank | hidden states | one batch | forecast | peak | peak / forecast |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, how in product(TOKENS, ("mapped and kept", "read when set")):
        command = [sys.executable, __file__, "--only", str(tokens), *(["--read"] if how == "read when set" else [])]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        sizes = [row[name] / 2**20 for name in ("weights", "bank", "states", "working", "total", "peak")]
        lines.append(
            f"| {tokens} | {how} | " + " | ".join(f"{size:,.0f}" for size in sizes) + f" | {sizes[5] / sizes[4]:.2f} |"
        )
        print(lines[-1])
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
