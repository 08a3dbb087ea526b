"""An 8B model on one GPU: the time of a layer forward, its share of the GPU's peak, and of whole searches.

    python benchmarks/gpu.py                   # minutes on one GPU of 80 GB
    python benchmarks/gpu.py --run             # also measures every walk of SPQE, M = 25, not only what it would take
    python benchmarks/gpu.py --tokens 4096 --layers 4      # seconds: a few blocks, from which the rest is foreseen

The shape of Llama-3.1-8B with random weights in bfloat16, made on the device: shapes decide speed. Weights at both
widths are rounded by torch on the device, as `rtn` does, and stay there. What searches would take is foreseen for all
32 blocks and 16,384 tokens. Writes docs/results/gpu.md. On a machine without a GPU it says so and ends.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import Progress
from transformers import AutoModelForCausalLM, LlamaConfig

from coopq.backends import get_backend
from coopq.bank import WeightBank
from coopq.engine import PrefixEngine, prefix_tree_size
from coopq.estimators import SPQE
from coopq.forecast import works
from coopq.memory import Footprint
from coopq.models import LoadedModel
from coopq.players import find_blocks, find_players
from coopq.replay import batch_size
from coopq.run import CalibrationConfig, RunConfig
from coopq.terminal import progress_bars

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu.md"
LENGTH, WALKS = 2048, 25
BLOCKS, TOKENS = 32, 16384
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256


def clock(work: Callable[[], object]) -> float:
    """Seconds of one repeat, the median of five after a warm-up."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def product(n: int, into: int, out: int) -> Callable[[], object]:
    """A product of a linear layer's shape in bfloat16."""
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, into), (into, out)))
    return lambda: torch.mm(a, b)


def with_compiled(block: Any, engine: PrefixEngine, plain: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward of the first block when it is compiled, and how far its states are from the plain ones."""
    block.compile()
    try:
        seconds, _ = engine.timed(clock)
        states = torch.cat(engine.forward_block(0, engine.embedded))
    finally:
        block._compiled_call_impl = None
    return seconds, float((states.float() - plain.float()).norm() / plain.float().norm())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--layers", type=int, default=BLOCKS)
    parser.add_argument("--folder", type=Path, help="for the bank, 28 GB of it; memory-backed is faster")
    parser.add_argument("--run", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    shape = LlamaConfig(num_hidden_layers=arguments.layers, vocab_size=VOCABULARY, **SHAPE)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).eval()
    players = find_players(model)
    text = CalibrationConfig(sequences=arguments.tokens // LENGTH, length=LENGTH)
    config = RunConfig("random", low=2, high=4, permutations=WALKS, calibration=text)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(text.sequences, LENGTH))
    batch = min(batch_size("cuda", LENGTH), text.sequences) * LENGTH
    points = SPQE(len(players), low=2, high=4, permutations=WALKS, seed=0).points
    blocks = [player.block for player in players]
    with TemporaryDirectory(dir=arguments.folder) as folder, torch.no_grad():
        bank = WeightBank(Path(folder), LoadedModel(model, None, torch.bfloat16), players, get_backend("rtn"), {})
        with progress_bars() as progress:
            bank.build((2, 4), progress=progress)
        engine = PrefixEngine(model, bank, ids)
        list(engine.evaluate(np.full((1, len(players)), 2, dtype=np.int8)))  # reads the bank
        list(engine.evaluate(np.full((1, len(players)), 4, dtype=np.int8)))
        layer, head = engine.timed(clock)
        plain = torch.cat(engine.forward_block(0, engine.embedded))
        compiled, difference = with_compiled(find_blocks(model)[1][0], engine, plain)
        peak = 2 * 8192**3 / clock(product(8192, 8192, 8192))
        products = sum(
            clock(partial(product(batch, into, out))) * arguments.tokens / batch
            for out, into in (linear.shape for linear in players[0].linears)
        )
        flops = 2 * arguments.tokens * players[0].n_weights
        scale = TOKENS / arguments.tokens
        with torch.device("meta"):
            whole = find_players(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)))
        found = works(whole, config)
        lines = [
            "# An 8B model on one GPU",
            "",
            "Written by `python benchmarks/gpu.py"
            + (" --run" if arguments.run else "")
            + f"`: {arguments.layers} blocks of",
            f"Llama-3.1-8B's shape, random weights, bfloat16, {arguments.tokens:,} tokens in sequences of {LENGTH:,},",
            f"batches of {batch:,}; {torch.cuda.get_device_name()}, torch {torch.__version__},",
            f"transformers {transformers.__version__}.",
            "",
            f"* Peak, a product of 8192 x 8192 matrices: {peak / 1e12:.0f} TFLOP/s.",
            f"* A layer forward: {layer * 1e3:.1f} ms, {flops / layer / 1e12:.0f} TFLOP/s in its linear layers,",
            f"  {flops / layer / peak:.0%} of the peak; their products alone {products * 1e3:.1f} ms.",
            f"* With the block compiled by torch.compile: {compiled * 1e3:.1f} ms, {flops / compiled / peak:.0%};",
            f"  its states differ by {difference:.1e} of their norm.",
            f"* The head with the loss: {head * 1e3:.1f} ms.",
            f"* Memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak,",
            f"  {Footprint.of(model, players, text, 'cuda').total / 2**30:.1f} GiB foreseen.",
            "",
            f"Foreseen for {BLOCKS} blocks and {TOKENS:,} tokens:",
            "",
            "| | layer forwards | losses | minutes |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {work.layer_forwards:,} | {work.evaluations:,} "
                f"| {scale * (work.layer_forwards * layer + work.evaluations * head) / 60:.1f} |"
                for name, work in found.items()
                if name == "active" or name.startswith("coopq")
            ),
        ]
        report(lines)
        if arguments.run:
            start = time.perf_counter()
            with Progress() as bars:
                for _ in bars.track(engine.evaluate(points), total=len(np.unique(points, axis=0)), description="SPQE"):
                    pass
            minutes, forwards = (time.perf_counter() - start) / 60, prefix_tree_size(points, blocks)
            report([*lines, "", f"SPQE, M = {WALKS}, measured: {minutes:.1f} minutes, {forwards:,} layer forwards."])


def report(lines: list[str]) -> None:
    """Write and print what is known."""
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
