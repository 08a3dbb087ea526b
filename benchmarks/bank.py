"""The weight bank of the demo model: bytes on disk, seconds to dequantize, and losses with caches of several sizes.

    python benchmarks/bank.py                    # a few minutes; writes docs/results/bank.md
    python benchmarks/bank.py --making BEFORE    # five minutes; writes docs/results/making.md

Evaluations are of the same random assignments with each cache in turn. A cache of no size makes
every player's weights anew whenever they are set. Seconds are of the processor: whatever else the machine does adds
nothing. `--making` compares this version of coopq with an earlier one, checked out in the folder BEFORE: what the bank
of the demo model takes by ggml-gptq at all types that its rows allow.
"""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from _common import (
    BENCHMARKS,
    RESULTS,
    ROOT,
    command_line,
    cpu_seconds,
    median_seconds,
    processor,
    row,
    table,
    write_report,
)
from coopq.core.specs import QuantizerSpec, Request
from coopq.core.types import Assignments, Width
from coopq.game.engines.prefix_engine import PrefixEngine, make_engine
from coopq.game.prepared import Prepared, prepare
from coopq.model.load import max_positions
from coopq.model.texts import calibration_set
from coopq.quantizers import get_backend
from coopq.quantizers.backend import WeightQuantizer
from coopq.quantizers.bank import WeightBank

CASES: dict[str, tuple[Width, ...]] = {"rtn": (2, 4), "hqq": (2, 4), "ggml": (4, 5, 8)}
"""Backends and widths. Rows of the demo model have 576 weights: ggml has no more types for these."""
TYPES = ("rtn", "hqq", "quanto", "ggml", "ggml-iq")
"""Backends of which every width is timed on one matrix."""
SHAPE = (512, 1024)
TEXTS = {64: (64, 20), 4096: (512, 5)}
"""By calibration tokens: the length of a sequence, and assignments. The recipes search on 4,096 tokens. Weights are
made once whatever the tokens, so few tokens are where making weights costs most."""
MAKING_ROUNDS = 3
FACTORS = {"moments": 32, "rounding": 30}
"""How often the demo model's bank takes the steps of `_making.py`: for 32 pairs of sequences, and for 30 blocks."""
STEPS = {
    "moments": "second moments of all layers on 1,024 tokens",
    "rounding": "rounding one block, with the factors of its moments",
    "whole": "the whole bank, computed: 32 and 30 times as much",
}
SHARES = {"full": 1.0, "a quarter": 0.25, "none": 0.0}
"""Caches: which share of all dequantized weights they hold."""


def open_banks(prepared: Prepared, folder: Path) -> tuple[dict[str, WeightBank], dict[str, PrefixEngine]]:
    """A bank with a cache of each size over one folder, with an engine each."""
    loaded, footprint = prepared.load(), prepared.footprint
    tokens = calibration_set(prepared.request.text, loaded.tokenizer, max_positions(loaded.model)).tokens
    rooms = {name: footprint.at_once + round(share * footprint.dequantized) for name, share in SHARES.items()}
    banks = {
        name: WeightBank(
            folder, loaded, prepared.players, prepared.backend, {}, room=None if name == "full" else rooms[name]
        )
        for name in SHARES
    }
    fitted_to = tokens if prepared.backend.calibrated else None
    banks["full"].build(prepared.request.widths.bits, fitted_to)
    return banks, {name: make_engine(loaded.model, bank, tokens) for name, bank in banks.items()}


def seconds_to_read(bank: WeightBank, widths: tuple[Width, ...]) -> float:
    """Seconds to dequantize every player at every width once."""
    start = cpu_seconds()
    for player in range(len(bank.players)):
        for width in widths:
            bank.weights(player, width)
    return cpu_seconds() - start


def paired_seconds(engines: dict[str, PrefixEngine], point: Assignments) -> dict[str, float]:
    """Seconds of the processor for the loss of one assignment by each engine, one after the other."""
    losses, seconds = [], {}
    for cache, engine in engines.items():
        start = cpu_seconds()
        ((_, found, _),) = engine.evaluate(point[None])
        seconds[cache] = cpu_seconds() - start
        losses.append(found)
    assert all(np.array_equal(found, losses[0]) for found in losses)
    return seconds


