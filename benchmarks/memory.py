"""Peak memory of a run on the demo model, against the footprint that is predicted before the run.

    python benchmarks/memory.py                # a few minutes; writes docs/results/memory.md

A process for each number of tokens opens a session, scores by `fisher` (the first step of a search) and measures
three assignments. The peak is the most memory that the process had resident (VmHWM, Linux), less what it had once the
libraries were imported and the model's modules made without storage. All of a resident bank is touched, so that its
pages count, although the system could drop them. Without a resident bank, weights are read whenever they are set, and
the model holds the weights of one width.

The constants of src/coopq/model/memory.py are set so that footprint and peak agree here.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from _common import RESULTS, command_line, resident_bytes, row, table, write_report
from coopq.core.specs import Request
from coopq.game.session import open_session, prepare
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS

TOKENS, LENGTH = (1024, 4096, 16384), 512


def run(tokens: int, kept: bool) -> dict[str, int]:
    """Predicted bytes and bytes at the peak."""
    prepared = prepare(Request.from_options(model="demo", bits=(3, 4), tokens=tokens, sequence_length=LENGTH))
    expected = prepared.footprint()
    before = resident_bytes("VmRSS")
    with TemporaryDirectory() as folder, open_session(prepared, Path(folder)) as session:
        session.bank.resident = kept
        cached_score(session, METHODS["fisher"], sensitivities(session))
        points = np.array([[3] * 30, [4] * 30, [3, 4] * 15], dtype=np.float32)
        with session.game("measuring") as game:
            game(points)
    parts = {name: getattr(expected, name) for name in ("weights", "bank", "states", "working")}
    parts["bank"] //= 1 if kept else 2
    return {"tokens": tokens, **parts, "total": sum(parts.values()), "peak": resident_bytes("VmHWM") - before}


def main() -> None:
    """A process for each number of tokens, and the table."""
    parser = command_line(__doc__)
    parser.add_argument("--only", type=int, help="one number of tokens, in this process")
    parser.add_argument("--read", action="store_true", help="with --only: do not keep the bank in memory")
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
