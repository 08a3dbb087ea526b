"""How time and memory grow with layers, walks, tokens and players, on models of the demo's width.

    python benchmarks/growth.py                # a quarter of an hour on two cores; writes docs/results/growth.md

Random weights: only shapes matter here. Each row is a process of its own, which measures the walks of SPQE at 2 and 4
bits. One thing changes from row to row. The predicted time is block forwards times the time of a block forward, plus
heads times the time of a head; the same process measures both times after the walks.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from _common import RESULTS, command_line, median_seconds, resident_bytes, row, run_alone, table, write_report
from coopq.core.specs import QuantizerSpec, TextSpec
from coopq.game.engines.prefix_engine import make_engine
from coopq.model.load import LoadedModel
from coopq.model.memory import Footprint
from coopq.model.players import find_players
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from coopq.search import SPQE

LENGTH = 256
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
VOCABULARY = 8192
BASE = {"layers": 12, "walks": 4, "tokens": 1024, "granularity": "block"}
COLUMNS = (
    *("players", "losses", "block forwards", "of unshared", "seconds", "predicted", "ms a block forward"),
    *("peak MiB", "of forecast"),
)
SWEEPS: dict[str, tuple[int | str, ...]] = {
    "layers": (12, 30, 60),
    "walks": (4, 8, 16),
    "tokens": (512, 1024, 2048, 4096),
    "granularity": ("block", "linear"),
}


def run(layers: int, walks: int, tokens: int, granularity: str) -> dict[str, float]:
    """Measure one row in this process."""
    text = TextSpec(tokens=tokens, sequence_length=LENGTH)
    shape = LlamaConfig(num_hidden_layers=layers, vocab_size=VOCABULARY, **SHAPE)
    before = resident_bytes("VmRSS")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    players = find_players(model, granularity)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(text.n_sequences, LENGTH))
    with TemporaryDirectory() as folder:
        loaded = LoadedModel(model, None, torch.float32)
        bank = WeightBank(Path(folder), loaded, players, get_backend(QuantizerSpec("rtn")), {})
        bank.build((2, 4))
        engine = make_engine(model, bank, ids)
        points = SPQE(len(players), low=2, high=4, permutations=walks, seed=0).points
        start = time.perf_counter()
        evaluations = sum(1 for _ in engine.evaluate(points))
        spent, block_forwards = time.perf_counter() - start, engine.block_forwards
        block, head = engine.timed(lambda work: median_seconds(work, 9))
    return {
        "players": len(players),
        "evaluations": evaluations,
        "block_forwards": block_forwards,
        "unshared": walks * len(players) * layers,
        "seconds": spent,
        "predicted": block_forwards * block + evaluations * head,
        "block": block,
        "peak": resident_bytes("VmHWM") - before,
        "footprint": Footprint.estimate(model, players, text, "cpu").total,
    }


def main() -> None:
    """Measure each row in a process of its own, and write the report."""
    parser = command_line(__doc__)
    parser.add_argument("--only", help="one row as JSON, in this process")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(run(**json.loads(only))))
        return
    lines = [
        "Written by `python benchmarks/growth.py`: Llama blocks of the demo model's width (576, inner 1,536), random",
        f"weights, {VOCABULARY:,} words, backend rtn at 2 and 4 bits, float32, {torch.get_num_threads()} threads,",
        f"torch {torch.__version__}, transformers {transformers.__version__}. Every sweep changes one thing of:",
        f"{BASE['layers']} layers, {BASE['walks']} walks,",
        f"{BASE['tokens']} tokens in sequences of {LENGTH}, blocks as players.",
        "",
    ]
    for name, values in SWEEPS.items():
        lines += [
            f"## By {name}",
            "",
            *table([name, *COLUMNS], []),
        ]
        for value in values:
            found = run_alone(__file__, "--only", json.dumps({**BASE, name: value}))
            cells = [value, *(found[key] for key in ("players", "evaluations", "block_forwards"))]
            cells += [f"{found['block_forwards'] / found['unshared']:.2f}", f"{found['seconds']:.1f}"]
            cells += [f"{found['predicted'] / found['seconds']:.2f}", f"{found['block'] * 1e3:.1f}"]
            cells += [f"{found['peak'] / 2**20:,.0f}", f"{found['peak'] / found['footprint']:.2f}"]
            lines.append(row(cells))
            print(lines[-1], flush=True)
        lines.append("")
    lines += [
        "Time is block forwards times the time of a block forward, which grows with tokens alone, and heads. Block",
        "forwards grow linearly with walks and with players. They grow with the square of the layers if the players",
        "are blocks: every layer adds a loss to each walk, and to each loss the blocks after the block that changes,",
        "half of the blocks on average. Shared prefixes save more if more walks share them. Memory grows with layers",
        "(weights, their forms at two widths, a hidden state for each layer) and with tokens (hidden states), not with",
        "walks; linear layers as players do not change memory.",
    ]
    write_report(RESULTS / "growth.md", lines, quiet=True)


if __name__ == "__main__":
    main()