def case(name: str, n_tokens: int) -> list[Any]:
    """A row of the report."""
    widths, (length, n_assignments) = CASES[name], TEXTS[n_tokens]
    request = Request.from_options(model="demo", backend=name, bits=widths, tokens=n_tokens, sequence_length=length)
    prepared = prepare(request)
    with TemporaryDirectory() as folder:
        banks, engines = open_banks(prepared, Path(folder))
        on_disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        first, again = (seconds_to_read(banks["none"], widths) for _ in range(2))
        points = np.random.default_rng(0).choice(widths, size=(n_assignments, len(prepared.players))).astype(np.float32)
        seconds_to_read(banks["full"], widths)
        paired_seconds(engines, points[0])  # The first losses are checked against the model's own forward.
        seconds = [paired_seconds(engines, point) for point in points]
    cells = [f"{median(each['full'] for each in seconds):.3f}"]
    for cache in list(SHARES)[1:]:
        ratio = median(each[cache] / each["full"] for each in seconds)
        cells.append(f"{median(each[cache] for each in seconds):.3f} ({ratio:.2f})")
    before = on_disk + prepared.footprint.dequantized
    sizes = [f"{before / 1e6:,.0f}", f"{on_disk / 1e6:,.0f}"]
    line = [name, ", ".join(map(str, widths)), f"{n_tokens:,}", *sizes, f"{first:.2f}", f"{again:.2f}", *cells]
    print(row(line), flush=True)
    return line


def type_rows() -> list[list[str]]:
    """Milliseconds to dequantize a million weights, for each backend and width."""
    weight = torch.randn(SHAPE)
    rows = []
    for name in TYPES:
        backend = get_backend(QuantizerSpec(name))
        assert isinstance(backend, WeightQuantizer)
        cells = []
        for width in backend.bits:
            packed = backend.quantize(weight, width)
            seconds = median_seconds(partial(backend.dequantize, packed, SHAPE, width, weight.dtype), 9)
            cells.append(f"{width:g}: {seconds * 1e9 / weight.numel():.1f}")
        rows.append([name, ", ".join(cells)])
        print(row(rows[-1]), flush=True)
    return rows


def making(before: Path) -> list[str]:
    """The report of what the bank takes by ggml-gptq, before and now; rounds of both alternate."""
    asked = ["git", "-C", str(before), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    for _ in range(MAKING_ROUNDS):
        for version, root in (("before", before), ("now", ROOT)):
            environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(BENCHMARKS / "_making.py")]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found[version].append(json.loads(done.stdout.splitlines()[-1]))
            print(version, found[version][-1], flush=True)
    for each in (each for rounds in found.values() for each in rounds):
        each["whole"] = sum(FACTORS[step] * each[step] for step in FACTORS)
    rows = []
    for step, what in STEPS.items():
        before_s, now = (float(np.median([each[step] for each in rounds])) for rounds in found.values())
        rows.append([what, f"{before_s:.1f}", f"{now:.1f}", f"{now / before_s:.2f}"])
    return [
        f"Written by `python benchmarks/bank.py --making BEFORE` on {processor()}, one thread: SmolLM2-135M in",
        "float32, at the nine types that long rows allow and the three of short rows. Seconds of the processor,",
        f"medians of {MAKING_ROUNDS} rounds in which both versions alternate. Before is commit {commit}.",
        "",
        *table(["", "before", "now", "now / before"], rows),
    ]


def main() -> None:
    """Measure all cases and types, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--making", type=Path, metavar="BEFORE", help="a checkout of the version to compare with")
    before = parser.parse_args().making
    if before is not None:
        write_report(RESULTS / "making.md", making(before))
        return
    columns = ["backend", "widths", "tokens", "MB before", "MB on disk", "s to read", "s to dequantize"]
    lines = [
        f"Written by `python benchmarks/bank.py` on {processor()}, threads: {torch.get_num_threads()}.",
        "SmolLM2-135M in float32; its 30 blocks are the players. Before, the bank had dequantized weights on disk too.",
        "Processor seconds are to make the weights of every player at every width, with and without reading and",
        "checking files, and for one loss of a random assignment on the tokens: medians over assignments, in brackets",
        "that of the ratio to a full cache, measured just before. With more tokens a loss takes longer, and making",
        "weights does not.",
        "",
        *table(
            [*columns, *(f"s a loss, cache {cache}" for cache in SHARES)],
            [case(name, n_tokens) for name, n_tokens in product(CASES, TEXTS)],
        ),
        "",
        "Milliseconds to dequantize a million weights, by width:",
        "",
        *table(["backend", "milliseconds"], type_rows()),
    ]
    write_report(RESULTS / "bank.md", lines)


if __name__ == "__main__":
    main()
