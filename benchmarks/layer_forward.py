"""What a layer forward and a head of the demo model cost, against the products of matrices in them.

    python benchmarks/layer_forward.py         # half a minute

Products of the block's shapes are timed by torch's own linear layer and by oneDNN; then the engine's forward of one
block, and its loss from the last states, with either. Prints a table; ratios mean more than times.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.nn.functional import linear

from coopq.backends import get_backend
from coopq.bank import WeightBank
from coopq.engine import PrefixEngine
from coopq.models import load_model
from coopq.onednn import ByOneDNN
from coopq.players import find_players


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The median of some repeats, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    loaded = load_model("demo", device="cpu")
    players = find_players(loaded.model)
    with TemporaryDirectory() as folder:
        bank = WeightBank(Path(folder), loaded, players, get_backend("rtn"), {})
    ids = np.random.default_rng(0).integers(loaded.model.config.vocab_size, size=(tokens // 256, 256))
    engine = PrefixEngine(loaded.model, bank, ids)
    engine.record()
    shapes = [layer.shape for layer in players[0].linears]
    flops = 2 * ids.size * players[0].n_weights
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {ids.size} tokens")
    with torch.no_grad():
        products = {
            "torch": lambda x, w: linear(x, w),
            "oneDNN": lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        }
        for name, product in products.items():
            taken = 0.0
            for out, into in shapes:
                x, w = torch.randn(512, into), torch.randn(out, into)
                taken += seconds(partial(product, x, w), 50) * ids.size / 512
            with ByOneDNN(loaded.model) if name == "oneDNN" else nullcontext():
                layer = seconds(lambda: engine.forward_block(0, engine.embedded), 20)
            print(
                f"{name}: products of a block {flops / taken / 1e9:.0f} GFLOP/s; layer forward {layer * 1e3:.1f} ms, "
                f"of which products {taken / layer:.0%}"
            )
        head = seconds(lambda: engine.losses(engine.embedded), 5)
        print(f"head and loss: {head * 1e3:.0f} ms, as the engine computes them")


if __name__ == "__main__":
    main()
