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
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from _common import RESULTS, command_line, resident_bytes, row, run_alone, table, write_report
from coopq.core.specs import Request
from coopq.game.session import open_session, prepare
from coopq.plan.by_score import cached_score, sensitivities
from coopq.plan.methods import METHODS

TOKENS, LENGTH = (1024, 4096, 16384), 512
READ = "read when set"
"""How a bank that is not resident is used."""


def run(tokens: int, kept: bool) -> dict[str, int]:
    """Predicted bytes and bytes at the peak."""
    prepared = prepare(Request.from_options(model="demo", bits=(3, 4), tokens=tokens, sequence_length=LENGTH))
    expected, _ = prepared.fit()
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
    """Measure each number of tokens in a process of its own, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--only", type=int, help="one number of tokens, in this process")
    parser.add_argument("--read", action="store_true", help="with --only: do not keep the bank in memory")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(run(arguments.only, not arguments.read)))
        return
    columns = ["tokens", "bank", "weights", "of the bank", "hidden states"]
    lines = [
        "# Peak memory against its forecast",
        "",
        f"Written by `python benchmarks/memory.py`: SmolLM2-135M-Instruct in float32 on a CPU, sequences of {LENGTH}",
        f"tokens; torch {torch.__version__}, transformers {transformers.__version__}. In MiB,",
        "beside the interpreter and the libraries.",
        "",
        *table([*columns, "one batch", "forecast", "peak", "peak / forecast"], []),
    ]
    for tokens, how in product(TOKENS, ("mapped and kept", READ)):
        found = run_alone(__file__, "--only", str(tokens), *(["--read"] if how == READ else []))
        sizes = [f"{found[name] / 2**20:,.0f}" for name in ("weights", "bank", "states", "working", "total", "peak")]
        lines.append(row([tokens, how, *sizes, f"{found['peak'] / found['total']:.2f}"]))
        print(lines[-1], flush=True)
    write_report(RESULTS / "memory.md", lines, quiet=True)


if __name__ == "__main__":
    main()
