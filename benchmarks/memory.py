"""Peak memory of a run on the demo model, against the footprint that is predicted before the run.

    python benchmarks/memory.py                # a few minutes; writes docs/results/memory.md

A process for each number of tokens opens a session, scores by `fisher` (the first step of a search) and measures
three assignments. The peak is the most memory that the process had resident (VmHWM, Linux), less what it had once the
libraries were imported and the model's modules made without storage. Either all of the bank's weights are dequantized
and kept, or those of one block at a time.

The constants of src/coopq/model/memory.py are set so that footprint and peak agree here.
"""

import json
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
import transformers

from _common import RESULTS, command_line, resident_bytes, row, run_alone, table, write_report
from coopq.core.specs import Request
from coopq.game.prepared import prepare
from coopq.game.session import open_session
from coopq.model.memory import Footprint
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS

TOKENS, LENGTH = (1024, 4096, 16384), 512
MADE = "a block's"
"""Which dequantized weights are in memory if none are kept."""


def run(tokens: int, kept: bool) -> dict[str, int]:
    """Predicted bytes and bytes at the peak."""
    prepared = prepare(Request.from_options(model="demo", bits=(3, 4), tokens=tokens, sequence_length=LENGTH))
    expected, _ = prepared.fit()
    before = resident_bytes("VmRSS")
    room = patch.object(Footprint, "room", return_value=None if kept else expected.at_once)
    with TemporaryDirectory() as folder, room, open_session(prepared, Path(folder)) as session:
        cached_score(session, METHODS["fisher"], sensitivities(session))
        points = np.array([[3] * 30, [4] * 30, [3, 4] * 15], dtype=np.float32)
        with session.game("measuring") as game:
            game(points)
    parts = {name: getattr(expected, name) for name in ("weights", "states", "working")}
    parts["quantized"] = expected.dequantized if kept else expected.bank + expected.at_once
    return {"tokens": tokens, **parts, "total": sum(parts.values()), "peak": resident_bytes("VmHWM") - before}


def main() -> None:
    """Measure each number of tokens in a process of its own, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--only", type=int, help="one number of tokens, in this process")
    parser.add_argument("--made", action="store_true", help="with --only: keep no dequantized weights")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(run(arguments.only, not arguments.made)))
        return
    columns = ["tokens", "dequantized", "weights", "quantized weights", "hidden states"]
    lines = [
        f"Written by `python benchmarks/memory.py`: SmolLM2-135M-Instruct in float32 on a CPU, sequences of {LENGTH}",
        f"tokens; torch {torch.__version__}, transformers {transformers.__version__}. In MiB,",
        "beside the interpreter and the libraries.",
        "",
        *table([*columns, "one batch", "forecast", "peak", "peak / forecast"], []),
    ]
    for tokens, how in product(TOKENS, ("all", MADE)):
        found = run_alone(__file__, "--only", str(tokens), *(["--made"] if how == MADE else []))
        sizes = [
            f"{found[name] / 2**20:,.0f}" for name in ("weights", "quantized", "states", "working", "total", "peak")
        ]
        lines.append(row([tokens, how, *sizes, f"{found['peak'] / found['total']:.2f}"]))
        print(lines[-1], flush=True)
    write_report(RESULTS / "memory.md", lines, quiet=True)


if __name__ == "__main__":
    main()
