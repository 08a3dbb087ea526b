"""What layer forwards and heads of the demo model cost, against the products of matrices in them.

    python benchmarks/layer_forward.py         # some minutes; writes docs/results/layer_forward.md

The floor of a layer forward is the time of its products alone, each of its own shape, one after the other: those of
the linear layers by torch's own operation or by oneDNN, whichever is faster, and the two of attention, all positions
against all.
Beside it: transformers' block as it is, the engine's, and whole evaluations against layer forwards and heads.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from by_cpu import write_section
from coopq.quantize import get_backend
from coopq.quantize.bank import WeightBank
from coopq.game.prefix_engine import PrefixEngine
from coopq.search import SPQE
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.model.blockwise import batch_size

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "layer_forward.md"
LENGTH = 256
TOKENS = (512, 1024, 2048)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of some repeats, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def by_torch(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer as torch computes it."""
    return functional.linear(x, w)


def by_onednn(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer as the engine computes it on processors with AVX-512."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return output


def products(engine: PrefixEngine, weights: list[Tensor], repeats: int) -> dict[str, float]:
    """Seconds that the products of a block take over all tokens, one after the other, by kind."""
    config = engine._model.config
    inputs = {into: torch.randn(engine.batches[0].numel(), into) for _, into in (w.shape for w in weights)}

    def all_of(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for w in weights:
            product(inputs[w.shape[1]], w)

    found = {
        name: seconds(partial(all_of, product), repeats) * len(engine.batches)
        for name, product in {"torch": by_torch, "oneDNN": by_onednn}.items()
    }
    of_heads = (*engine.batches[0].shape[:1], config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    q, k = torch.randn(*of_heads, LENGTH, width), torch.randn(*of_heads, width, LENGTH)
    p, v = torch.randn(*of_heads, LENGTH, LENGTH), torch.randn(*of_heads, LENGTH, width)
    found["attention"] = sum(seconds(partial(torch.matmul, a, b), repeats) for a, b in ((q, k), (p, v)))
    found["attention"] *= len(engine.batches)
    return found


def main() -> None:
    """Time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    repeats = parser.parse_args().repeats
    loaded = load_model("demo", device="cpu")
    model, players = loaded.model, find_players(loaded.model)
    weights = [model.get_submodule(layer.name).weight.data for layer in players[0].linears]
    head = [
        "# Layer forwards against the products in them",
        "",
        "Written by `python benchmarks/layer_forward.py`: SmolLM2-135M-Instruct, float32, sequences of",
        f"{LENGTH} tokens in batches of {batch_size('cpu', LENGTH) * LENGTH}. Medians of {repeats}; floor: products of",
        "the linear layers by the faster library, and the two products of attention, of the same shapes in the same",
        "run.",
    ]
    lines = [
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "| tokens | linear layers by torch, GFLOP/s | by oneDNN | floor, ms | transformers' block, ms | of the floor |"
        " engine's, ms | of the floor | head, ms | whole evaluations / foreseen |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    with TemporaryDirectory() as folder, torch.no_grad():
        bank = WeightBank(Path(folder), loaded, players, get_backend("rtn"), {})
        bank.build((2, 4))
        for tokens in TOKENS:
            ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(tokens // LENGTH, LENGTH))
            engine = PrefixEngine(model, bank, ids)
            points = SPQE(len(players), low=2, high=4, permutations=2, seed=0).points[:30]
            engine.record()
            taken = products(engine, weights, repeats)
            floor = min(taken["torch"], taken["oneDNN"]) + taken["attention"]
            room = engine.forward_block(0, engine.embedded)
            plain = seconds(partial(engine.forward_block, 0, engine.embedded, room), repeats)
            block, of_head = engine.timed(lambda work: seconds(work, repeats))
            list(engine.evaluate(points[:1]))
            before, start = engine.layer_forwards, time.perf_counter()
            evaluations = sum(1 for _ in engine.evaluate(points))
            whole = time.perf_counter() - start
            foreseen = (engine.layer_forwards - before) * block + evaluations * of_head
            flops = 2 * ids.size * players[0].n_weights / 1e9
            lines.append(
                f"| {tokens} | {flops / taken['torch']:.0f} | {flops / taken['oneDNN']:.0f} | {floor * 1e3:.1f} "
                f"| {plain * 1e3:.1f} | {floor / plain:.0%} | {block * 1e3:.1f} | {floor / block:.0%} "
                f"| {of_head * 1e3:.0f} | {whole / foreseen:.2f} |"
            )
            print(lines[-1], flush=True)
    write_section(RESULTS, head, lines)


if __name__ == "__main__":
    main()
