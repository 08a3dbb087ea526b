"""Time of block forwards and heads of the demo model, against the matrix products in them.

    python benchmarks/layer_forward.py         # some minutes; writes docs/results/layer_forward.md

The floor of a block forward is the time of its matrix products alone, one after the other: the products of the linear
layers by torch's own operation or by oneDNN, whichever is faster, and the two products of attention, all positions
against all. Beside the floor: transformers' block as it is, the engine's block, and whole evaluations against the
predicted time of their block forwards and heads.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from _common import command_and_page, command_line, median_seconds, row, table, write_section
from coopq.core.specs import QuantizerSpec
from coopq.game.engines.prefix_engine import make_engine
from coopq.model.blockwise import Blockwise, batch_size
from coopq.model.load import load_model
from coopq.model.players import find_players
from coopq.quantizers import get_backend
from coopq.quantizers.bank import WeightBank
from coopq.search import SPQE

LENGTH = 256
TOKENS = (512, 1024, 2048)
COLUMNS = (
    *("tokens", "linear layers by torch, GFLOP/s", "by oneDNN", "floor, ms", "transformers' block, ms", "of the floor"),
    *("engine's, ms", "of the floor", "head, ms", "whole evaluations / predicted"),
)


def by_torch(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer as torch computes it."""
    return functional.linear(x, w)


def by_onednn(x: Tensor, w: Tensor) -> Tensor:
    """A linear layer as the engine computes it on processors with AVX-512."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return output


def products(blockwise: Blockwise, config: Any, weights: list[Tensor], repeats: int) -> dict[str, float]:
    """Seconds that the products of a block take over all tokens, one after the other, by kind."""
    inputs = {into: torch.randn(blockwise.batches[0].numel(), into) for _, into in (w.shape for w in weights)}

    def multiply(product: Callable[[Tensor, Tensor], Tensor]) -> None:
        for w in weights:
            product(inputs[w.shape[1]], w)

    found = {
        name: median_seconds(partial(multiply, product), repeats) * len(blockwise.batches)
        for name, product in {"torch": by_torch, "oneDNN": by_onednn}.items()
    }
    heads = (*blockwise.batches[0].shape[:1], config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    q, k = torch.randn(*heads, LENGTH, width), torch.randn(*heads, width, LENGTH)
    p, v = torch.randn(*heads, LENGTH, LENGTH), torch.randn(*heads, LENGTH, width)
    found["attention"] = sum(median_seconds(partial(torch.matmul, a, b), repeats) for a, b in ((q, k), (p, v)))
    found["attention"] *= len(blockwise.batches)
    return found


def main() -> None:
    """Measure, and write the section of this processor."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    repeats, (command, page) = options.repeats, command_and_page(parser, options, "layer_forward")
    loaded = load_model("demo", device="cpu")
    model, players = loaded.model, find_players(loaded.model)
    weights = [model.get_submodule(layer.name).weight.data for layer in players[0].linears]
    head = [
        f"Written by `{command}`: SmolLM2-135M-Instruct, float32, sequences of",
        f"{LENGTH} tokens in batches of {batch_size('cpu', LENGTH) * LENGTH}. Medians of {repeats}; floor: products of",
        "the linear layers by the faster library, and the two products of attention, of the same shapes in the same",
        "run.",
    ]
    lines = [
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        *table(COLUMNS, []),
    ]
    with TemporaryDirectory() as folder, torch.no_grad():
        bank = WeightBank(Path(folder), loaded, players, get_backend(QuantizerSpec("rtn")), {})
        bank.build((2, 4))
        for tokens in TOKENS:
            ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(tokens // LENGTH, LENGTH))
            engine = make_engine(model, bank, ids)
            blockwise = engine.blockwise
            points = SPQE(len(players), low=2, high=4, permutations=2, seed=0).points[:30]
            blockwise.record()
            taken = products(blockwise, model.config, weights, repeats)
            floor = min(taken["torch"], taken["oneDNN"]) + taken["attention"]
            out = blockwise.forward_block(0, blockwise.embedded)
            plain = median_seconds(partial(blockwise.forward_block, 0, blockwise.embedded, out), repeats)
            block, head_time = engine.timed(lambda work: median_seconds(work, repeats))
            list(engine.evaluate(points[:1]))
            before, start = engine.block_forwards, time.perf_counter()
            evaluations = sum(1 for _ in engine.evaluate(points))
            whole = time.perf_counter() - start
            predicted = (engine.block_forwards - before) * block + evaluations * head_time
            flops = 2 * ids.size * players[0].n_weights / 1e9
            cells = [tokens, f"{flops / taken['torch']:.0f}", f"{flops / taken['oneDNN']:.0f}", f"{floor * 1e3:.1f}"]
            cells += [f"{plain * 1e3:.1f}", f"{floor / plain:.0%}", f"{block * 1e3:.1f}", f"{floor / block:.0%}"]
            lines.append(row([*cells, f"{head_time * 1e3:.0f}", f"{whole / predicted:.2f}"]))
            print(lines[-1], flush=True)
    write_section(page, head, lines)


if __name__ == "__main__":
    main()
